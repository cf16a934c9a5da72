/* test_hopper.c - kern/cuda/tma.cuh and mma_sm90.cuh on a GPU of compute capability 9.0: products of tiles that are
 * copied, swizzled, through a ring of barriers; copies; what the driver refuses to encode. On the emulated GPU also
 * that it finds what a kernel does wrong. A process of its own runs each kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#include "gpu_process.h"
#include "hopper_params.h"

/* ---- kernels -------------------------------------------------------------------------------- */

enum { NOT_HOPPER = FAILED + 1 }; /* of a process */

enum { HEADS = 3, HEAD = 1, QUERIES = 128, MAX_THREADS = 384 };

typedef struct config {
    const char *type;
    int tile, head_dim, stages, wrong;
} config;

static const config configs[] = {
    {"bf16", 80, 128, 2, NOTHING},        {"f16", 64, 256, 2, NOTHING},
    {"bf16", 96, 192, 1, NOTHING},        {"f16", 128, 64, 3, NOTHING},
    {"bf16", 80, 128, 2, FORGETS_FULL},   {"bf16", 80, 128, 2, FORGETS_EMPTY},
    {"bf16", 80, 128, 2, FORGETS_WAIT},   {"bf16", 80, 128, 2, FORGETS_COMMIT},
    {"bf16", 80, 128, 2, RELEASES_EARLY},
};
enum { NUM_RIGHT = 4, NUM_CONFIGS = sizeof configs / sizeof configs[0] };

static void *images[NUM_CONFIGS]; /* NULL: not compiled yet */

/* The kernel of configuration i, compiled at its first use in a process. */
static void *image_of(int i)
{
    char level[QI_ARCH_BYTES], defines[256];
    if (images[i]) return images[i];
    qi_nvrtc_level(qi_nvrtc_find(0), 9, 0, level);
    snprintf(defines, sizeof defines,
             "#define TYPE %s\n#define TILE %d\n#define HEAD_DIM %d\n#define STAGES %d\n"
             "#define WRONG %d\n",
             configs[i].type, configs[i].tile, configs[i].head_dim, configs[i].stages,
             configs[i].wrong);
    images[i] = compile_kernels("hopper.cu", "hopper_params.h", level, defines);
    return images[i];
}

/* Once for all processes on the emulated GPU, whose compiler is slow. NVIDIA's may open the driver, after which no
 * process that forks off can. */
static int compile_all(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_CONFIGS && test_is_emulated(); i++) image_of(i);
    return 0;
}

/* ---- in a process: maps, launches -------------------------------------------------------------- */

enum { SWIZZLE_NONE, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B };
enum { TYPE_U8, TYPE_U16, RANK = 4 };

/* The driver's arguments. */
typedef struct encoding {
    qi_tensor_map *map;
    int type;
    u32 rank;
    void *base;
    u64 dims[5], strides[4];
    u32 box[5], steps[5];
    int interleave, swizzle, l2_promotion, fill;
} encoding;

static int encode(encoding e)
{
    int (*function)(qi_tensor_map *, int, u32, void *, const u64 *, const u64 *, const u32 *,
                    const u32 *, int, int, int, int);
    *(void **)&function = test_driver("cuTensorMapEncodeTiled");
    return function(e.map, e.type, e.rank, e.base, e.dims, e.strides, e.box, e.steps, e.interleave,
                    e.swizzle, e.l2_promotion, e.fill);
}

/* Rows of 128 bytes of tokens of one head, of an array [tokens, HEADS, head_dim] of 2-byte elements, or 1-byte ones, on the
 * device. */
static void encode_rows(qi_tensor_map *map, const void *base, int bytes, int tokens, int head_dim,
                        int rows)
{
    const u64 row = (u64)(head_dim * bytes);
    MUST(encode((encoding){.map = map,
                           .type = bytes == 1 ? TYPE_U8 : TYPE_U16,
                           .rank = RANK,
                           .base = (void *)(uintptr_t)base,
                           .dims = {(u64)head_dim, HEADS, (u64)tokens, 1},
                           .strides = {row, HEADS * row, (u64)tokens * HEADS * row},
                           .box = {128 / (u32)bytes, 1, (u32)rows, 1},
                           .steps = {1, 1, 1, 1},
                           .swizzle = SWIZZLE_128B}));
}

