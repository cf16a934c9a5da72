/* user.c - an outside program, in the common subset of C11 and C++11.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <qkv/qkv.h>

int main(void)
{
    float x[4] = {1, 2, 3, 4}, weight[4] = {1, 1, 1, 1}, out[4];
    int64_t rows[2] = {1, 4}, width[1] = {4};
    DLTensor t;
    memset(&t, 0, sizeof t);
    t.data = x;
    t.device.device_type = kDLCPU;
    t.dtype = QKV_F32;
    t.ndim = 2;
    t.shape = rows;
    DLTensor o = t, w = t;
    o.data = out;
    w.data = weight;
    w.ndim = 1;
    w.shape = width;

    qkv_context *ctx;
    qkv_context_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    if (qkv_context_create(&options, &ctx) != QKV_OK ||
        qkv_rmsnorm(ctx, &o, &t, &w, 0.f, 0.f, NULL) != QKV_OK) {
        fprintf(stderr, "%s\n", qkv_last_error());
        return 1;
    }
    printf("%s %f\n", qkv_context_device_name(ctx), (double)out[3]);
    qkv_context_destroy(ctx);
    return fabs((double)out[3] - 4 / sqrt(7.5)) < 1e-6 ? 0 : 1;
}
