/* tvm_ffi.c - the operators without state for callers of tvm-ffi's C ABI, under __tvm_ffi_ and their own names:
 *
 *   tvm_ffi.load_module("libqkv.so").qkv_rmsnorm(out, x, weight, 1e-5)
 *
 * Arguments are those of the C function in its order, without context and stream: tensors, None for NULL,
 * numbers, and for a structure its fields; what is left out at the end has its default. The context is one
 * for each device, made at the first call; the stream is the one that tvm-ffi has for the device. Nothing is
 * linked: what is needed of the runtime is looked up in the process, where its caller has it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "qkv/qkv.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* ---- the ABI (tvm/ffi/c_api.h) -------------------------------------------------------------------- */

typedef struct any {
    int32_t type;
    uint32_t padding;
    union {
        int64_t integer;
        double number;
        void *pointer;
    } as;
} any;

enum { ANY_NONE, ANY_INT, ANY_BOOL, ANY_FLOAT, ANY_DLTENSOR = 7, ANY_TENSOR = 70 };
enum { OBJECT_HEADER_BYTES = 24 }; /* before the DLTensor of a tensor object */

/* Returns what a function of the ABI returns when it fails. */
static int raise(const char *kind, const char *message)
{
    void (*set_raised)(const char *kind, const char *message);
    void *symbol = dlsym(RTLD_DEFAULT, "TVMFFIErrorSetRaisedFromCStr");
    memcpy(&set_raised, &symbol, sizeof symbol);
    if (symbol) set_raised(kind, message);
    return -1;
}

static void *stream_of(DLDevice device)
{
    void *(*get_stream)(int32_t device_type, int32_t device_id);
    void *symbol = device.device_type == kDLCUDA ? dlsym(RTLD_DEFAULT, "TVMFFIEnvGetStream") : NULL;
    memcpy(&get_stream, &symbol, sizeof symbol);
    return symbol ? get_stream((int32_t)device.device_type, device.device_id) : NULL;
}

static int check(qkv_status status)
{
    if (status == QKV_OK) return 0;
    return raise(status == QKV_ERR_INVALID  ? "ValueError"
                 : status == QKV_ERR_MEMORY ? "MemoryError"
                                            : "RuntimeError",
                 qkv_last_error());
}

/* ---- contexts ------------------------------------------------------------------------------------- */

enum { MAX_GPUS = 64 };
static _Atomic(qkv_context *) contexts[1 + MAX_GPUS]; /* the CPU's, then the GPUs' */
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

/* A context does not outlive fork(): the child makes its own, and leaves those of the parent alone. */
static void forget_contexts(void)
{
    for (int i = 0; i <= MAX_GPUS; i++) atomic_store(&contexts[i], NULL);
    pthread_mutex_init(&making, NULL);
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_contexts);
}

static qkv_status find_context(DLDevice device, qkv_context **out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const int on_gpu = device.device_type == kDLCUDA;
    const qkv_context_options options = {
        QKV_CONTEXT_OPTIONS_INIT,
        .device = {on_gpu ? kDLCUDA : kDLCPU, on_gpu ? device.device_id : 0}};
    const int at = on_gpu ? 1 + device.device_id : 0;
    if (at < 0 || at > MAX_GPUS)
        return qkv_context_create(&options, out); /* says that there is none */
    *out = atomic_load_explicit(&contexts[at], memory_order_acquire);
    if (*out) return QKV_OK;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&making);
    qkv_status status = QKV_OK;
    *out = atomic_load(&contexts[at]);
    if (!*out) status = qkv_context_create(&options, out);
    if (!status) atomic_store_explicit(&contexts[at], *out, memory_order_release);
    pthread_mutex_unlock(&making);
    return status;
}

/* ---- arguments ------------------------------------------------------------------------------------ */

enum { MAX_ARGS = 21 };
typedef struct call {
    any args[MAX_ARGS]; /* ANY_NONE at the end, where arguments are left out */
    qkv_context *ctx;
    void *stream;
} call;

