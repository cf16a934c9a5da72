/* tensor.c - checks and address arithmetic over DLTensor.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/tensor.h"

#include <stdio.h>

/* "[2, *, 64]" into text. */
static void shape_text(char *text, size_t bytes, int ndim, const int64_t *shape)
{
    size_t at = (size_t)snprintf(text, bytes, "[");
    for (int i = 0; i < ndim && at + 24 < bytes; i++) {
        const char *comma = i ? ", " : "";
        if (shape[i] == QI_ANY)
            at += (size_t)snprintf(text + at, bytes - at, "%s*", comma);
        else
            at += (size_t)snprintf(text + at, bytes - at, "%s%lld", comma, (long long)shape[i]);
    }
    snprintf(text + at, bytes - at, "]");
}

/* More axes than any tensor here has: ndim is not to be trusted, nor that shape has as many. */
#define MAX_NDIM 8

/* What a tensor of another shape has. */
static void wrong_shape_text(char *text, size_t bytes, const DLTensor *t)
{
    if (t->ndim < 0 || t->ndim > MAX_NDIM)
        snprintf(text, bytes, "ndim %d", (int)t->ndim);
    else if (!t->shape && t->ndim > 0)
        snprintf(text, bytes, "NULL");
    else
        shape_text(text, bytes, t->ndim, t->shape);
}

/* Elements, and elements that strides span: so few that their bytes can be counted, and work on them
 * too. */
#define MAX_SPAN (INT64_MAX / 16)

static _Thread_local DLDevice here = {kDLCPU, 0};

void qi_tensors_on(DLDevice device)
{
    here = device;
}

int qi_host_reads(void)
{
    return here.device_type == kDLCPU;
}

/* On the CPU, pinned memory is memory; a GPU reads that, and managed memory, where it is. */
static qkv_status expect_here(const DLTensor *t, const char *name)
{
    const DLDeviceType type = t->device.device_type;
    if (here.device_type == kDLCPU) {
        QI_REQUIRE(type == kDLCPU || type == kDLCUDAHost || type == kDLCUDAManaged,
                   "%s: expected a tensor on the CPU, got device type %d", name, (int)type);
        return QKV_OK;
    }
    QI_REQUIRE((type == kDLCUDA && t->device.device_id == here.device_id) || type == kDLCUDAHost ||
                   type == kDLCUDAManaged,
               "%s: expected a tensor on CUDA device %d, got device type %d, device_id %d", name,
               (int)here.device_id, (int)type, (int)t->device.device_id);
    return QKV_OK;
}

/* contiguous: so must the last axis be. */
static qkv_status expect_layout(const DLTensor *t, const char *name, int ndim, const int64_t *shape,
                                int contiguous)
{
    QI_TRY(expect_here(t, name));
    int match = t->ndim == ndim && (t->shape || ndim == 0);
    for (int i = 0; match && i < ndim; i++)
        match = t->shape[i] >= 0 && (shape[i] == QI_ANY || shape[i] == t->shape[i]);
    if (!match) {
        char want[160], got[160];
        shape_text(want, sizeof want, ndim, shape);
        wrong_shape_text(got, sizeof got, t);
        QI_FAIL(QKV_ERR_INVALID, "%s: expected shape %s, got %s", name, want, got);
    }
    int64_t span = 1, numel = 1;
    int empty = 0;
    for (int i = ndim - 1; i >= 0; i--) {
        empty |= t->shape[i] == 0;
        const int64_t n = t->shape[i] > 0 ? t->shape[i] : 1; /* the others must be in bounds too */
        const int64_t stride = t->strides ? t->strides[i] : numel;
        int64_t reach;
        QI_REQUIRE(stride >= 0 && !__builtin_mul_overflow(n - 1, stride, &reach) &&
                       !__builtin_add_overflow(span, reach, &span) && span <= MAX_SPAN &&
                       !__builtin_mul_overflow(numel, n, &numel) && numel <= MAX_SPAN,
                   "%s: expected sizes and strides within 59 bits and not negative, got size %lld, "
                   "stride %lld on axis %d",
                   name, (long long)t->shape[i], (long long)stride, i);
    }
    QI_REQUIRE(t->byte_offset <= MAX_SPAN, "%s: expected a byte_offset within 59 bits, got %llu",
               name, (unsigned long long)t->byte_offset);
    if (empty) return QKV_OK;
    QI_REQUIRE(t->data, "%s: expected data, got NULL", name);
    QI_REQUIRE(!contiguous || ndim == 0 || !t->strides || t->shape[ndim - 1] == 1 ||
                   t->strides[ndim - 1] == 1,
               "%s: expected a contiguous last axis, got stride %lld", name,
               (long long)t->strides[ndim - 1]);
    const size_t bytes = t->dtype.bits / 8u;
    QI_REQUIRE(bytes == 0 || (uintptr_t)qi_data(t) % bytes == 0,
               "%s: expected data aligned to its elements of %zu bytes, got %p", name, bytes,
               qi_data(t));
    return QKV_OK;
}

