/* fuzz_problem.c - libFuzzer: any string is refused with a message or is a problem, and what that
 * prints is the same problem. An operator and a blank may stand in front, as in bench/problems; else
 * the first byte chooses one. Built and run by tools/fuzz.sh.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "problem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The operator, and how many bytes of the input name it. */
static const char *operator_of(const uint8_t *data, size_t size, size_t *word)
{
    const char *op;
    int num_ops = 0;
    for (; (op = problem_op(num_ops, NULL, NULL)); num_ops++) {
        const size_t n = strlen(op);
        if (size > n && memcmp(data, op, n) == 0 && data[n] == ' ') {
            *word = n + 1;
            return op;
        }
    }
    *word = size > 0;
    return problem_op(size > 0 ? data[0] % num_ops : 0, NULL, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t word = 0;
    const char *op = operator_of(data, size, &word);
    char *text = malloc(size - word + 1), error[PROBLEM_ERROR] = "";
    if (!text) abort();
    if (size > word) memcpy(text, data + word, size - word);
    text[size - word] = '\0';
    problem p, again;
    char printed[PROBLEM_TEXT], twice[PROBLEM_TEXT];
    if (problem_parse(op, text, &p, error)) {
        problem_print(&p, printed);
        if (!problem_parse(op, printed, &again, error)) abort();
        problem_print(&again, twice);
        if (strcmp(printed, twice) != 0 || strcmp(again.op, op) != 0) abort();
    } else if (!error[0]) {
        abort();
    }
    free(text);
    return 0;
}
