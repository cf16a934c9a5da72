/* qkv.c - the command line tool: qkv info, qkv bench, qkv compile. SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention_problem.h"
#include "bench_host.h"
#include "compile.h"
#include "info.h"

/* The command line: options may stand anywhere. */
typedef struct command {
    bench_options bench;
    const char *file, *arch, *cache;
    bool ceilings;
    const char *words[3]; /* the command, OP, PROBLEM */
    int num_words;
} command;

static void print_help(void)
{
    puts("qkv - what the library has, and how fast it is\n"
         "\n"
         "  qkv info [--ceilings] [decode|prefill|mixed [PROBLEM]]\n"
         "      version, CPU levels, device, kernel tables; which rows take an attention\n"
         "      problem, and why the others do not; --ceilings: what this machine can do at most\n"
         "  qkv bench OP [PROBLEM]\n"
         "  qkv bench --file FILE        lines \"OP PROBLEM\"; # starts a comment\n"
         "      verifies against double precision, then prints the median time of a call, GB/s,\n"
         "      GFLOP/s and the share of the ceiling that binds, measured before and after\n"
         "  qkv bench host [--arch sm_90a]\n"
         "      what the library costs beside its kernels: opening, compiling, loading, planning "
         "and\n"
         "      calling; without a GPU what can be measured there\n"
         "  qkv compile FILE [--arch sm_80,sm_90a,sm_100a] [--cache DIR]\n"
         "      fills a cache with the GPU kernels of a file's problems; it needs NVRTC, no GPU. "
         "On a\n"
         "      machine without NVRTC, QKV_CACHE_DIR=DIR takes them\n"
         "  qkv --help, qkv --version\n"
         "\n"
         "  --device D       cpu (default), cuda or cuda:N; on a GPU calls are replayed from a "
         "graph\n"
         "                   and find their inputs out of the L2\n"
         "  --json           one object a line\n"
         "  --seconds S      time to measure each problem for (1; 0.2 on a GPU)\n"
         "  --threads N      CPU threads (all)\n"
         "\n"
         "QKV_DEVICE=cpu:LEVEL in the environment takes another CPU level than the best one here;\n"
         "its instructions make the ceilings.\n"
         "\n"
         "PROBLEM is key=value,... ; unset keys have the defaults shown:");
    const char *name, *defaults, *about, *help;
    for (int i = 0; (name = problem_op(i, &defaults, &about)); i++)
        printf("  %-8s %s\n           %s\n", name, about, defaults);
    puts("\nkeys:");
    for (int i = 0; (help = problem_key_help(i, &name)); i++) printf("  %-12s %s\n", name, help);
    puts("\nexit status: 0 fine, 1 a wrong result or a failed call, 2 wrong usage");
}

/* The number in an option's argument. */
static double read_number(const char *option, const char *text, double min, double max)
{
    char *end;
    errno = 0;
    const double value = strtod(text, &end);
    if (end == text || *end || errno || !(value >= min && value <= max))
        tool_die(EXIT_USAGE, "%s: expected a number from %g to %g, got \"%s\"", option, min, max,
                 text);
    return value;
}

/* "cpu", "cuda", "cuda:1" */
static DLDevice read_device(const char *text)
{
    DLDevice device = {kDLCPU, 0};
    if (strcmp(text, "cpu") == 0) return device;
    device.device_type = kDLCUDA;
    if (strncmp(text, "cuda:", 5) == 0)
        device.device_id = (int32_t)read_number("--device cuda:", text + 5, 0, 1023);
    else if (strcmp(text, "cuda") != 0)
        tool_die(EXIT_USAGE, "--device: expected cpu, cuda or cuda:N, got \"%s\"", text);
    return device;
}

/* Takes the option at argv[i]; returns the index of its last word. */
static int read_option(command *c, int argc, char **argv, int i)
{
    const char *option = argv[i];
    if (strcmp(option, "--json") == 0) {
        c->bench.json = true;
        return i;
    }
    if (strcmp(option, "--ceilings") == 0) {
        c->ceilings = true;
        return i;
    }
    static const char *const with_argument[] = {"--seconds", "--threads", "--file",
                                                "--device",  "--arch",    "--cache"};
    enum { NUM = sizeof with_argument / sizeof with_argument[0] };
    int which = 0;
    while (which < NUM && strcmp(option, with_argument[which]) != 0) which++;
    if (which == NUM) tool_die(EXIT_USAGE, "%s: not an option; qkv --help lists them", option);
    if (i + 1 == argc) tool_die(EXIT_USAGE, "%s: expected an argument", option);
    const char *argument = argv[i + 1];
    switch (which) {
    case 0: c->bench.seconds = read_number(option, argument, 0, 86400); break;
    case 1: c->bench.num_threads = (int32_t)read_number(option, argument, 1, 4096); break;
    case 2: c->file = argument; break;
    case 3: c->bench.device = read_device(argument); break;
    case 4: c->arch = argument; break;
    default: c->cache = argument;
    }
    return i + 1;
}

