/* options.c - parses the command line; every value is checked against its range.
 * SPDX-License-Identifier: Apache-2.0 */
#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: qkv-generate MODEL -p TEXT [-p TEXT ...] [options]\n"
    "\n"
    "Continues texts, or answers questions, with a Llama model in GGUF. Completions go to "
    "standard\n"
    "output in the order of the prompts, separated by a line `---`; all else to standard error.\n"
    "\n"
    "prompts\n"
    "  -p, --prompt TEXT      a prompt; may be given many times\n"
    "  -f, --file FILE        a prompt: the whole file; may be given many times\n"
    "      --raw              continue the text as it is\n"
    "      --chat             answer it in the ChatML form (the default for chat models)\n"
    "      --system TEXT      the system message of --chat\n"
    "\n"
    "tokens\n"
    "  -n, --tokens N         most tokens to generate for each prompt (128)\n"
    "      --temperature T    0 takes the likeliest token, always (0)\n"
    "      --top-k K          draw among the K likeliest; 0 = all (0)\n"
    "      --top-p P          draw among the likeliest that together reach P (1)\n"
    "      --seed S           of the random numbers of every prompt (0)\n"
    "      --ignore-eos       go on when the model says that it is done\n"
    "\n"
    "computation\n"
    "      --dtype TYPE       weights and KV cache: bf16 or f32 (bf16)\n"
    "      --device DEVICE    cpu, or an NVIDIA GPU: cuda, cuda:N (cpu)\n"
    "      --threads N        0 = as many as this process may use (0)\n"
    "      --max-batch N      requests running at a time (16)\n"
    "      --chunk N          prompt tokens in one step (256)\n"
    "      --page-size N      tokens in a page of the KV cache (16)\n"
    "      --pages N          pages of the KV cache; 0 = enough, within reason (0)\n"
    "      --no-prefix-sharing  compute every prompt whole\n"
    "\n"
    "output\n"
    "      --json             a line per prompt: prompt, text, tokens (with the one that ends "
    "it),\n"
    "                         ttft_ms, tokens_per_s (after the first token)\n"
    "      --tokenize         only print the ids of each prompt's tokens, a line per prompt\n"
    "      --logits FILE      only write a prompt's logits, float32 [tokens, vocabulary]\n"
    "      --trace FILE       instead of prompts: replay arrivals and lengths (trace.h says how "
    "they "
    "are\n"
    "                         written) and report times; --json prints them too\n"
    "      --trace-speed X    arrivals X times as fast (1)\n"
    "      --perplexity       only print the perplexity of a text, in windows of 512 tokens\n"
    "      --max-tokens N     of the text for --perplexity (all)\n"
    "      --help, --version\n";

enum { /* options without a short form */
       RAW = 256,
       CHAT,
       SYSTEM,
       TEMPERATURE,
       TOP_K,
       TOP_P,
       SEED,
       IGNORE_EOS,
       DTYPE,
       DEVICE,
       THREADS,
       MAX_BATCH,
       CHUNK,
       PAGE_SIZE,
       PAGES,
       NO_SHARING,
       JSON,
       TOKENIZE,
       LOGITS,
       PERPLEXITY,
       TRACE,
       TRACE_SPEED,
       MAX_TOKENS,
       HELP,
       VERSION
};

static const struct option long_options[] = {
    {"prompt", required_argument, NULL, 'p'},
    {"file", required_argument, NULL, 'f'},
    {"tokens", required_argument, NULL, 'n'},
    {"raw", no_argument, NULL, RAW},
    {"chat", no_argument, NULL, CHAT},
    {"system", required_argument, NULL, SYSTEM},
    {"temperature", required_argument, NULL, TEMPERATURE},
    {"top-k", required_argument, NULL, TOP_K},
    {"top-p", required_argument, NULL, TOP_P},
    {"seed", required_argument, NULL, SEED},
    {"ignore-eos", no_argument, NULL, IGNORE_EOS},
    {"dtype", required_argument, NULL, DTYPE},
    {"device", required_argument, NULL, DEVICE},
    {"threads", required_argument, NULL, THREADS},
    {"max-batch", required_argument, NULL, MAX_BATCH},
    {"chunk", required_argument, NULL, CHUNK},
    {"page-size", required_argument, NULL, PAGE_SIZE},
    {"pages", required_argument, NULL, PAGES},
    {"no-prefix-sharing", no_argument, NULL, NO_SHARING},
    {"json", no_argument, NULL, JSON},
    {"tokenize", no_argument, NULL, TOKENIZE},
    {"logits", required_argument, NULL, LOGITS},
    {"perplexity", no_argument, NULL, PERPLEXITY},
    {"trace", required_argument, NULL, TRACE},
    {"trace-speed", required_argument, NULL, TRACE_SPEED},
    {"max-tokens", required_argument, NULL, MAX_TOKENS},
    {"help", no_argument, NULL, HELP},
    {"version", no_argument, NULL, VERSION},
    {NULL, 0, NULL, 0},
};

