/* attention_ref.c - each request alone: gather its keys and values as doubles, then row by row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_ref.h"

#include <stdbool.h>

#include "support.h"

enum { MAX_DIM = 512, LANES = 8 };

/* Vectors of keys and values are filled up with zeros to whole `lanes`: sanitizers check each access, so eight elements
 * with one are several times as fast. */
typedef double lanes __attribute__((vector_size(LANES * sizeof(double)), aligned(8), may_alias));
typedef int64_t lane_bits __attribute__((vector_size(LANES * sizeof(int64_t))));

/* The batch, and the layer's parameters after the overrides. */
typedef struct layer {
    const qkv_attention_spec *spec;
    const qkv_attention_batch *batch;
    const qkv_attention_io *io;
    double sm_scale, soft_cap; /* soft_cap 0 = none */
    int64_t window_left, window_right;
    int partner[MAX_DIM];      /* the other element of a rotated pair; itself = not rotated */
    double frequency[MAX_DIM]; /* of a rotated pair, at its first element                   */
} layer;

/* One request, its keys and values as the formula sees them. */
typedef struct request {
    int64_t number, row_begin, qo_len, first_position;
    int64_t num_keys, num_shared; /* over all levels; in all but the last */
    int64_t first_block;          /* BSR: the number of its first row block */
    double *k, *v;                /* [kv_head][key][filled(dim)] */
    double *k_lengths;            /* as k, of rotated pairs; NULL without a rotation */
    double *v_max;                /* [kv_head][key], of sizes of the key's values */
} request;

static void *allocate(int64_t n, size_t bytes)
{
    void *p = calloc((size_t)(n > 0 ? n : 1), bytes);
    if (!p) abort();
    return p;
}

static int64_t filled(int64_t dim)
{
    return (dim + LANES - 1) / LANES * LANES;
}

/* ---- tensors ------------------------------------------------------------------------------ */

/* Element i0 * strides[0] + ... of a tensor; absent strides are contiguous. */
static int64_t stride_of(const DLTensor *t, int axis)
{
    if (t->strides) return t->strides[axis];
    int64_t stride = 1;
    for (int i = t->ndim - 1; i > axis; i--) stride *= t->shape[i];
    return stride;
}

static const void *data_of(const DLTensor *t)
{
    return (const char *)t->data + t->byte_offset;
}

static double element(const DLTensor *t, int64_t offset)
{
    return test_get(data_of(t), t->dtype, offset);
}

static int32_t index_at(const DLTensor *t, int64_t offset)
{
    return ((const int32_t *)data_of(t))[offset];
}

/* Bit i from byte `first` on, the lowest of a byte first. */
static bool bit_at(const DLTensor *t, int64_t first, int64_t i)
{
    return ((const uint8_t *)data_of(t))[first + i / 8] >> i % 8 & 1;
}

static double scale_at(const qkv_scale *s, int64_t head)
{
    if (s->tensor) return element(s->tensor, s->tensor->shape[0] > 1 ? head : 0);
    return s->value > 0 ? (double)s->value : 1;
}

/* ---- where keys are ----------------------------------------------------------------------- */

static const qkv_kv_index *level_at(const qkv_attention_batch *batch, int64_t level)
{
    const char *first = (const char *)batch->levels;
    return (const void *)(first + level * (int64_t)batch->levels->struct_size);
}

static const qkv_kv_index *last_level(const qkv_attention_batch *batch)
{
    return level_at(batch, batch->num_levels - 1);
}

/* The group of a level that has this row. */
static int64_t group_of(const qkv_kv_index *index, int64_t row)
{
    int64_t group = 0;
    while (index_at(index->qo_indptr, group + 1) <= row) group++;
    return group;
}

static int64_t num_keys_of(const qkv_attention_spec *spec, const qkv_kv_index *index, int64_t group)
{
    if (index->block_table) return index_at(index->kv_lens, group);
    const int64_t n = index_at(index->kv_indptr, group + 1) - index_at(index->kv_indptr, group);
    if (spec->page_size == 0) return n;
    return n ? (n - 1) * spec->page_size + index_at(index->kv_last_page_len, group) : 0;
}

