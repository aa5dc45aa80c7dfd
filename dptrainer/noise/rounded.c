/* Rounded Gaussian values in place from keystream words, as bounded.py computes them, to the bits of the integers.
 *
 * Compiled by rounded_native.py, which puts the constants, chacha.c and lanes.c before this text. A compiler may fuse
 * products and sums: the bound that bounded.py names holds either way, and what is within four times the bound of a
 * half-integer is not added but listed, for ziv.py to finish.
 */
#define BLOCKS 32 /* of a tile, a multiple of WIDE: 128 pairs, whose buffers stay in the first-level cache */
#define LANES (4 * BLOCKS)

/* Of every value the integer nearest to it, modulo 2^64, and how far it is from that plus the margin: doubtful from 1/2 on. */
struct tile { char words[64 * BLOCKS]; uint64_t k[LANES], a[LANES], nearest[2 * LANES]; double off[2 * LANES]; };

static double radius(int64_t k)
{
    double d = real(~k);
    int64_t bits = bits_of(d), sign = bits >> 63;
    int64_t e = ((bits >> 52) + 962) & sign;
    double h = d * number((959 - e) << 52) + number(sign & 0x3ff0000000000000);
    double z = h / (2.0 - h), w = z * z;
    double p = (((((L10 * w + L9) * w + L8) * w + L7) * w + L6) * w + L5) * w + L4;
    return sqrt(((((p * w + L3) * w + L2) * w + L1) * w + L0) * z + small(e) * MINUS_2_LN_2);
}

static void round_pairs(struct tile *t, double scale)
{
    const double slope = SLOPE * scale, least = LEAST * scale;
    const uint64_t half = 1ull << 61, top = 1ull << 63;
    for (int i = 0; i < LANES; i++) {
        double r = radius((int64_t)t->k[i]), scaled = r * scale;
        double margin = r >= R_MIN && r <= R_MAX ? r * slope + least : 1.0;
        uint64_t turned = t->a[i] + half, odd = -(turned >> 62 & 1); /* the top two bits count quadrants */
        double n = real((int64_t)((turned & (2 * half - 1)) - half)) * 0x1p-61, w = n * n;
        double s = ((((((S6 * w + S5) * w + S4) * w + S3) * w + S2) * w + S1) * w + S0) * n;
        double c = 1.0 - ((((((V6 * w + V5) * w + V4) * w + V3) * w + V2) * w + V1) * w + V0) * w;
        uint64_t cosine = (uint64_t)bits_of(c), sine = (uint64_t)bits_of(s), swap = (cosine ^ sine) & odd;
        double x = scaled * number((int64_t)(cosine ^ swap ^ ((turned ^ turned << 1) & top)));
        double y = scaled * number((int64_t)(sine ^ swap ^ (turned & top)));
        double with_x = x + MAGIC, with_y = y + MAGIC;
        t->off[2 * i] = fabs(x - (with_x - MAGIC)) + margin;
        t->off[2 * i + 1] = fabs(y - (with_y - MAGIC)) + margin;
        t->nearest[2 * i] = (uint64_t)bits_of(with_x) - 0x4338000000000000;
        t->nearest[2 * i + 1] = (uint64_t)bits_of(with_y) - 0x4338000000000000;
    }
}

static void gather(struct tile *t, const char *words, int blocks)
{
    for (int b = 0; b < blocks; b++) {
        memcpy(t->k + 4 * b, words + 64 * b, 32);
        memcpy(t->a + 4 * b, words + 64 * b + 32, 32);
    }
}

struct piece { uint64_t *out; int64_t count; uint64_t block; int64_t skip; uint32_t stream; };
struct place { int64_t piece, element; };
/* Where doubtful elements are listed: found may exceed room, which the list does not. */
struct doubts { struct place *list; int64_t room, found; };

static void doubt(struct doubts *d, int64_t piece, int64_t element)
{
    int64_t at;
#pragma omp atomic capture
    at = d->found++;
    if (at < d->room)
        d->list[at] = (struct place){piece, element};
}

/* Values of `count` elements of a piece from element `start` on, the one `skip` after the start of `block`. */
static __attribute__((noinline)) void add_share(const struct cipher *c, uint64_t block, int64_t skip, int64_t count,
                                                double scale, uint64_t *out, int64_t piece, int64_t start,
                                                struct doubts *d)
{
    struct tile t;
    memset(t.k, 0, sizeof t.k + sizeof t.a); /* the rest of the last tile */
    for (int64_t done = -skip; done < count; done += 2 * LANES) { /* the tile's place in the share */
        int64_t left = (count - done + 7) / 8;
        int blocks = left < BLOCKS ? (int)left : BLOCKS;
        fill(c, block, blocks, t.words);
        block += BLOCKS;
        gather(&t, t.words, blocks);
        round_pairs(&t, scale);
        int from = done < 0 ? (int)-done : 0;
        int to = count - done < 2 * LANES ? (int)(count - done) : 2 * LANES;
        int64_t doubtful = 0;
        for (int i = from; i < to; i++)
            doubtful |= !(t.off[i] < 0.5);
        for (int i = from; doubtful && i < to; i++)
            if (!(t.off[i] < 0.5)) {
                t.nearest[i] = 0;
                doubt(d, piece, start + done + i);
            }
        for (int i = from; out && i < to; i++)
            out[start + done + i] += t.nearest[i];
    }
    erase(&t, sizeof t);
}

#define SHARE 16384 /* elements that a thread takes at a time: some 60 microseconds; rounded_native.py knows it */

/* Adds the values of every piece modulo 2^64, but for the doubtful ones: those are listed as far as there is room, and
 * counted. Pieces without memory are only looked at. What is added depends on addresses alone, so threads take shares
 * as they come. */
int64_t add_rounded(const char *key, const struct piece *pieces, int64_t pieces_count, double scale, int threads,
                    struct place *list, int64_t room)
{
    struct doubts d = {list, room, 0};
    (void)threads; /* a compiler without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces_count; i++) {
        struct piece p = pieces[i];
        struct cipher c;
        set_up(&c, key, p.stream);
#pragma omp for schedule(dynamic) nowait
        for (int64_t share = 0; share < (p.count + SHARE - 1) / SHARE; share++) {
            int64_t start = share * SHARE, count = p.count - start < SHARE ? p.count - start : SHARE;
            uint64_t block = p.block + (uint64_t)((start + p.skip) / 8);
            add_share(&c, block, (start + p.skip) % 8, count, scale, p.out, i, start, &d);
            erase_stack();
        }
        erase(&c, sizeof c);
    }
    return d.found;
}

/* The 8 * blocks values of given words: for the test of the arithmetic on words that no key is known for. */
void rounded_of(const char *words, int64_t blocks, double scale, uint64_t *nearest, double *off)
{
    struct tile t;
    memset(t.k, 0, sizeof t.k + sizeof t.a);
    for (int64_t done = 0; done < blocks; done += BLOCKS) {
        int now = blocks - done < BLOCKS ? (int)(blocks - done) : BLOCKS;
        gather(&t, words + 64 * done, now);
        round_pairs(&t, scale);
        memcpy(nearest + 8 * done, t.nearest, (size_t)now * 8 * sizeof(uint64_t));
        memcpy(off + 8 * done, t.off, (size_t)now * 8 * sizeof(double));
    }
}