/* The result of a launch of one block and of what follows. */
static int launch(int image, const char *name, int threads, int shared, hopper_params *params)
{
    cu_library library;
    cu_kernel kernel;
    cu_function function;
    MUST(qi_cuda.library_load(&library, image_of(image), NULL, NULL, 0, NULL, NULL, 0));
    MUST(qi_cuda.library_kernel(&kernel, library, name));
    MUST(qi_cuda.kernel_function(&function, kernel));
    MUST(qi_cuda.function_set(function, CU_FUNCTION_MAX_DYNAMIC_SHARED_BYTES, shared));
    const cu_launch_config c = {
        .grid = {1, 1, 1}, .block = {(u32)threads, 1, 1}, .shared_bytes = (u32)shared};
    void *arguments[] = {params};
    const int result = qi_cuda.launch(&c, function, arguments, NULL);
    return result ? result : qi_cuda.stream_synchronize(NULL);
}

/* ---- products ----------------------------------------------------------------------------------- */

typedef struct product_case {
    int config, num_tiles, keys;
} product_case;

/* Small whole numbers, of which all sums are exact. */
static float *random_numbers(int64_t n, int most)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(test_below(2 * most + 1) - most);
    return x;
}

static void *upload(const float *x, int64_t n, bool bf16)
{
    uint16_t *bits = malloc((size_t)n * sizeof *bits);
    for (int64_t i = 0; i < n; i++) bits[i] = bf16 ? test_to_bf16(x[i]) : test_to_f16(x[i]);
    void *p = device_memory((size_t)n * sizeof *bits, bits);
    MUST(qi_cuda.stream_synchronize(NULL));
    free(bits);
    return p;
}

static int compare(const char *what, const float *got, const float *want, int rows, int columns)
{
    for (int i = 0; i < rows * columns; i++)
        if (got[i] != want[i]) {
            fprintf(stderr, "%s[%d][%d]: got %g, want %g\n", what, i / columns, i % columns,
                    (double)got[i], (double)want[i]);
            return FAILED;
        }
    return SUCCEEDED;
}

/* q, k, v: [tokens, HEADS, d]. Keys from `keys` on count as 0. */
static int check_products(const product_case *c, const float *q, const float *k, const float *v,
                          const hopper_params *params)
{
    const int d = configs[c->config].head_dim, columns = c->num_tiles * configs[c->config].tile;
    float *s = calloc((size_t)QUERIES * (size_t)columns, sizeof *s);
    float *o = calloc((size_t)QUERIES * (size_t)d, sizeof *o);
    float *got_s = malloc((size_t)QUERIES * (size_t)columns * sizeof *s);
    float *got_o = malloc((size_t)QUERIES * (size_t)d * sizeof *o);
    int arrived;
    for (int i = 0; i < QUERIES; i++)
        for (int j = 0; j < c->keys; j++) {
            const float *q_row = q + (i * HEADS + HEAD) * d, *k_row = k + (j * HEADS + HEAD) * d;
            float sum = 0;
            for (int h = 0; h < d; h++) sum += q_row[h] * k_row[h];
            s[i * columns + j] = sum;
            for (int h = 0; h < d; h++) o[i * d + h] += sum * v[(j * HEADS + HEAD) * d + h];
        }
    read_back(got_s, params->s, (size_t)QUERIES * (size_t)columns * sizeof *s);
    read_back(got_o, params->o, (size_t)QUERIES * (size_t)d * sizeof *o);
    read_back(&arrived, params->arrived, sizeof arrived);
    if (compare("s", got_s, s, QUERIES, columns) || compare("o", got_o, o, QUERIES, d))
        return FAILED;
    if (arrived != 256) fprintf(stderr, "%d consumers came to the barrier\n", arrived);
    return arrived == 256 ? SUCCEEDED : FAILED;
}

static int run_product(const void *argument)
{
    const product_case *c = argument;
    const config *f = &configs[c->config];
    const int d = f->head_dim, q_bytes = QUERIES * d * 2, stage_bytes = 4 * f->tile * d;
    const bool bf16 = f->type[0] == 'b';
    const int64_t of_q = (int64_t)QUERIES * HEADS * d, of_kv = (int64_t)c->keys * HEADS * d;
    float *q = random_numbers(of_q, 1), *k = random_numbers(of_kv, 1),
          *v = random_numbers(of_kv, 2);
    hopper_params p = {.head = HEAD, .num_tiles = c->num_tiles};
    encode_rows(&p.q, upload(q, of_q, bf16), 2, QUERIES, d, 64);
    encode_rows(&p.k, upload(k, of_kv, bf16), 2, c->keys, d, f->tile);
    encode_rows(&p.v, upload(v, of_kv, bf16), 2, c->keys, d, f->tile);
    p.s = device_memory((size_t)(QUERIES * f->tile * c->num_tiles) * sizeof *p.s, NULL);
    p.o = device_memory((size_t)(QUERIES * d) * sizeof *p.o, NULL);
    p.arrived = device_memory(sizeof *p.arrived, NULL);
    const int result =
        launch(c->config, "product", MAX_THREADS, q_bytes + f->stages * stage_bytes, &p);
    if (result) {
        fprintf(stderr, "the launch: error %d\n", result);
        return FAILED;
    }
    return check_products(c, q, k, v, &p);
}

