/* Noise in place from keystream words: the operations of boxmuller.py, one IEEE 754 binary64 rounding each.
 *
 * Compiled by native.py, which puts the constants, chacha.c and lanes.c before this text. Both state the same operations;
 * contraction to fused multiply-add is off, so that their results have the same bits. Loops over LANES pairs have no
 * branches and no calls: compilers turn them into vector code.
 */
#define BLOCKS 32            /* of a tile, a multiple of WIDE: 160 pairs, whose buffers stay in the first-level cache */
#define LANES (5 * BLOCKS)

struct tile { char words[64 * BLOCKS]; int64_t k[LANES]; int32_t a[LANES]; double z[2 * LANES]; };

static double radius(int64_t k)
{
    double d = real(~k);
    int64_t bits = bits_of(d), sign = bits >> 63;
    int64_t e = ((bits >> 52) + 962) & sign;
    double h = d * number((959 - e) << 52) + number(sign & 0x3ff0000000000000);
    double z = h / (2.0 - h), w = z * z;
    double p = (((((((L8 * w + L7) * w + L6) * w + L5) * w + L4) * w + L3) * w + L2) * w + L1) * w + L0;
    return sqrt(p * z + small(e) * MINUS_2_LN_2);
}

static void box_muller(struct tile *t)
{
    for (int i = 0; i < LANES; i++) {
        double r = radius(t->k[i]);
        double n = ((double)t->a[i] + 0.5) * TURN, w = n * n;
        double s = ((((((S6 * w + S5) * w + S4) * w + S3) * w + S2) * w + S1) * w + S0) * n;
        double cos2x = 1.0 - s * s, sin2x = s * sqrt(cos2x + 1.0), twice = sin2x + sin2x;
        t->z[2 * i] = r * (1.0 - twice * sin2x);
        t->z[2 * i + 1] = r * (twice * cos2x);
    }
}

static void gather(struct tile *t, const char *words, int blocks)
{
    for (int b = 0; b < blocks; b++) {
        memcpy(t->k + 5 * b, words + 64 * b, 40);
        memcpy(t->a + 5 * b, words + 64 * b + 40, 20);
    }
}

/* Noise of `count` elements of a stream, from the one `skip` after the start of `block` on; how many sums x it was
 * added to are not finite: of those x - x is not 0. */
#define ADD(NAME, REAL)                                                                                           \
    static __attribute__((noinline)) int64_t NAME(const struct cipher *c, uint64_t block, int64_t skip,           \
                                                  int64_t count, double std, REAL *out)                           \
    {                                                                                                             \
        struct tile t;                                                                                            \
        int64_t bad = 0;                                                                                          \
        memset(t.k, 0, sizeof t.k + sizeof t.a); /* the rest of the last tile */                                  \
        for (int64_t done = -skip; done < count; done += 2 * LANES) { /* the tile's place in out */               \
            int64_t left = (count - done + 9) / 10;                                                               \
            int blocks = left < BLOCKS ? (int)left : BLOCKS;                                                      \
            fill(c, block, blocks, t.words);                                                                      \
            block += BLOCKS;                                                                                      \
            gather(&t, t.words, blocks);                                                                          \
            box_muller(&t);                                                                                       \
            int from = done < 0 ? (int)-done : 0;                                                                 \
            int to = count - done < 2 * LANES ? (int)(count - done) : 2 * LANES;                                  \
            int32_t found = 0;                                                                                    \
            for (int i = from; i < to; i++) {                                                                     \
                REAL x = out[done + i];                                                                           \
                found |= x - x != 0;                                                                              \
                out[done + i] = (REAL)((double)x + t.z[i] * std);                                                 \
            }                                                                                                     \
            bad += found;                                                                                         \
        }                                                                                                         \
        erase(&t, sizeof t);                                                                                      \
        return bad;                                                                                               \
    }

ADD(add_float, float)
ADD(add_double, double)

struct piece { void *out; int64_t count; uint64_t block; int64_t skip; uint32_t stream; uint32_t doubles; };

#define SHARE 16384 /* elements that a thread takes at a time: some 50 microseconds; native.py knows it */

/* Noise for every piece; 0 if one of the sums was not finite, which must not be released then. What is added depends
 * on addresses alone, so threads take shares as they come. */
int add_noise(const char *key, const struct piece *pieces, int64_t pieces_count, double std, int threads)
{
    int64_t bad = 0;
    (void)threads; /* a compiler without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : bad)
    for (int64_t i = 0; i < pieces_count; i++) {
        struct piece p = pieces[i];
        struct cipher c;
        set_up(&c, key, p.stream);
#pragma omp for schedule(dynamic) nowait
        for (int64_t share = 0; share < (p.count + SHARE - 1) / SHARE; share++) {
            int64_t start = share * SHARE, count = p.count - start < SHARE ? p.count - start : SHARE;
            uint64_t block = p.block + (uint64_t)((start + p.skip) / 10);
            int64_t skip = (start + p.skip) % 10;
            bad += p.doubles ? add_double(&c, block, skip, count, std, (double *)p.out + start)
                             : add_float(&c, block, skip, count, std, (float *)p.out + start);
            erase_stack();
        }
        erase(&c, sizeof c);
    }
    return bad == 0;
}

/* The 10 * blocks values of given words: for the test of the arithmetic on words that no key is known for. */
void values_of(const char *words, int64_t blocks, double *out)
{
    struct tile t;
    memset(t.k, 0, sizeof t.k + sizeof t.a);
    for (int64_t done = 0; done < blocks; done += BLOCKS) {
        int now = blocks - done < BLOCKS ? (int)(blocks - done) : BLOCKS;
        gather(&t, words + 64 * done, now);
        box_muller(&t);
        memcpy(out + 10 * done, t.z, (size_t)now * 10 * sizeof(double));
    }
}
