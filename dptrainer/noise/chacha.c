/* The ChaCha20 keystream of RFC 8439, as many blocks at a time as a vector register has 32-bit lanes.
 *
 * Compiled in front of boxmuller.c by native.py, and of rounded.c by rounded_native.py. Addressing is that of chacha.py:
 * counter and second nonce word are the halves of the block index, the first nonce word is the stream. Lane b of every
 * vector belongs to block b of a batch.
 */
#include <stdint.h>
#include <string.h>

typedef uint32_t lanes __attribute__((vector_size(4 * WIDE)));

#ifndef FORMAT /* rounded_native.py names another */
#define FORMAT 1u
#endif
#define ROTATE(x, n) ((x) << (n) | (x) >> (32 - (n)))
#define QUARTER(a, b, c, d)                                                                                       \
    a += b; d ^= a; d = ROTATE(d, 16);                                                                            \
    c += d; b ^= c; b = ROTATE(b, 12);                                                                            \
    a += b; d ^= a; d = ROTATE(d, 8);                                                                             \
    c += d; b ^= c; b = ROTATE(b, 7);

struct cipher { uint32_t words[16]; };

static void set_up(struct cipher *c, const char *key, uint32_t stream)
{
    const uint32_t fixed[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    memcpy(c->words, fixed, 16);
    memcpy(c->words + 4, key, 32);
    c->words[12] = c->words[14] = 0;
    c->words[13] = stream;
    c->words[15] = FORMAT;
}

/* WIDE blocks from index `block` on, 64 bytes each. */
static void blocks_at(const struct cipher *c, uint64_t block, char *out)
{
    lanes start[16], x[16], ordinal;
    uint32_t found[16][WIDE];
    for (int i = 0; i < WIDE; i++)
        ordinal[i] = (uint32_t)i;
    for (int i = 0; i < 16; i++)
        start[i] = (lanes){0} + c->words[i];
    start[12] = (uint32_t)block + ordinal;
    start[14] = (uint32_t)(block >> 32) - (lanes)(start[12] < ordinal); /* a lane whose counter wrapped: -(-1) */
    for (int i = 0; i < 16; i++)
        x[i] = start[i];
    for (int round = 0; round < 20; round += 2) {
        QUARTER(x[0], x[4], x[8], x[12])
        QUARTER(x[1], x[5], x[9], x[13])
        QUARTER(x[2], x[6], x[10], x[14])
        QUARTER(x[3], x[7], x[11], x[15])
        QUARTER(x[0], x[5], x[10], x[15])
        QUARTER(x[1], x[6], x[11], x[12])
        QUARTER(x[2], x[7], x[8], x[13])
        QUARTER(x[3], x[4], x[9], x[14])
    }
    for (int i = 0; i < 16; i++) {
        x[i] += start[i];
        memcpy(found[i], &x[i], sizeof x[i]);
    }
    for (int b = 0; b < WIDE; b++)
        for (int i = 0; i < 16; i++)
            memcpy(out + 64 * b + 4 * i, &found[i][b], 4);
}

/* `count` blocks, rounded up to whole batches: `out` has room for them. */
static void fill(const struct cipher *c, uint64_t block, int64_t count, char *out)
{
    for (int64_t done = 0; done < count; done += WIDE)
        blocks_at(c, block + (uint64_t)done, out + 64 * done);
}

/* Overwrites secrets; the empty instruction keeps a compiler from leaving it out. */
static void erase(void *memory, size_t size)
{
    memset(memory, 0, size);
    __asm__ volatile("" : : "r"(memory) : "memory");
}

/* What compilers keep of key and words in registers and below the stack's end, where calls before this one were. */
static __attribute__((noinline)) void erase_stack(void)
{
    char below[16384];
    erase(below, sizeof below);
}

/* `count` blocks of keystream, for tests; `out` has room for 16 more. */
void keystream(const char *key, uint32_t stream, uint64_t block, int64_t count, char *out)
{
    struct cipher c;
    set_up(&c, key, stream);
    fill(&c, block, count, out);
    erase(&c, sizeof c);
}