static DLTensor *tensor(const any *value)
{
    char *pointer = value->as.pointer;
    if (value->type == ANY_TENSOR) return (DLTensor *)(void *)(pointer + OBJECT_HEADER_BYTES);
    return value->type == ANY_DLTENSOR ? (DLTensor *)(void *)pointer : NULL;
}

static float number(const any *value, float otherwise)
{
    if (value->type == ANY_NONE) return otherwise;
    return value->type == ANY_FLOAT ? (float)value->as.number : (float)value->as.integer;
}

static qkv_scale scale(const any *value)
{
    const DLTensor *of_heads = tensor(value);
    return (qkv_scale){.value = of_heads ? 0 : number(value, 0), .tensor = of_heads};
}

/* Does a value serve as T a tensor, t one or None, n a number, i an integer of 32 bits, s a number or a tensor? */
static int serves(const any *value, char type)
{
    const int is_integer = value->type == ANY_INT || value->type == ANY_BOOL;
    if (value->type == ANY_NONE) return type != 'T';
    if (tensor(value)) return type == 'T' || type == 't' || type == 's';
    if (type == 'i') return is_integer && (int32_t)value->as.integer == value->as.integer;
    return (type == 'n' || type == 's') && (is_integer || value->type == ANY_FLOAT);
}

static const char *meaning(char type)
{
    return type == 'T'   ? "a tensor"
           : type == 't' ? "a tensor or None"
           : type == 'n' ? "a number"
           : type == 'i' ? "an integer of 32 bits"
                         : "a number or a tensor";
}

/* types has a letter for each argument; the first tensor is on the device that computes. */
static int begin(call *c, const char *function, const char *types, const any *args,
                 int32_t num_args)
{
    char message[128];
    const int32_t most = (int32_t)strlen(types);
    if (num_args > most) {
        snprintf(message, sizeof message, "%s: expected at most %d arguments, got %d", function,
                 most, num_args);
        return raise("TypeError", message);
    }
    *c = (call){.ctx = NULL};
    for (int i = 0; i < most; i++) {
        if (i < num_args && args[i].type != ANY_NONE) c->args[i] = args[i];
        if (serves(&c->args[i], types[i])) continue;
        snprintf(message, sizeof message, "%s: expected %s as argument %d", function,
                 meaning(types[i]), i + 1);
        return raise("TypeError", message);
    }
    int first = 0;
    while (!tensor(&c->args[first])) first++; /* no function goes without */
    const DLDevice device = tensor(&c->args[first])->device;
    c->stream = stream_of(device);
    return check(find_context(device, &c->ctx));
}