static bool wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));
static bool wrong(const char *format, ...)
{
    va_list args;
    fputs("qkv-generate: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputs(" (--help lists the options)\n", stderr);
    return false;
}

static bool parse_int(const char *name, int32_t min, int32_t max, int32_t *out)
{
    char *end;
    errno = 0;
    const long value = strtol(optarg, &end, 10);
    if (end == optarg || *end || errno || value < min || value > max)
        return wrong("%s: expected %d to %d, got \"%s\"", name, (int)min, (int)max, optarg);
    *out = (int32_t)value;
    return true;
}

static bool parse_seed(uint64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoull(optarg, &end, 0);
    if (end == optarg || *end || errno || strchr(optarg, '-'))
        return wrong("--seed: expected 0 to 2^64 - 1, got \"%s\"", optarg);
    return true;
}

/* [0, max], or (0, max] when zero makes no sense. */
static bool parse_float(const char *name, bool zero, float max, float *out)
{
    char *end;
    *out = strtof(optarg, &end);
    if (end == optarg || *end || !(*out >= 0 && *out <= max) || (*out == 0 && !zero))
        return wrong("%s: expected %s to %g, got \"%s\"", name, zero ? "0" : "above 0", (double)max,
                     optarg);
    return true;
}

static bool parse_dtype(DLDataType *out)
{
    const bool f32 = !strcmp(optarg, "f32");
    if (!f32 && strcmp(optarg, "bf16") != 0)
        return wrong("--dtype: expected f32 or bf16, got \"%s\"", optarg);
    *out = f32 ? QKV_F32 : QKV_BF16;
    return true;
}

static bool parse_device(DLDevice *out)
{
    int32_t number = 0;
    char *end;
    *out = (DLDevice){kDLCPU, 0};
    if (!strcmp(optarg, "cpu")) return true;
    if (!strncmp(optarg, "cuda:", 5) && optarg[5] >= '0' && optarg[5] <= '9') {
        errno = 0;
        const long value = strtol(optarg + 5, &end, 10);
        number = *end || errno || value > INT32_MAX ? -1 : (int32_t)value;
    } else if (strcmp(optarg, "cuda") != 0) {
        number = -1;
    }
    *out = (DLDevice){kDLCUDA, number};
    return number >= 0 || wrong("--device: expected cpu, cuda or cuda:N, got \"%s\"", optarg);
}

/* name: as it was typed, for options that are none. */
static bool parse_option(options *o, int option, const char *name)
{
    engine_options *e = &o->engine;
    switch (option) {
    case 'p':
    case 'f':
        o->prompts[o->num_prompts++] = (prompt_source){.text = optarg, .is_file = option == 'f'};
        return true;
    case 'n': return parse_int("-n", 1, 1 << 24, &o->max_new);
    case RAW: o->form = FORM_RAW; return true;
    case CHAT: o->form = FORM_CHAT; return true;
    case SYSTEM: o->system = optarg; return true;
    case TEMPERATURE: return parse_float("--temperature", true, 1e6f, &e->temperature);
    case TOP_K: return parse_int("--top-k", 0, INT32_MAX, &e->top_k);
    case TOP_P: return parse_float("--top-p", false, 1, &e->top_p);
    case SEED: return parse_seed(&e->seed);
    case IGNORE_EOS: e->ignore_end = true; return true;
    case DTYPE: return parse_dtype(&o->dtype);
    case DEVICE: return parse_device(&o->device);
    case THREADS: return parse_int("--threads", 0, 1024, &o->num_threads);
    case MAX_BATCH: return parse_int("--max-batch", 1, 1 << 16, &e->max_batch);
    case CHUNK: return parse_int("--chunk", 1, 1 << 20, &e->chunk);
    case PAGE_SIZE: return parse_int("--page-size", 1, 1 << 16, &e->page_size);
    case PAGES: return parse_int("--pages", 0, 1 << 30, &e->num_pages);
    case NO_SHARING: e->share_prefixes = false; return true;
    case JSON: o->json = true; return true;
    case TOKENIZE: o->tokenize = true; return true;
    case LOGITS: o->logits_file = optarg; return true;
    case PERPLEXITY: o->perplexity = true; return true;
    case TRACE: o->trace_file = optarg; return true;
    case TRACE_SPEED: return parse_float("--trace-speed", false, 1e6f, &o->trace_speed);
    case MAX_TOKENS: return parse_int("--max-tokens", 2, INT32_MAX, &o->max_tokens);
    case ':': return wrong("%s: expected a value", name);
    default: return wrong("%s: no such option", name);
    }
}

static bool check(const options *o, int num_arguments)
{
    const int modes =
        o->tokenize + o->perplexity + (o->logits_file != NULL) + (o->trace_file != NULL);
    if (num_arguments != 1) return wrong("expected one model file, got %d", num_arguments);
    if (modes > 1)
        return wrong("--tokenize, --logits, --perplexity and --trace: expected one of them");
    if (o->trace_file)
        return o->num_prompts == 0 || wrong("--trace: expected no prompts, got %d", o->num_prompts);
    if (o->num_prompts == 0) return wrong("expected a prompt: -p TEXT or -f FILE");
    if ((o->perplexity || o->logits_file) && o->num_prompts != 1)
        return wrong("%s: expected one prompt, got %d", o->perplexity ? "--perplexity" : "--logits",
                     (int)o->num_prompts);
    return true;
}

int options_parse(options *o, int argc, char **argv)
{
    *o = (options){
        .dtype = QKV_BF16,
        .device = {kDLCPU, 0},
        .max_new = 128,
        .max_tokens = INT32_MAX,
        .trace_speed = 1,
        .engine = {
            .max_batch = 16, .chunk = 256, .page_size = 16, .share_prefixes = true, .top_p = 1}};
    o->prompts = malloc((size_t)argc * sizeof *o->prompts);
    if (!o->prompts) {
        fputs("qkv-generate: out of memory\n", stderr);
        return EXIT_FAILURE;
    }
    for (int option; (option = getopt_long(argc, argv, ":p:f:n:", long_options, NULL)) != -1;) {
        if (option == HELP) {
            fputs(usage, stdout);
            return EXIT_SUCCESS;
        }
        if (option == VERSION) {
            const int version = qkv_version();
            printf("qkv-generate %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
            return EXIT_SUCCESS;
        }
        if (!parse_option(o, option, argv[optind - 1])) return EXIT_USAGE;
    }
    if (!check(o, argc - optind)) return EXIT_USAGE;
    o->model = argv[optind];
    return OPTIONS_GO;
}
