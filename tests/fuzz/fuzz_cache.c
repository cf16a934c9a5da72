/* fuzz_cache.c - libFuzzer: any bytes that stand as an entry are absent and removed, or are, byte for
 * byte, what qi_cache_write makes of the payload that is read.
 *
 * No guess finds a checksum. So an even first byte leaves the rest as the file, and an odd one makes
 * a true entry of the next byte's number of bytes, changed where the rest says. Built and run by
 * tools/fuzz.sh.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "jit/cache.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char key[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
static char folder[200], entry[300];

static void remove_folder(void)
{
    unlink(entry);
    rmdir(folder);
}

static void make_folder(void)
{
    const char *root = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/qkv-fuzz-XXXXXX", root ? root : "/tmp");
    if (!mkdtemp(folder)) abort();
    snprintf(entry, sizeof entry, "%s/%s", folder, key);
    atexit(remove_folder);
}

static void put_file(const uint8_t *bytes, size_t size)
{
    FILE *f = fopen(entry, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f) != 0 || chmod(entry, 0600) != 0)
        abort();
}

/* The file's bytes, in an allocation of their own. */
static uint8_t *get_file(size_t *size)
{
    struct stat st;
    FILE *f = fopen(entry, "rb");
    if (!f || fstat(fileno(f), &st) != 0) abort();
    *size = (size_t)st.st_size;
    uint8_t *bytes = malloc(*size + 1);
    if (!bytes || fread(bytes, 1, *size, f) != *size) abort();
    fclose(f);
    return bytes;
}

/* The file that the input stands for. */
static uint8_t *make_file(const uint8_t *data, size_t size, size_t *file_size)
{
    if (size < 2 || data[0] % 2 == 0) {
        *file_size = size > 0 ? size - 1 : 0;
        uint8_t *file = malloc(*file_size + 1);
        if (!file) abort();
        if (*file_size > 0) memcpy(file, data + 1, *file_size);
        return file;
    }
    const size_t rest = size - 2, payload = data[1] < rest ? data[1] : rest;
    if (!qi_cache_write(folder, key, data + 2, payload)) abort();
    uint8_t *file = get_file(file_size);
    for (size_t i = 2 + payload; i + 3 <= size; i += 3) /* where, and what to flip there */
        file[((size_t)data[i] << 8 | data[i + 1]) % *file_size] ^= data[i + 2];
    return file;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!folder[0]) make_folder();
    size_t file_size, again_size, payload_size;
    uint8_t *file = make_file(data, size, &file_size);
    put_file(file, file_size);
    void *payload;
    if (qi_cache_read(folder, key, &payload, &payload_size) == 1) {
        if (!qi_cache_write(folder, key, payload, payload_size)) abort();
        uint8_t *again = get_file(&again_size);
        if (again_size != file_size || memcmp(again, file, file_size) != 0) abort();
        free(again);
        free(payload);
    } else if (access(entry, F_OK) == 0) {
        abort();
    }
    free(file);
    return 0;
}
