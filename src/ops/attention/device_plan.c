/* device_plan.c - host side of the planner on the device: hands it the batch, and reads what it found.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention.h"
#include "ops/attention/plan_params.h"

qkv_status qi_attention_cuda_plan(qkv_attention *a, const batch_view *batch, void *stream)
{
    const qkv_attention_limits *l = &a->limits;
    plan_params p = {
        .batch = *batch,
        .limits = a->schedule,
        .plan = a->cuda.plan,
        .mask_indptr = qi_attention_on_device(a, a->mask_indptr),
        .spans = qi_attention_on_device(a, a->spans),
        .strips = qi_attention_on_device(a, a->strips),
        .max_tokens = batch->max_tokens,
        .max_qo_len = l->max_qo_len,
        .max_kv_len = l->max_kv_len,
        .max_pages = l->max_pages,
    };
    p.batch.pages_at = (i64)(uintptr_t)a->cuda.plan.pages;
    const qi_grid grid = {.x = 1, .threads = PLAN_THREADS};
    a->cuda.run_is_behind = 0;
    a->cuda.captured_run_is_behind = NULL;
    return qi_cuda_launch(&a->ctx->cuda, a->cuda.planner, &grid, &p, stream);
}

/* What a fault is called: the array, and what is expected of it. */
static const struct {
    const char *array, *expected;
} faults[] = {
    [QI_PLAN_QO_INDPTR] = {"qo_indptr", "entries from 0 on that do not fall"},
    [QI_PLAN_MAX_TOKENS] = {"qo_indptr", "at most max_tokens rows"},
    [QI_PLAN_MAX_QO_LEN] = {"qo_indptr", "at most max_qo_len rows a request"},
    [QI_PLAN_KV_INDPTR] = {"kv_indptr", "entries >= 0 that do not fall"},
    [QI_PLAN_KV_INDICES] = {"kv_indices", "as many entries as kv_indptr says"},
    [QI_PLAN_LAST_PAGE_LEN] = {"kv_last_page_len", "1 to page_size"},
    [QI_PLAN_KV_LENS] = {"kv_lens", ">= 0"},
    [QI_PLAN_COLUMNS] = {"kv_lens", "at most what the columns of block_table hold"},
    [QI_PLAN_MAX_KV_LEN] = {"levels", "at most max_kv_len keys a request"},
    [QI_PLAN_MAX_PAGES] = {"levels", "at most max_pages pages in use"},
    [QI_PLAN_MASK_INDPTR] = {"mask_indptr", "a byte for every 8 (row, key) from an offset >= 0 on"},
    [QI_PLAN_MASK_BITS] = {"mask_bits", "as many bytes as mask_indptr says"},
    [QI_PLAN_NESTING] = {"qo_indptr", "a group to end where one of the next level does"},
    [QI_PLAN_ALL_LEVELS] = {"levels", "at most max_kv_len keys a request over all levels"},
    [QI_PLAN_SPLIT_ROWS] = {"max_split_rows", "as many partial rows as this batch needs"},
};

qkv_status qkv_attention_status(qkv_attention *attention, void *stream)
{
    qkv_attention *a = attention;
    QI_REQUIRE(a, "attention: expected an operator, got NULL");
    QI_REQUIRE_CONTEXT(a->ctx);
    QI_REQUIRE(a->planned, "attention: expected a plan, got none");
    if (!a->on_device) return QKV_OK; /* a host plan would have failed */
    const qi_cuda_device *device = &a->ctx->cuda;
    int capturing;
    QI_TRY(qi_cuda_capturing(device, stream, &capturing));
    QI_REQUIRE(!capturing, "stream: expected one that is not being captured");
    QI_TRY(qi_cuda_copy(device, a->found, a->cuda.plan.header, sizeof *a->found, stream));
    QI_TRY(qi_cuda_wait(device, stream));
    const int fault = a->found->status / 256, level = a->found->status % 256;
    const int request = a->found->status_request;
    if (fault == QI_PLAN_OK) return QKV_OK;
    if (request < 0)
        QI_FAIL(QKV_ERR_INVALID, "%s: expected %s (on the device)", faults[fault].array,
                faults[fault].expected);
    QI_FAIL(QKV_ERR_INVALID, "%s: expected %s (request %d of level %d, on the device)",
            faults[fault].array, faults[fault].expected, request, level);
}