/* The page (paged) or token (ragged) that holds a group's key. */
static int64_t page_of(const qkv_attention_spec *spec, const qkv_kv_index *index, int64_t group,
                       int64_t key)
{
    if (spec->page_size == 0) return index_at(index->kv_indptr, group) + key;
    const int64_t page = key / spec->page_size;
    if (index->block_table)
        return index_at(index->block_table, group * stride_of(index->block_table, 0) + page);
    return index_at(index->kv_indices, index_at(index->kv_indptr, group) + page);
}

/* Where a key of k or v begins. combined: the tensor holds both; second: the V half is meant. */
static int64_t key_offset(const qkv_attention_spec *spec, const DLTensor *t, bool combined,
                          bool second, int64_t page, int64_t slot, int64_t head)
{
    const bool paged = spec->page_size > 0, nhd = spec->kv_layout == QKV_NHD;
    if (!paged) return page * stride_of(t, nhd ? 0 : 1) + head * stride_of(t, nhd ? 1 : 0);
    const int first = combined ? 2 : 1; /* the first axis inside a page */
    return page * stride_of(t, 0) + (combined && second ? stride_of(t, 1) : 0) +
           slot * stride_of(t, nhd ? first : first + 1) +
           head * stride_of(t, nhd ? first + 1 : first);
}

/* All keys or values of a request, [kv_head][key][filled(dim)], level after level. */
static double *gather(const layer *l, const request *r, bool values)
{
    const qkv_attention_spec *s = l->spec;
    const bool combined = !l->io->v && s->page_size > 0;
    const DLTensor *t = values && !combined ? l->io->v : l->io->k;
    const qkv_scale *scale = values ? &l->io->v_scale : &l->io->k_scale;
    const int64_t dim = values ? s->head_dim_vo : s->head_dim_qk;
    double *out = allocate(r->num_keys * s->num_kv_heads * filled(dim), sizeof *out);
    int64_t first = 0;
    for (int64_t level = 0; level < l->batch->num_levels; level++) {
        const qkv_kv_index *index = level_at(l->batch, level);
        const int64_t group =
            level == l->batch->num_levels - 1 ? r->number : group_of(index, r->row_begin);
        const int64_t n = num_keys_of(s, index, group);
        for (int64_t j = 0; j < n; j++) {
            const int64_t page = page_of(s, index, group, j);
            const int64_t slot = s->page_size > 0 ? j % s->page_size : 0;
            for (int64_t h = 0; h < s->num_kv_heads; h++) {
                const int64_t at = key_offset(s, t, combined, values, page, slot, h);
                const double factor = scale_at(scale, h);
                double *key = out + (h * r->num_keys + first + j) * filled(dim);
                for (int64_t d = 0; d < dim; d++) key[d] = element(t, at + d) * factor;
            }
        }
        first += n;
    }
    return out;
}

/* ---- rotation: qkv/rope.h ----------------------------------------------------------------- */

static double frequency(const qkv_rope_spec *s, int64_t rotary_dim, int64_t i)
{
    const double theta = s->theta > 0 ? (double)s->theta : 10000;
    const double scale = s->scale > 0 ? (double)s->scale : 1;
    const double low = (double)s->low_freq, high = (double)s->high_freq;
    const double old = (double)s->old_context;
    const double freq = pow(theta, -2 * (double)i / (double)rotary_dim);
    if (low <= 0 && high <= 0) return freq / scale;
    const double w = 2 * acos(-1) / freq;
    if (w < old / high) return freq;
    if (w > old / low) return freq / scale;
    const double smooth = (old / w - low) / (high - low);
    return (1 - smooth) * freq / scale + smooth * freq;
}

static void set_rotation(layer *l)
{
    const qkv_rope_spec *s = l->spec->rope;
    for (int d = 0; d < MAX_DIM; d++) l->partner[d] = d;
    if (!(l->spec->features & QKV_FEATURE_ROPE)) return;
    const int rotary_dim = s->rotary_dim ? s->rotary_dim : l->spec->head_dim_qk;
    for (int i = 0; i < rotary_dim / 2; i++) {
        const int x = s->interleaved ? 2 * i : i;
        const int y = s->interleaved ? 2 * i + 1 : i + rotary_dim / 2;
        l->partner[x] = y;
        l->partner[y] = x;
        l->frequency[x] = frequency(s, rotary_dim, i);
    }
}

