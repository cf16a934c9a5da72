/* sha256.h - SHA-256 (FIPS 180-4), for names and checks of cache entries.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_SHA256_H
#define QI_BASE_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct qi_sha256 {
    uint32_t state[8];
    uint64_t bytes; /* added so far */
    unsigned char block[64];
} qi_sha256;

void qi_sha256_init(qi_sha256 *hash);
void qi_sha256_add(qi_sha256 *hash, const void *data, size_t bytes);

/* The digest as 64 hex digits and a zero byte. The hash is spent. */
void qi_sha256_hex(qi_sha256 *hash, char out[65]);

#endif
