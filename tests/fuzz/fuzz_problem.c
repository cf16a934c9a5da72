/* fuzz_problem.c - libFuzzer: any string is refused with a message or is a problem, and what that
 * prints is the same problem. The first byte chooses the operator. Built and run by tools/fuzz.sh.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "problem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int num_ops = 0;
    while (problem_op(num_ops, NULL, NULL)) num_ops++;
    if (size == 0) return 0;
    const char *op = problem_op(data[0] % num_ops, NULL, NULL);
    char *text = malloc(size), error[PROBLEM_ERROR] = "";
    if (!text) abort();
    memcpy(text, data + 1, size - 1);
    text[size - 1] = '\0';
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