static void rotate(const layer *l, double *vector, int64_t position)
{
    for (int d = 0; d < l->spec->head_dim_qk; d++) {
        const int other = l->partner[d];
        if (other <= d) continue; /* the second of its pair, or alone */
        const double x = vector[d], y = vector[other];
        const double angle = (double)position * l->frequency[d];
        vector[d] = x * cos(angle) - y * sin(angle);
        vector[other] = x * sin(angle) + y * cos(angle);
    }
}

/* Of each element's pair, or of the element alone. */
static void set_lengths(const layer *l, const double *vector, double *lengths)
{
    for (int d = 0; d < l->spec->head_dim_qk; d++) {
        const double x = vector[d], y = l->partner[d] == d ? 0 : vector[l->partner[d]];
        lengths[d] = sqrt(x * x + y * y);
    }
}

/* ---- one row ------------------------------------------------------------------------------ */

/* The custom mask speaks of the last level's keys. */
static bool mask_allows(const layer *l, const request *r, int64_t row, int64_t key)
{
    if (l->spec->mask != QKV_MASK_CUSTOM || key < r->num_shared) return true;
    const int64_t first =
        ((const int64_t *)data_of(l->batch->mask_indptr))[r->number]; /* in bytes */
    const int64_t num_own = r->num_keys - r->num_shared;
    return bit_at(l->batch->mask_bits, first, row * num_own + key - r->num_shared);
}

static bool block_allows(const layer *l, const request *r, int64_t row, int64_t key,
                         int64_t kv_head)
{
    const qkv_kv_index *index = last_level(l->batch);
    if (!index->bsr_indptr) return true;
    const int64_t rows = index->bsr_rows, cols = index->bsr_cols;
    const int64_t list = index->bsr_indptr->shape[0] > 1 ? kv_head : 0;
    const int64_t at =
        list * stride_of(index->bsr_indptr, 0) + r->first_block + row / rows; /* in bsr_indptr */
    for (int64_t b = index_at(index->bsr_indptr, at); b < index_at(index->bsr_indptr, at + 1); b++)
        if (index_at(index->bsr_indices, b) == key / cols)
            return !index->bsr_mask || bit_at(index->bsr_mask, b * stride_of(index->bsr_mask, 0),
                                              row % rows * cols + key % cols);
    return false;
}

static bool visible(const layer *l, const request *r, int64_t row, int64_t key, int64_t kv_head)
{
    const int64_t position = r->first_position + row;
    if (l->spec->mask == QKV_MASK_CAUSAL && key > position) return false;
    if (l->window_left >= 0 && key < position - l->window_left) return false;
    if (l->window_right >= 0 && key > position + l->window_right) return false;
    return mask_allows(l, r, row, key) && block_allows(l, r, row, key, kv_head);
}

static double sum_of(const lanes *x)
{
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += (*x)[i];
    return sum;
}

/* Without their signs. */
#define SIZES(x) ((lanes)((lane_bits)(x)&INT64_MAX))

/* *size: the sum of |a_i b_i|. */
static double dot(int64_t dim, const double *a, const double *b, double *size)
{
    lanes sum = {0}, sum_of_sizes = {0};
    for (int64_t i = 0; i < dim; i += LANES) {
        const lanes product = *(const lanes *)(a + i) * *(const lanes *)(b + i);
        sum += product;
        sum_of_sizes += SIZES(product);
    }
    *size = sum_of(&sum_of_sizes);
    return sum_of(&sum);
}

