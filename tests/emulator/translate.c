/* translate.c - see translate.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "translate.h"

#include <ctype.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct span {
    const char *begin, *end;
} span;

static int length(span s)
{
    return (int)(s.end - s.begin);
}

/* Past white space and the backslashes of a macro's lines. */
static const char *skip(const char *at)
{
    while (isspace((unsigned char)*at) || (*at == '\\' && at[1] == '\n')) at++;
    return at;
}

static const char *skip_word(const char *at, const char *word)
{
    at = skip(at);
    const size_t n = strlen(word);
    return strncmp(at, word, n) == 0 ? at + n : NULL;
}

static bool in_name(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

static span name_at(const char *at)
{
    span s = {skip(at), skip(at)};
    while (in_name(*s.end)) s.end++;
    return s;
}

/* What stands between a parenthesis and its partner; at is at the first. */
static span parentheses(const char *at)
{
    int depth = 0;
    span s = {at + 1, at + 1};
    for (; *at; at++) {
        depth += (*at == '(') - (*at == ')');
        s.end = at;
        if (depth == 0) break;
    }
    return s;
}

/* The last name of "type name" and what stands before it. */
static void split(span s, span *type, span *name)
{
    while (s.end > s.begin && !in_name(s.end[-1])) s.end--;
    *name = (span){s.end, s.end};
    while (name->begin > s.begin && in_name(name->begin[-1])) name->begin--;
    *type = (span){s.begin, name->begin};
    while (type->end > type->begin && isspace((unsigned char)type->end[-1])) type->end--;
}

/* Each finds its declaration at `at`, writes what replaces it, and returns its end; NULL: none there. */
static const char *kernel(const char *at, char *to)
{
    static const char *const words[] = {"extern", "\"C\"", "__global__", "void"};
    span bounds = {"1024", NULL}, type, name;
    for (size_t i = 0; at && i < sizeof words / sizeof words[0]; i++) at = skip_word(at, words[i]);
    if (!at) return NULL;
    bounds.end = bounds.begin + 4;
    const char *bounded = skip_word(at, "__launch_bounds__");
    if (bounded) {
        bounds = parentheses(skip(bounded));
        at = bounds.end + 1;
    }
    const span entry = name_at(at);
    const char *open = skip(entry.end);
    if (*open != '(') return NULL;
    const span arguments = parentheses(open);
    split(arguments, &type, &name);
    for (const char *next; (next = skip_word(type.begin, "const")) != NULL ||
                           (next = skip_word(type.begin, "__grid_constant__")) != NULL;)
        type.begin = next;
    type.begin = skip(type.begin);
    sprintf(to, "EMULATOR_KERNEL(%.*s, %.*s, %.*s, %.*s)", length(entry), entry.begin, length(type),
            type.begin, length(name), name.begin, length(bounds), bounds.begin);
    return arguments.end + 1;
}

static const char *shared_array(const char *at, char *to)
{
    span type, name;
    at = skip_word(at, "extern");
    if (at) at = skip_word(at, "__shared__");
    if (!at) return NULL;
    const char *aligned = skip_word(at, "__align__");
    int alignment = 0;
    if (aligned) {
        const span n = parentheses(skip(aligned));
        alignment = atoi(n.begin);
        at = n.end + 1;
    }
    const char *end = strchr(at, '[');
    if (!end || strncmp(end, "[];", 3) != 0) return NULL;
    split((span){skip(at), end}, &type, &name);
    sprintf(to, "EMULATOR_SHARED(%.*s, %.*s, %d);", length(type), type.begin, length(name),
            name.begin, alignment);
    return end + 3;
}

char *translate(const char *text)
{
    char *out = malloc(4 * strlen(text) + 64), *to = out; /* no replacement is four times as long */
    if (!out) return NULL;
    for (const char *at = text; *at;) {
        const char *end = NULL;
        if (*at == 'e' && (at == text || !in_name(at[-1]))) end = kernel(at, to);
        if (*at == 'e' && !end && (at == text || !in_name(at[-1]))) end = shared_array(at, to);
        if (!end) {
            *to++ = *at++;
            continue;
        }
        to += strlen(to);
        for (; at < end; at++) /* lines keep their numbers */
            if (*at == '\n') {
                if (at[-1] == '\\') *to++ = '\\';
                *to++ = '\n';
            }
    }
    *to = '\0';
    return out;
}
