/* qkv.c - the command line tool: qkv info, qkv bench. SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention_problem.h"
#include "bench.h"
#include "info.h"

/* The command line: options may stand anywhere. */
typedef struct command {
    bench_options bench;
    const char *file;
    bool ceilings;
    const char *words[3]; /* the command, OP, PROBLEM */
    int num_words;
} command;

static void print_help(void)
{
    puts("qkv - what the library has, and how fast it is\n"
         "\n"
         "  qkv info [--ceilings] [decode|prefill|mixed [PROBLEM]]\n"
         "      version, CPU levels, device, kernel tables; which rows take an attention problem, and\n"
         "      why the others do not. --ceilings measures memory and multiply-adds.\n"
         "  qkv bench OP [PROBLEM]\n"
         "  qkv bench --file FILE        lines \"OP PROBLEM\"; # starts a comment\n"
         "      verifies against double precision, then prints the median time of a call, GB/s, GFLOP/s\n"
         "      and the share of the ceiling that binds, measured before and after.\n"
         "  qkv --help, qkv --version\n"
         "\n"
         "  --json           one object a line\n"
         "  --seconds S      time to measure each problem for (1)\n"
         "  --threads N      CPU threads (all)\n"
         "  --isa LEVEL      CPU level (the best one here); its instructions make the ceiling\n"
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
        tool_die(EXIT_USAGE, "%s: expected a number from %g to %g, got \"%s\"", option, min, max, text);
    return value;
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
    static const char *const with_argument[] = {"--seconds", "--threads", "--isa", "--file"};
    int which = 0;
    while (which < 4 && strcmp(option, with_argument[which]) != 0) which++;
    if (which == 4) tool_die(EXIT_USAGE, "%s: not an option; qkv --help lists them", option);
    if (i + 1 == argc) tool_die(EXIT_USAGE, "%s: expected an argument", option);
    const char *argument = argv[i + 1];
    switch (which) {
    case 0: c->bench.seconds = read_number(option, argument, 0, 86400); break;
    case 1: c->bench.num_threads = (int32_t)read_number(option, argument, 1, 4096); break;
    case 2: c->bench.isa = argument; break;
    default: c->file = argument;
    }
    return i + 1;
}

static void check_isa(const char *isa)
{
    const char *level;
    for (int32_t i = 0; isa && (level = qkv_cpu_level(i, NULL)); i++)
        if (strcmp(level, isa) == 0) return;
    if (isa) tool_die(EXIT_USAGE, "--isa: expected a level of this build (see qkv info), got %s", isa);
}

static problem parse(const char *place, const char *op, const char *text)
{
    problem p;
    char error[PROBLEM_ERROR];
    if (!problem_parse(op, text, &p, error)) tool_die(EXIT_USAGE, "%s%s", place, error);
    return p;
}

/* ---- commands --------------------------------------------------------------------------------- */

static void info(const command *c)
{
    if (c->file || c->bench.json) tool_die(EXIT_USAGE, "info: takes neither --file nor --json");
    info_options o = {.num_threads = c->bench.num_threads, .isa = c->bench.isa, .ceilings = c->ceilings};
    problem p;
    if (c->num_words > 1) {
        p = parse("", c->words[1], c->num_words > 2 ? c->words[2] : "");
        if (!attention_problem_is(&p))
            tool_die(EXIT_USAGE, "info: expected decode, prefill or mixed, got %s", p.op);
        o.p = &p;
    }
    info_print(&o);
}

/* A line of a file: op and problem, cut at spaces; false: nothing on it. */
static bool read_line(char *line, const char **op, const char **text)
{
    static const char spaces[] = " \t\r\n";
    line[strcspn(line, "#")] = '\0';
    char *at = line + strspn(line, spaces);
    if (!*at) return false;
    *op = at;
    at += strcspn(at, spaces);
    if (*at) *at++ = '\0';
    at += strspn(at, spaces);
    at[strcspn(at, spaces)] = '\0';
    *text = at;
    return true;
}

/* All lines are read before the first one runs: a mistake shows at once. */
static void bench_file(bench_session *s, const char *path)
{
    enum { MAX_PROBLEMS = 1024 };
    problem *problems = data_alloc(MAX_PROBLEMS, sizeof *problems);
    FILE *f = fopen(path, "r");
    if (!f) tool_die(EXIT_USAGE, "--file: %s: %s", path, strerror(errno));
    char line[1024], place[64];
    int n = 0;
    for (int number = 1; fgets(line, sizeof line, f); number++) {
        const char *op, *text;
        if (!read_line(line, &op, &text)) continue;
        if (n == MAX_PROBLEMS) tool_die(EXIT_USAGE, "--file: expected at most %d problems", n);
        snprintf(place, sizeof place, "%.32s, line %d: ", path, number);
        problems[n++] = parse(place, op, text);
    }
    fclose(f);
    for (int i = 0; i < n; i++) bench_problem(s, &problems[i]);
    data_free(problems);
}

static void bench_command(const command *c)
{
    if (c->ceilings) tool_die(EXIT_USAGE, "bench: --ceilings belongs to info");
    if (!c->file == (c->num_words < 2)) tool_die(EXIT_USAGE, "bench: expected OP [PROBLEM], or --file FILE");
    problem p;
    if (!c->file) p = parse("", c->words[1], c->num_words > 2 ? c->words[2] : "");
    bench_session *s = bench_open(&c->bench);
    if (c->file)
        bench_file(s, c->file);
    else
        bench_problem(s, &p);
    bench_close(s);
}

int main(int argc, char **argv)
{
    command c = {.bench = {.seconds = 1}};
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
    if (c.num_words == 0) tool_die(EXIT_USAGE, "expected a command: info or bench; see qkv --help");
    check_isa(c.bench.isa);
    if (strcmp(c.words[0], "info") == 0)
        info(&c);
    else if (strcmp(c.words[0], "bench") == 0)
        bench_command(&c);
    else
        tool_die(EXIT_USAGE, "%s: expected info or bench; see qkv --help", c.words[0]);
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : EXIT_WRONG;
}