/* Logits of the visible keys. */
static void logits_of(const layer *l, const request *r, const double *q, const double *q_lengths,
                      int64_t row, int64_t head, const bool *sees, double *x,
                      attention_ref_row *out)
{
    const int64_t dim = l->spec->head_dim_qk;
    const int64_t kv_head = head / (l->spec->num_qo_heads / l->spec->num_kv_heads);
    const double slope = l->io->alibi_slopes ? element(l->io->alibi_slopes, head) : 0;
    for (int64_t j = 0; j < r->num_keys; j++) {
        if (!sees[j]) continue;
        const int64_t at = (kv_head * r->num_keys + j) * filled(dim);
        double size;
        x[j] = dot(dim, q, r->k + at, &size) * l->sm_scale;
        if (r->k_lengths) dot(dim, q_lengths, r->k_lengths + at, &size);
        out->max_dot = fmax(out->max_dot, size * l->sm_scale);
        out->max_logit = fmax(out->max_logit, fabs(x[j]));
        if (l->soft_cap > 0) x[j] = l->soft_cap * tanh(x[j] / l->soft_cap);
        const double bias = slope * (double)(j - (r->first_position + row));
        out->max_bias = fmax(out->max_bias, fabs(bias));
        x[j] += bias;
        out->num_keys++;
    }
}

/* o: the weighted values; and their sizes. */
static void add_values(const layer *l, const request *r, int64_t kv_head, const bool *sees,
                       const double *weights, double o_scale, double *o, attention_ref_row *out)
{
    const int64_t vo = l->spec->head_dim_vo, n = filled(vo) / LANES;
    lanes sums[MAX_DIM / LANES] = {0}, means[MAX_DIM / LANES] = {0}, squares[MAX_DIM / LANES] = {0};
    for (int64_t j = 0; j < r->num_keys; j++) {
        if (!sees[j]) continue;
        const lanes *v = (const lanes *)(r->v + (kv_head * r->num_keys + j) * filled(vo));
        const double w = weights[j] / o_scale;
        out->max_v = fmax(out->max_v, r->v_max[kv_head * r->num_keys + j] / o_scale);
        for (int64_t i = 0; i < n; i++) {
            const lanes wv = w * v[i];
            sums[i] += wv;
            means[i] += SIZES(wv);
            squares[i] += wv * wv;
        }
    }
    for (int64_t d = 0; d < vo; d++) {
        const int64_t i = d / LANES, lane = d % LANES;
        o[d] = sums[i][lane];
        out->mean_v = fmax(out->mean_v, means[i][lane]);
        out->rms_v = fmax(out->rms_v, sqrt(squares[i][lane]));
    }
}

/* One query row of one head, q already scaled and rotated; x and sees: room for each key. */
static attention_ref_row row_of(const layer *l, const request *r, const double *q,
                                const double *q_lengths, int64_t row, int64_t head, bool *sees,
                                double *x, double *o)
{
    const int64_t kv_head = head / (l->spec->num_qo_heads / l->spec->num_kv_heads);
    const double sink = l->io->sink ? element(l->io->sink, head) : (double)-INFINITY;
    attention_ref_row out = {.lse = (double)-INFINITY};
    for (int64_t d = 0; d < l->spec->head_dim_vo; d++) o[d] = 0;
    for (int64_t j = 0; j < r->num_keys; j++) sees[j] = visible(l, r, row, j, kv_head);
    logits_of(l, r, q, q_lengths, row, head, sees, x, &out);

    double max = sink;
    for (int64_t j = 0; j < r->num_keys; j++)
        if (sees[j]) max = fmax(max, x[j]);
    if (isinf(max)) return out; /* neither a key nor a sink */
    double sum = exp(sink - max);
    for (int64_t j = 0; j < r->num_keys; j++)
        if (sees[j]) sum += exp(x[j] - max);
    if (!isinf(sink)) out.sink = fabs(sink) * exp(sink - max) / sum;
    out.lse = max + log(sum);
    if (l->spec->flags & QKV_ATTENTION_LSE_BASE_2) out.lse /= log(2);

    for (int64_t j = 0; j < r->num_keys; j++)
        if (sees[j]) x[j] = exp(x[j] - max) / sum;
    add_values(l, r, kv_head, sees, x, scale_at(&l->io->o_scale, head), o, &out);
    return out;
}

/* ---- the layer ---------------------------------------------------------------------------- */