static void products_are_exact(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_RIGHT; i++)
        for (int seed = 0; seed < 3; seed++) {
            const product_case c = {
                .config = i, .num_tiles = 5, .keys = 4 * configs[i].tile + 1 + (int)test_below(50)};
            const outcome out = run_process(run_product, &c, seed);
            expect_success(configs[i].type, &out);
        }
}

/* The same of e4m3: 64 queries by 128 keys; the sums of the first product are rounded to it. */
static int run_product8(const void *argument)
{
    enum { QUERIES8 = 64, KEYS = 128, DIMS = 128, SHARED = (64 + 3 * 128) * 128 };
    (void)argument;
    const test_fp8 f = test_fp8_of(QKV_E4M3);
    const int counts[] = {QUERIES8, KEYS, KEYS}, most[] = {1, 1, 2};
    float *x[3], s[QUERIES8 * KEYS] = {0}, o[QUERIES8 * DIMS] = {0};
    static float got_s[QUERIES8 * KEYS], got_o[QUERIES8 * DIMS];
    hopper_params p = {.head = HEAD};
    qi_tensor_map *maps[] = {&p.q, &p.k, &p.v};
    for (int t = 0; t < 3; t++) {
        const int n = counts[t] * HEADS * DIMS;
        uint8_t *codes = malloc((size_t)n);
        x[t] = random_numbers(n, most[t]);
        for (int i = 0; i < n; i++) codes[i] = test_to_fp8(f, (double)x[t][i]);
        void *at = device_memory((size_t)n, codes);
        MUST(qi_cuda.stream_synchronize(NULL));
        free(codes);
        encode_rows(maps[t], at, 1, counts[t], DIMS, counts[t]);
    }
    p.s = device_memory(sizeof s, NULL);
    p.o = device_memory(sizeof o, NULL);
    MUST(launch(0, "product8", 128, SHARED, &p));
    for (int i = 0; i < QUERIES8; i++)
        for (int j = 0; j < KEYS; j++) {
            float *sum = &s[i * KEYS + j];
            for (int d = 0; d < DIMS; d++)
                *sum += x[0][(i * HEADS + HEAD) * DIMS + d] * x[1][(j * HEADS + HEAD) * DIMS + d];
            const float weight = (float)test_fp8_value(f, test_to_fp8(f, (double)*sum));
            for (int d = 0; d < DIMS; d++)
                o[i * DIMS + d] += weight * x[2][(j * HEADS + HEAD) * DIMS + d];
        }
    read_back(got_s, p.s, sizeof s);
    read_back(got_o, p.o, sizeof o);
    return compare("s", got_s, s, QUERIES8, KEYS) || compare("o", got_o, o, QUERIES8, DIMS)
               ? FAILED
               : SUCCEEDED;
}

static void products_of_e4m3_are_exact(void **state)
{
    (void)state;
    for (int seed = 0; seed < 3; seed++) {
        const outcome out = run_process(run_product8, NULL, seed);
        expect_success("e4m3", &out);
    }
}

/* By a fault, or by what it computes; of a stage released too early, in some orders. */
static void what_a_kernel_forgets_is_found(void **state)
{
    (void)state;
    if (!test_is_emulated()) skip();
    for (int i = NUM_RIGHT; i < NUM_CONFIGS; i++) {
        const int num_seeds = configs[i].wrong == RELEASES_EARLY ? 8 : 1;
        bool found = false;
        for (int seed = 0; seed < num_seeds && !found; seed++) {
            const product_case c = {.config = i, .num_tiles = 5, .keys = 400};
            found = run_process(run_product, &c, seed).code == FAILED;
        }
        if (!found) fail_msg("wrong %d: not found", configs[i].wrong);
    }
}