static problem parse(const char *place, const char *op, const char *text)
{
    problem p;
    char error[PROBLEM_ERROR];
    if (!problem_parse(op, text, &p, error)) tool_die(EXIT_USAGE, "%s%s", place, error);
    return p;
}

/* ---- commands ------------------------------------------------------------------------------ */

static void info(const command *c)
{
    if (c->file || c->bench.json) tool_die(EXIT_USAGE, "info: takes neither --file nor --json");
    info_options o = {
        .num_threads = c->bench.num_threads, .ceilings = c->ceilings, .device = c->bench.device};
    problem p;
    if (c->num_words > 1) {
        p = parse("", c->words[1], c->num_words > 2 ? c->words[2] : "");
        if (!attention_problem_is(&p))
            tool_die(EXIT_USAGE, "info: expected decode, prefill or mixed, got %s", p.op);
        o.p = &p;
    }
    info_print(&o);
}

/* The problems of a file; all are read before the first one runs: a mistake shows at once. */
static int read_problems(const char *path, problem *out, int room)
{
    FILE *f = fopen(path, "r");
    if (!f) tool_die(EXIT_USAGE, "%s: %s", path, strerror(errno));
    char line[1024], op[64], text[PROBLEM_TEXT], extra, place[64];
    int n = 0;
    for (int number = 1; fgets(line, sizeof line, f); number++) {
        line[strcspn(line, "#")] = text[0] = '\0';
        const int words = sscanf(line, "%63s %511s %c", op, text, &extra);
        if (words <= 0) continue;
        snprintf(place, sizeof place, "%.32s, line %d: ", path, number);
        if (words == 3) tool_die(EXIT_USAGE, "%sexpected OP [PROBLEM]", place);
        if (n == room) tool_die(EXIT_USAGE, "%sexpected at most %d problems", place, room);
        out[n++] = parse(place, op, text);
    }
    fclose(f);
    if (n == 0) tool_die(EXIT_USAGE, "%s: no problem in it", path);
    return n;
}

enum { MAX_PROBLEMS = 1024 };

static void compile_command(const command *c)
{
    if (c->num_words != 2) tool_die(EXIT_USAGE, "compile: expected a file of problems");
    problem *problems = data_alloc(MAX_PROBLEMS, sizeof *problems);
    const int n = read_problems(c->words[1], problems, MAX_PROBLEMS);
    compile_problems(problems, n, c->arch ? c->arch : "sm_80,sm_90a,sm_100a", c->cache);
    data_free(problems);
}

static void bench_command(const command *c)
{
    if (c->ceilings) tool_die(EXIT_USAGE, "bench: --ceilings belongs to info");
    const bool host = c->num_words == 2 && strcmp(c->words[1], "host") == 0;
    if ((c->arch && !host) || c->cache)
        tool_die(EXIT_USAGE, "bench: --arch and --cache belong to compile");
    if (host && !c->file) {
        bench_host(&c->bench, c->arch);
        return;
    }
    if (!c->file == (c->num_words < 2))
        tool_die(EXIT_USAGE, "bench: expected OP [PROBLEM], or --file FILE");
    problem *problems = data_alloc(MAX_PROBLEMS, sizeof *problems);
    int n = 1;
    if (c->file)
        n = read_problems(c->file, problems, MAX_PROBLEMS);
    else
        problems[0] = parse("", c->words[1], c->num_words > 2 ? c->words[2] : "");
    bench_session *s = bench_open(&c->bench);
    for (int i = 0; i < n; i++) bench_problem(s, &problems[i]);
    bench_close(s);
    data_free(problems);
}

int main(int argc, char **argv)
{
    command c = {.bench = {.seconds = -1, .device = {kDLCPU, 0}}};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_help(), 0;
        if (strcmp(argv[i], "--version") == 0) {
            const int v = qkv_version();
            return printf("qkv %d.%d.%d\n", v / 10000, v / 100 % 100, v % 100), 0;
        }
        if (argv[i][0] == '-')
            i = read_option(&c, argc, argv, i);
        else if (c.num_words == 3)
            tool_die(EXIT_USAGE, "%s: expected at most a command, OP and PROBLEM", argv[i]);
        else
            c.words[c.num_words++] = argv[i];
    }
    if (c.num_words == 0)
        tool_die(EXIT_USAGE, "expected a command: info, bench or compile; see qkv --help");
    if (strcmp(c.words[0], "info") == 0)
        info(&c);
    else if (strcmp(c.words[0], "bench") == 0)
        bench_command(&c);
    else if (strcmp(c.words[0], "compile") == 0)
        compile_command(&c);
    else
        tool_die(EXIT_USAGE, "%s: expected info, bench or compile; see qkv --help", c.words[0]);
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : EXIT_WRONG;
}