static layer layer_of(const qkv_attention_spec *spec, const qkv_attention_batch *batch,
                      const qkv_attention_io *io)
{
    const bool window = spec->features & QKV_FEATURE_WINDOW;
    layer l = {.spec = spec,
               .batch = batch,
               .io = io,
               .window_left = window ? spec->window_left : -1,
               .window_right = window ? spec->window_right : -1};
    l.sm_scale = io->sm_scale > 0     ? (double)io->sm_scale
                 : spec->sm_scale > 0 ? (double)spec->sm_scale
                                      : 1 / sqrt((double)spec->head_dim_qk);
    if (spec->features & QKV_FEATURE_SOFT_CAP)
        l.soft_cap =
            io->logits_soft_cap > 0 ? (double)io->logits_soft_cap : (double)spec->logits_soft_cap;
    if (io->set_window) l.window_left = io->window_left, l.window_right = io->window_right;
    set_rotation(&l);
    return l;
}

/* Lengths and positions of a request that has rows. */
static request request_of(const layer *l, int64_t number)
{
    const qkv_kv_index *own = last_level(l->batch);
    request r = {.number = number, .row_begin = index_at(own->qo_indptr, number)};
    r.qo_len = index_at(own->qo_indptr, number + 1) - r.row_begin;
    for (int64_t level = 0; level < l->batch->num_levels - 1; level++) {
        const qkv_kv_index *index = level_at(l->batch, level);
        r.num_shared += num_keys_of(l->spec, index, group_of(index, r.row_begin));
    }
    r.num_keys = r.num_shared + num_keys_of(l->spec, own, number);
    r.first_position =
        l->batch->qo_pos ? index_at(l->batch->qo_pos, number) : r.num_keys - r.qo_len;
    for (int64_t i = 0; own->bsr_indptr && i < number; i++) {
        const int64_t rows = index_at(own->qo_indptr, i + 1) - index_at(own->qo_indptr, i);
        r.first_block += (rows + own->bsr_rows - 1) / own->bsr_rows;
    }
    return r;
}

void attention_ref(const qkv_attention_spec *spec, const qkv_attention_batch *batch,
                   const qkv_attention_io *io, double *o, attention_ref_row *rows)
{
    const layer l = layer_of(spec, batch, io);
    const int64_t heads = spec->num_qo_heads, qk = spec->head_dim_qk, vo = spec->head_dim_vo;
    const DLTensor *qo_indptr = last_level(batch)->qo_indptr;
    double q[MAX_DIM] = {0}, q_lengths[MAX_DIM] = {0};
    for (int64_t number = 0; number + 1 < qo_indptr->shape[0]; number++) {
        if (index_at(qo_indptr, number) == index_at(qo_indptr, number + 1)) continue;
        request r = request_of(&l, number);
        r.k = gather(&l, &r, false);
        r.v = gather(&l, &r, true);
        const int64_t num_vectors = spec->num_kv_heads * r.num_keys;
        const bool rotates = spec->features & QKV_FEATURE_ROPE;
        if (rotates) r.k_lengths = allocate(num_vectors * filled(qk), sizeof *r.k_lengths);
        for (int64_t i = 0; rotates && i < num_vectors; i++) {
            rotate(&l, r.k + i * filled(qk), i % r.num_keys);
            set_lengths(&l, r.k + i * filled(qk), r.k_lengths + i * filled(qk));
        }
        r.v_max = allocate(num_vectors, sizeof *r.v_max);
        for (int64_t i = 0; i < num_vectors * filled(vo); i++)
            r.v_max[i / filled(vo)] = fmax(r.v_max[i / filled(vo)], fabs(r.v[i]));
        double *x = allocate(r.num_keys, sizeof *x);
        bool *sees = allocate(r.num_keys, sizeof *sees);
        for (int64_t row = 0; row < r.qo_len; row++) {
            for (int64_t h = 0; h < heads; h++) {
                const int64_t token = r.row_begin + row;
                const int64_t at = token * stride_of(io->q, 0) + h * stride_of(io->q, 1);
                for (int64_t d = 0; d < qk; d++)
                    q[d] = element(io->q, at + d) * scale_at(&io->q_scale, h);
                rotate(&l, q, r.first_position + row);
                set_lengths(&l, q, q_lengths);
                rows[token * heads + h] =
                    row_of(&l, &r, q, q_lengths, row, h, sees, x, o + (token * heads + h) * vo);
            }
        }
        free(x), free(sees), free(r.k), free(r.v), free(r.k_lengths), free(r.v_max);
    }
}