/* ---- copies ----------------------------------------------------------------------------------- */

enum { ELEMENTS = 1 << 14, MAX_BYTES = 16 << 10 };

typedef struct copy_case {
    const char *why;
    u64 dims[RANK], strides[RANK - 1]; /* bytes */
    u32 box[RANK];
    int at[RANK], swizzle, offset;
} copy_case;

static const copy_case copy_cases[] = {
    {"plain", {64, 4, 16, 2}, {128, 512, 8192}, {64, 1, 8, 1}, {0, 2, 3, 1}, SWIZZLE_NONE, 0},
    {"no row of 128 bytes", {40, 4, 16, 2}, {80, 320, 5120}, {24, 2, 5, 2}, {8, 1, 2, 0}, 0, 128},
    {"swizzled", {64, 4, 16, 2}, {128, 512, 8192}, {64, 4, 8, 2}, {0, 0, 8, 0}, SWIZZLE_128B, 1024},
    {"few rows", {64, 4, 16, 2}, {128, 512, 8192}, {64, 1, 4, 1}, {0, 1, 4, 1}, SWIZZLE_128B, 384},
    {"64 bytes", {32, 4, 16, 2}, {64, 256, 4096}, {32, 4, 8, 1}, {0, 0, 4, 1}, SWIZZLE_64B, 0},
    {"32 bytes", {16, 4, 16, 2}, {32, 128, 2048}, {16, 4, 8, 1}, {0, 0, 4, 1}, SWIZZLE_32B, 0},
    {"before it",
     {64, 4, 16, 2},
     {128, 512, 8192},
     {64, 2, 8, 2},
     {-8, -1, -3, -1},
     SWIZZLE_128B,
     0},
    {"past it", {64, 4, 16, 2}, {128, 512, 8192}, {64, 2, 8, 2}, {24, 3, 12, 1}, SWIZZLE_128B, 0},
    {"nowhere", {64, 4, 16, 2}, {128, 512, 8192}, {64, 1, 8, 1}, {64, 4, 16, 2}, SWIZZLE_128B, 0},
    {"a page: strides that do not grow",
     {64, 8, 4, 8},
     {512, 128, 4096},
     {64, 8, 2, 2},
     {0, 0, 2, 4},
     SWIZZLE_128B,
     0},
    {"rows that overlap", {64, 100, 16, 2}, {16, 512, 8192}, {64, 8, 2, 1}, {0, 5, 1, 0}, 0, 0},
};

/* want: shared memory with the box; stored: the tensor that it is written to. */
static void expect_copy(const copy_case *c, bool stores, const uint16_t *from, char *want,
                        uint16_t *stored)
{
    const u32 rows = c->box[1] * c->box[2] * c->box[3], row_bytes = c->box[0] * 2;
    const u32 mask = (1u << c->swizzle) - 1;
    for (u32 r = 0; r < rows; r++)
        for (u32 x = 0; x < c->box[0]; x++) {
            const i64 at[RANK] = {c->at[0] + (i64)x, c->at[1] + (i64)(r % c->box[1]),
                                  c->at[2] + (i64)(r / c->box[1] % c->box[2]),
                                  c->at[3] + (i64)(r / c->box[1] / c->box[2])};
            i64 bytes = at[0] * 2;
            bool inside = true;
            for (int i = 0; i < RANK; i++) {
                inside = inside && at[i] >= 0 && at[i] < (i64)c->dims[i];
                if (i > 0) bytes += at[i] * (i64)c->strides[i - 1];
            }
            const u32 place = (u32)c->offset + r * row_bytes + x * 2;
            const uint16_t value = inside ? from[bytes / 2] : 0;
            if (inside && stores) stored[bytes / 2] = value;
            memcpy(want + ((place ^ (place >> 7 & mask) << 4) - (u32)c->offset), &value, 2);
        }
}

static int expect_bytes(const char *where, const void *got, const void *want, int bytes)
{
    for (int i = 0; i < bytes; i++) {
        const int is = ((const uint8_t *)got)[i], ought = ((const uint8_t *)want)[i];
        if (is == ought) continue;
        fprintf(stderr, "byte %d of %d of %s: got %02x, want %02x\n", i, bytes, where, is, ought);
        return FAILED;
    }
    return SUCCEEDED;
}

