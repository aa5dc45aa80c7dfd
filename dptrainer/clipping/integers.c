/* Integer vectors of bounded length, added up: what exact noise is drawn for. Compiled by integers.py.
 *
 * A record's vector is made in `room`, checked there by integer arithmetic, and added from there: what is added is what
 * was checked. Floating point only proposes; nothing that it gets wrong can make a vector longer than the bound.
 */
#include <math.h>
#include <stdint.h>

#define SHARE 16384 /* elements that a thread takes at a time */
#define BLOCK 512   /* squares of up to 2^54 are summed over so many in 64 bits */

struct piece { const void *values; int64_t count, start; double scale; int64_t doubles; };

/* trunc(value * scale), and 0 with `bad` for what is not finite or beyond the limit, which is below 2^27.5. */
#define QUANTISE(NAME, REAL)                                                                                      \
    static int NAME(const REAL *values, int64_t count, double scale, double limit, int32_t *room, uint64_t *low,  \
                    uint64_t *high)                                                                               \
    {                                                                                                             \
        int bad = 0;                                                                                              \
        for (int64_t begin = 0; begin < count; begin += BLOCK) {                                                  \
            int64_t end = count - begin < BLOCK ? count : begin + BLOCK;                                          \
            uint64_t squares = 0;                                                                                 \
            for (int64_t i = begin; i < end; i++) {                                                               \
                double x = (double)values[i] * scale;                                                             \
                int inside = fabs(x) <= limit; /* false for NaN */                                                \
                int32_t v = (int32_t)(inside ? x : 0.0);                                                          \
                bad |= !inside;                                                                                   \
                room[i] = v;                                                                                      \
                squares += (uint64_t)((int64_t)v * v);                                                            \
            }                                                                                                     \
            *low += squares & 0xffffffff;                                                                         \
            *high += squares >> 32;                                                                               \
        }                                                                                                         \
        return bad;                                                                                               \
    }

QUANTISE(quantise_float, float)
QUANTISE(quantise_double, double)

/* sum += the vector of all pieces if its squared length is at most `bound`, which is below 2^55; whether it was.
 *
 * Piece p goes to room and sum from its start on. Squares are summed in two halves: 2^31 blocks, the most that a model of
 * 2^40 parameters has, keep either half below 2^63.
 */
int add_vector(const struct piece *pieces, int64_t pieces_count, uint64_t bound, double limit, int32_t *room,
               int64_t *sum, int64_t size, int threads)
{
    uint64_t low = 0, high = 0;
    int bad = 0;
    (void)threads; /* a compiler without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : low, high) reduction(| : bad)
    for (int64_t p = 0; p < pieces_count; p++) {
        struct piece q = pieces[p];
#pragma omp for schedule(static) nowait
        for (int64_t share = 0; share < (q.count + SHARE - 1) / SHARE; share++) {
            int64_t start = share * SHARE, count = q.count - start < SHARE ? q.count - start : SHARE;
            int32_t *here = room + q.start + start;
            bad |= q.doubles
                       ? quantise_double((const double *)q.values + start, count, q.scale, limit, here, &low, &high)
                       : quantise_float((const float *)q.values + start, count, q.scale, limit, here, &low, &high);
        }
    }
    high += low >> 32;
    int fits = !bad && high >> 32 == 0 && (high << 32 | (low & 0xffffffff)) <= bound;
    int32_t mask = -fits; /* no branch: a record that is left out costs what another costs */
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < size; i++)
        sum[i] += room[i] & mask;
    return fits;
}

/* squares[p] = the squared norm of piece p, in binary64; not finite where a value is not. */
void squared_norms(const struct piece *pieces, int64_t pieces_count, double *squares)
{
    for (int64_t p = 0; p < pieces_count; p++) {
        struct piece q = pieces[p];
        double total = 0.0;
        for (int64_t begin = 0; begin < q.count; begin += BLOCK) {
            int64_t end = q.count - begin < BLOCK ? q.count : begin + BLOCK;
            double lanes[8] = {0}, part = 0.0;
            int64_t i = begin;
            for (; i + 8 <= end; i += 8)
                for (int l = 0; l < 8; l++) {
                    double x = q.doubles ? ((const double *)q.values)[i + l] : ((const float *)q.values)[i + l];
                    lanes[l] += x * x;
                }
            for (int l = 0; l < 8; l++)
                part += lanes[l];
            for (; i < end; i++) {
                double x = q.doubles ? ((const double *)q.values)[i] : ((const float *)q.values)[i];
                part += x * x;
            }
            total += part;
        }
        squares[p] = total;
    }
}