#define EXPORT(name, types, ...)                                                                   \
    QKV_API int __tvm_ffi_##name(void *self, const any *args, int32_t num_args, any *result);      \
    int __tvm_ffi_##name(void *self, const any *args, int32_t num_args, any *result)               \
    {                                                                                              \
        (void)self;                                                                                \
        _Static_assert(sizeof types - 1 <= MAX_ARGS, "more arguments than a call has");            \
        *result = (any){.type = ANY_NONE};                                                         \
        call c;                                                                                    \
        if (begin(&c, #name, types, args, num_args)) return -1;                                    \
        return check(name(c.ctx, __VA_ARGS__, c.stream));                                          \
    }
#define T(i)            tensor(&c.args[i])
#define N(i, otherwise) number(&c.args[i], otherwise)
#define I(i)            (int32_t) c.args[i].as.integer /* 0 of ANY_NONE */
#define S(i)            scale(&c.args[i])

/* ---- the functions -------------------------------------------------------------------------------- */

EXPORT(qkv_rmsnorm, "TTTnn", T(0), T(1), T(2), N(3, 1e-6f), N(4, 0))
EXPORT(qkv_add_rmsnorm, "TTTTnn", T(0), T(1), T(2), T(3), N(4, 1e-6f), N(5, 0))
EXPORT(qkv_gated_activation, "TTTi", T(0), T(1), T(2), I(3))
EXPORT(qkv_gemm, "TTT", T(0), T(1), T(2))
EXPORT(qkv_gemm_quantized, "TTTi", T(0), T(1), T(2), (qkv_weight_format)I(3))
EXPORT(qkv_argmax, "TT", T(0), T(1))

/* q_out, q, k_out, k, positions, indptr, offsets; the fields of qkv_rope_spec */
EXPORT(qkv_rope, "TTtttttiinnnnn",
       &(qkv_rope_spec){QKV_ROPE_SPEC_INIT, .rotary_dim = I(7), .interleaved = I(8),
                        .theta = N(9, 0), .scale = N(10, 0), .low_freq = N(11, 0),
                        .high_freq = N(12, 0), .old_context = N(13, 0)},
       T(0), T(1), T(2), T(3), T(4), T(5), T(6))

/* tokens, probs or out, and rows; the fields of qkv_sampling_params, but reserved */
#define PARAMS                                                                                     \
    &(qkv_sampling_params)                                                                         \
    {                                                                                              \
        QKV_SAMPLING_PARAMS_INIT,                                                                  \
            .kind = I(2), .temperature = T(3), .top_k = T(4), .top_p = T(5), .min_p = T(6),        \
            .seed = T(7), .offset = T(8), .order = I(9), .typical_p = T(10), .top_n_sigma = T(11), \
            .repetition = T(12), .frequency = T(13), .presence = T(14), .counts = T(15),           \
            .prompt = T(16), .bias = T(17), .bitmask = T(18), .indices = T(19), .valid = T(20)     \
    }
EXPORT(qkv_sample, "TTittttTtittttttttttt", T(0), T(1), PARAMS)
EXPORT(qkv_renormalize, "TTittttttittttttttttt", T(0), T(1), PARAMS)
EXPORT(qkv_mask_logits, "TTittttttittttttttttt", T(0), T(1), PARAMS)

/* values, indices, rows; sorted */
EXPORT(qkv_top_k, "tTTi", T(0), T(1), T(2), I(3))
/* log_probs, ranks, logits, tokens */
EXPORT(qkv_log_probs, "TtTT", T(0), T(1), T(2), T(3))

/* The fields of qkv_verify_io, but reserved */
EXPORT(qkv_verify, "TTTTTttTt",
       &(qkv_verify_io){QKV_VERIFY_IO_INIT, .accepted = T(0), .num_accepted = T(1), .tokens = T(2),
                        .target = T(3), .draft_tokens = T(4), .draft = T(5), .parents = T(6),
                        .seed = T(7), .offset = T(8)})

/* k_cache, v_cache, kv_layout, k, v; qo_indptr, kv_indptr, kv_indices, kv_last_page_len, block_table, kv_lens;
 * positions; k_scale, v_scale */
EXPORT(qkv_kv_append, "TtiTTTttttttss", T(0), T(1), I(2), T(3), T(4),
       &(qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = T(5), .kv_indptr = T(6), .kv_indices = T(7),
                       .kv_last_page_len = T(8), .block_table = T(9), .kv_lens = T(10)},
       T(11),
       &(qkv_kv_append_options){QKV_KV_APPEND_OPTIONS_INIT, .k_scale = S(12), .v_scale = S(13)})

/* k_cache, v_cache, kv_layout, k, v, slot_mapping; k_scale, v_scale */
EXPORT(qkv_kv_append_slots, "TtiTTTss", T(0), T(1), I(2), T(3), T(4), T(5),
       &(qkv_kv_append_options){QKV_KV_APPEND_OPTIONS_INIT, .k_scale = S(6), .v_scale = S(7)})
EXPORT(qkv_kv_copy_pages, "TtTT", T(0), T(1), T(2), T(3))