/* A box to shared memory, and from there to another tensor. */
static int run_copy(const void *argument)
{
    const copy_case *c = argument;
    static uint16_t from[ELEMENTS], stored[ELEMENTS], back[ELEMENTS];
    static char want[MAX_BYTES], got[MAX_BYTES];
    for (int i = 0; i < ELEMENTS; i++) from[i] = (uint16_t)(test_below(65535) + 1);
    hopper_params p = {.bytes = (i32)(c->box[0] * c->box[1] * c->box[2] * c->box[3] * 2),
                       .offset = c->offset,
                       .stores = 1};
    for (int i = 0; i < RANK; i++) p.stores &= c->at[i] >= 0; /* stores take no other boxes */
    memcpy(p.at, c->at, sizeof p.at);
    encoding e = {.map = &p.k,
                  .type = TYPE_U16,
                  .rank = RANK,
                  .base = device_memory(sizeof from, from),
                  .steps = {1, 1, 1, 1},
                  .swizzle = c->swizzle};
    memcpy(e.dims, c->dims, sizeof c->dims);
    memcpy(e.strides, c->strides, sizeof c->strides);
    memcpy(e.box, c->box, sizeof c->box);
    MUST(encode(e));
    e.map = &p.q;
    e.base = device_memory(sizeof back, back); /* zeros, of which `from` has none */
    MUST(encode(e));
    p.out = device_memory((size_t)p.bytes, NULL);
    MUST(launch(0, "copy", 128, c->offset + p.bytes, &p));
    read_back(got, p.out, (size_t)p.bytes);
    read_back(back, e.base, sizeof back);
    expect_copy(c, p.stores, from, want, stored);
    return expect_bytes("shared memory", got, want, p.bytes) == SUCCEEDED
               ? expect_bytes("the tensor", back, stored, sizeof back)
               : FAILED;
}

static void copies_put_every_byte_where_it_belongs(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof copy_cases / sizeof copy_cases[0]; i++)
        for (int seed = 0; seed < 2; seed++) {
            const outcome out = run_process(run_copy, &copy_cases[i], seed);
            expect_success(copy_cases[i].why, &out);
        }
}

/* ---- encoding ------------------------------------------------------------------------------- */