static qkv_status expect_dtype(const DLTensor *t, const char *name, DLDataType dtype)
{
    QI_REQUIRE(t, "%s: expected a tensor, got NULL", name);
    QI_REQUIRE(
        t->dtype.code == dtype.code && t->dtype.bits == dtype.bits && t->dtype.lanes == dtype.lanes,
        "%s: expected dtype %s, got %s", name, qi_dtype_name(dtype), qi_dtype_name(t->dtype));
    return QKV_OK;
}

qkv_status qi_expect(const DLTensor *t, const char *name, DLDataType dtype, int ndim,
                     const int64_t *shape)
{
    QI_TRY(expect_dtype(t, name, dtype));
    return expect_layout(t, name, ndim, shape, 1);
}

qkv_status qi_expect_strided(const DLTensor *t, const char *name, DLDataType dtype, int ndim,
                             const int64_t *shape)
{
    QI_TRY(expect_dtype(t, name, dtype));
    return expect_layout(t, name, ndim, shape, 0);
}

qkv_status qi_expect_float(const DLTensor *t, const char *name, int ndim, const int64_t *shape)
{
    QI_REQUIRE(t, "%s: expected a tensor, got NULL", name);
    QI_REQUIRE(qi_is_float(t->dtype), "%s: expected dtype f32, f16 or bf16, got %s", name,
               qi_dtype_name(t->dtype));
    return expect_layout(t, name, ndim, shape, 1);
}

int64_t qi_stride(const DLTensor *t, int axis)
{
    if (t->strides) return t->strides[axis];
    int64_t stride = 1;
    for (int i = t->ndim - 1; i > axis; i--) stride *= t->shape[i];
    return stride;
}

/* Of the axes with more than one index that are not in done: the one of the smallest stride, or -1. */
static int finest_axis(const DLTensor *t, unsigned done)
{
    int finest = -1;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] > 1 && !(done >> i & 1) &&
            (finest < 0 || qi_stride(t, i) < qi_stride(t, finest)))
            finest = i;
    return finest;
}

qkv_status qi_expect_distinct(const DLTensor *t, const char *name)
{
    if (qi_numel(t) == 0) return QKV_OK;
    int64_t span = 1; /* of the axes that are done */
    unsigned done = 0;
    for (int axis; (axis = finest_axis(t, done)) >= 0; done |= 1u << axis) {
        const int64_t stride = qi_stride(t, axis);
        QI_REQUIRE(stride >= span,
                   "%s: expected elements apart from each other, got stride %lld on axis %d where "
                   "the finer axes span %lld elements",
                   name, (long long)stride, axis, (long long)span);
        span += (t->shape[axis] - 1) * stride;
    }
    return QKV_OK;
}

int64_t qi_numel(const DLTensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

/* 0 where an axis has one index: its stride may be any number. */
static int64_t stride_bytes(const DLTensor *t, int axis)
{
    return t->shape[axis] > 1 ? qi_stride(t, axis) * (t->dtype.bits / 8) : 0;
}

/* Bytes from the first element to past the last one, leaving out axes that step by whole pitches
 * (pitch 0: none). */
static int64_t span_bytes(const DLTensor *t, int64_t pitch)
{
    int64_t last = 0;
    for (int i = 0; i < t->ndim; i++)
        if (pitch == 0 || stride_bytes(t, i) % pitch != 0)
            last += (t->shape[i] - 1) * stride_bytes(t, i);
    return last + t->dtype.bits / 8;
}

/* Modulo a pitch of either, each lies in one run of bytes: where the runs are apart, so are they. */
static int apart_by_a_pitch_of(const DLTensor *t, const DLTensor *a, const DLTensor *b)
{
    for (int i = 0; i < t->ndim; i++) {
        const int64_t pitch = stride_bytes(t, i);
        if (pitch == 0) continue;
        const int64_t distance = (const char *)qi_data(b) - (const char *)qi_data(a);
        const int64_t shift = (distance % pitch + pitch) % pitch;
        if (shift >= span_bytes(a, pitch) && shift + span_bytes(b, pitch) <= pitch) return 1;
    }
    return 0;
}

int qi_overlap(const DLTensor *a, const DLTensor *b)
{
    if (qi_numel(a) == 0 || qi_numel(b) == 0) return 0;
    const char *a0 = qi_data(a), *b0 = qi_data(b);
    if (a0 >= b0 + span_bytes(b, 0) || b0 >= a0 + span_bytes(a, 0)) return 0;
    return !apart_by_a_pitch_of(a, a, b) && !apart_by_a_pitch_of(b, a, b);
}

int qi_same(const DLTensor *a, const DLTensor *b)
{
    if (qi_data(a) != qi_data(b) || a->ndim != b->ndim || a->dtype.code != b->dtype.code ||
        a->dtype.bits != b->dtype.bits)
        return 0;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && qi_stride(a, i) != qi_stride(b, i)))
            return 0;
    return 1;
}
