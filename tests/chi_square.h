/* chi_square.h - do counts follow a distribution? Of many such tests: are their p-values those of true hypotheses?
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CHI_SQUARE_H
#define QKV_TESTS_CHI_SQUARE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* Q(a, x), the regularised upper incomplete gamma function: by its series, or its continued fraction (Lentz). */
static inline double upper_gamma(double a, double x)
{
    if (x <= 0) return 1;
    const double scale = exp(a * log(x) - x - lgamma(a));
    if (x < a + 1) {
        double term = 1 / a, sum = term;
        for (double n = a + 1; term > sum * 1e-15; n++) sum += term *= x / n;
        return 1 - scale * sum;
    }
    double b = x + 1 - a, c = 1e300, d = 1 / b, h = d;
    for (int i = 1; i < 1000; i++) {
        const double an = -i * (i - a);
        b += 2;
        d = 1 / (an * d + b);
        c = b + an / c;
        h *= c * d;
        if (fabs(c * d - 1) < 1e-15) break;
    }
    return scale * h;
}

/*
 * How probable it is that draws of n outcomes with probabilities p differ from what is expected at least as much as
 * seen. Outcomes of which fewer than 8 are expected are one together. -1: there is but one; -2: something was seen
 * that has no probability.
 */
static inline double chi_square_p(const int64_t *seen, const double *p, int64_t n, int64_t draws)
{
    enum { FEWEST = 8 };
    double sum = 0, rest = 0, rest_seen = 0;
    int bins = 0;
    for (int64_t i = 0; i < n; i++) {
        const double expected = p[i] * (double)draws, d = (double)seen[i] - expected;
        if (seen[i] > 0 && p[i] <= 0) return -2;
        if (expected >= FEWEST) {
            sum += d * d / expected;
            bins++;
        } else {
            rest += expected;
            rest_seen += (double)seen[i];
        }
    }
    if (rest >= FEWEST) { /* what is less is left out: the test is a little weaker */
        sum += (rest_seen - rest) * (rest_seen - rest) / rest;
        bins++;
    }
    return bins < 2 ? -1 : upper_gamma((bins - 1) / 2.0, sum / 2);
}

static inline int chi_square_by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* How probable it is that n numbers drawn from [0, 1) lie at least as far from evenly as these (Kolmogorov and
 * Smirnov; Stephens' formula for n of 5 and more). Sorts them. */
static inline double uniform_p(double *x, int64_t n)
{
    double d = 0, sum = 0;
    qsort(x, (size_t)n, sizeof *x, chi_square_by_size);
    for (int64_t i = 0; i < n; i++)
        d = fmax(d, fmax(x[i] - (double)i / (double)n, (double)(i + 1) / (double)n - x[i]));
    const double root = sqrt((double)n), z = (root + 0.12 + 0.11 / root) * d;
    for (int k = 1; k < 100; k++) sum += (k % 2 ? 2 : -2) * exp(-2.0 * k * k * z * z);
    return fmin(fmax(sum, 0), 1);
}

#endif