static int refuse_all(const void *unused)
{
    (void)unused;
    static _Alignas(64) char room[256];
    qi_tensor_map *map = (void *)room;
    const encoding good = {.map = map,
                           .type = TYPE_U16,
                           .rank = 3,
                           .base = device_memory(1 << 20, NULL),
                           .dims = {256, 16, 4},
                           .strides = {512, 8192},
                           .box = {64, 8, 2},
                           .steps = {1, 1, 1},
                           .swizzle = SWIZZLE_128B};
    int num_wrong = 0;
#define REFUSED(...)                                                                               \
    do {                                                                                           \
        encoding e = good;                                                                         \
        __VA_ARGS__;                                                                               \
        if (encode(e) != 1) num_wrong++, fprintf(stderr, "%s: not refused\n", #__VA_ARGS__);       \
    } while (0)
#define TAKEN(...)                                                                                 \
    do {                                                                                           \
        encoding e = good;                                                                         \
        __VA_ARGS__;                                                                               \
        if (encode(e) != 0) num_wrong++, fprintf(stderr, "%s: refused\n", #__VA_ARGS__);           \
    } while (0)
    TAKEN((void)e);
    TAKEN(e.rank = 1);
    TAKEN(e.rank = 5, e.dims[3] = e.dims[4] = e.box[3] = e.box[4] = e.steps[3] = e.steps[4] = 1,
          e.strides[2] = e.strides[3] = 16);
    TAKEN(e.strides[0] = 16);
    TAKEN(e.strides[1] = ((u64)1 << 40) - 16);
    TAKEN(e.dims[1] = (u64)1 << 32);
    TAKEN(e.box[1] = 256);
    TAKEN(e.box[0] = 256, e.swizzle = SWIZZLE_NONE);
    REFUSED(e.type = 99);
    REFUSED(e.rank = 0);
    REFUSED(e.rank = 6);
    REFUSED(e.base = (char *)e.base + 8);
    REFUSED(e.dims[1] = 0);
    REFUSED(e.dims[1] = ((u64)1 << 32) + 1);
    REFUSED(e.strides[0] = 520);
    REFUSED(e.strides[1] = (u64)1 << 40);
    REFUSED(e.box[1] = 0);
    REFUSED(e.box[1] = 257);
    REFUSED(e.box[0] = 72);
    REFUSED(e.box[0] = 4, e.swizzle = SWIZZLE_NONE);
    REFUSED(e.box[0] = 64, e.swizzle = SWIZZLE_64B);
    REFUSED(e.steps[1] = 0);
    REFUSED(e.steps[1] = 9);
    REFUSED(e.swizzle = 99);
    REFUSED(e.l2_promotion = 99);
    REFUSED(e.fill = 1);
    return num_wrong ? FAILED : SUCCEEDED;
}

static void the_driver_refuses_what_it_cannot_encode(void **state)
{
    (void)state;
    const outcome out = run_process(refuse_all, NULL, 0);
    expect_success("encoding", &out);
}

/* ---- faults --------------------------------------------------------------------------------- */

static int run_fault(const void *argument)
{
    enum { BYTES = 64 * 128 };
    hopper_params p = {.mode = *(const int *)argument, .bytes = BYTES};
    encode_rows(&p.k, device_memory(64 * HEADS * 64 * 2, NULL), 2, 64, 64, 64);
    p.o = device_memory(128 * sizeof *p.o, NULL);
    return launch(0, "fault", 128, BYTES, &p) ? FAILED : SUCCEEDED;
}

static void faults_are_told(void **state)
{
    (void)state;
    static const struct {
        int mode;
        const char *text;
    } faults[] = {
        {FAULT_WAIT_FOR_EVER, "warp 0: lanes 00000001 at the mbarrier at"},
        {FAULT_WAIT_FOR_EVER, "whose phase 0 lacks 1 arrivals and 0 bytes"},
        {FAULT_SPIN_FOR_EVER, "warp 3: lanes ffffffff look again and again"},
        {FAULT_TOO_MANY_ARRIVALS, "more than 1 arrivals in phase 0"},
        {FAULT_NO_BARRIER, "not initialised, or overwritten"},
        {FAULT_BARRIER_OVERWRITTEN, "not initialised, or overwritten"},
        {FAULT_PARITY, "parity is 0 or 1, got 2"},
        {FAULT_TWO_PHASES, "thread 32: mbarrier"},
        {FAULT_MISALIGNED, "not aligned to 1024 bytes"},
        {FAULT_PAST_SHARED, "not shared memory"},
        {FAULT_NO_MAP, "is no tensor map"},
        {FAULT_COPY_NOT_AWAITED, "before its copies"},
        {FAULT_STORE_NOT_AWAITED, "before its copies"},
        {FAULT_PRODUCTS_NOT_AWAITED, "before its products"},
        {FAULT_OPERANDS_DIFFER, "threads 0 and 7 of a warpgroup have different operands"},
        {FAULT_OPERAND_OUTSIDE, "rows at"},
        {FAULT_THREE_WARPS, "products (wgmma) that not all warps of theirs have committed"},
        {FAULT_NAMED_BARRIER, "barrier 1 for 64 threads, where others wait for 128"},
        {FAULT_UNIFORM, "uniform: lanes have other values"},
    };
    if (!test_is_emulated()) skip();
    const int none = FAULT_NONE;
    const outcome right = run_process(run_fault, &none, 0);
    expect_success("nothing wrong", &right);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        const outcome out = run_process(run_fault, &faults[i].mode, 0);
        if (out.code != FAILED || !strstr(out.said, faults[i].text))
            fail_msg("\"%s\": exit code %d: %s", faults[i].text, out.code, out.said);
    }
}

/* ---- main ------------------------------------------------------------------------------------- */

static int is_hopper(const void *unused)
{
    (void)unused;
    return attribute(CU_DEVICE_MAJOR) == 9 ? SUCCEEDED : NOT_HOPPER;
}

int main(void)
{
    if (!test_on_cuda() || run_process(is_hopper, NULL, 0).code == NOT_HOPPER) {
        printf("skipped: no GPU of compute capability 9.0\n");
        return 0;
    }
    const char *seed = getenv("QKV_TEST_SEED");
    test_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL);
    printf("QKV_TEST_SEED=%llu\n", (unsigned long long)test_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_are_exact),
        cmocka_unit_test(products_of_e4m3_are_exact),
        cmocka_unit_test(what_a_kernel_forgets_is_found),
        cmocka_unit_test(copies_put_every_byte_where_it_belongs),
        cmocka_unit_test(the_driver_refuses_what_it_cannot_encode),
        cmocka_unit_test(faults_are_told),
    };
    return cmocka_run_group_tests_name("hopper", tests, compile_all, NULL);
}
