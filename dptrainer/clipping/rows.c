/* Per-example gradients: squares of rows, weighted sums of rows, equal lookups of an embedding added up.
 *
 * Compiled by native.py; every function has a counterpart in PyTorch that tests hold it against. Loops are written with
 * vectors of the compiler, since it may not reorder sums of floating-point numbers by itself.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t ints __attribute__((vector_size(4 * WIDE)));
typedef double doubles __attribute__((vector_size(8 * WIDE)));

static inline floats load(const float *from) { floats v; memcpy(&v, from, sizeof v); return v; }
static inline void store(float *to, floats v) { memcpy(to, &v, sizeof v); }

/* Zeros in place of NaN and inf, of which v - v is not zero. */
static inline floats cleaned(floats v) { ints keep = (v - v) == 0; return (floats)((ints)v & keep); }
static inline float cleaned_one(float x) { return x - x == 0 ? x : 0; }

/* Sum of squares in double. */
static double squares(const float *row, int64_t count)
{
    doubles sums[2] = {{0}, {0}};
    double total = 0;
    int64_t j = 0;
    for (; j + 2 * WIDE <= count; j += 2 * WIDE)
        for (int k = 0; k < 2; k++) {
            doubles x = __builtin_convertvector(load(row + j + k * WIDE), doubles);
            sums[k] += x * x;
        }
    for (; j + WIDE <= count; j += WIDE) {
        doubles x = __builtin_convertvector(load(row + j), doubles);
        sums[0] += x * x;
    }
    for (; j < count; j++)
        total += (double)row[j] * row[j];
    sums[0] += sums[1];
    for (int k = 0; k < WIDE; k++)
        total += sums[0][k];
    return total;
}

/* out[i] = ||row i||^2 */
void row_squares(const float *rows, int64_t count, int64_t width, double *out, int threads)
{
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++)
        out[i] = squares(rows + i * width, width);
}

/* out[i] = sum of row i, in double */
void row_sums(const float *rows, int64_t count, int64_t width, float *out, int threads)
{
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        const float *row = rows + i * width;
        doubles sums = {0};
        double total = 0;
        int64_t j = 0;
        for (; j + WIDE <= width; j += WIDE)
            sums += __builtin_convertvector(load(row + j), doubles);
        for (; j < width; j++)
            total += row[j];
        for (int k = 0; k < WIDE; k++)
            total += sums[k];
        out[i] = (float)total;
    }
}

/* out[i][j] = weights[i] cleaned(rows[i][j]); weights NULL for 1 */
void scaled(const float *rows, const float *weights, int64_t count, int64_t width, float *out, int threads)
{
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        float weight = weights ? weights[i] : 1;
        int64_t j = 0;
        for (; j + WIDE <= width; j += WIDE)
            store(out + i * width + j, weight * cleaned(load(rows + i * width + j)));
        for (; j < width; j++)
            out[i * width + j] = weight * cleaned_one(rows[i * width + j]);
    }
}

#define COLUMNS (8 * WIDE)

/* out[j] = or, unless fresh, += sum_i weights[i] cleaned(rows[i][j]) */
void weighted_sum(const float *rows, const float *weights, int64_t count, int64_t width, float *out, int fresh,
                  int threads)
{
    int64_t whole = width / COLUMNS * COLUMNS;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < whole; first += COLUMNS) {
        floats sums[8];
        for (int k = 0; k < 8; k++)
            sums[k] = fresh ? (floats){0} : load(out + first + k * WIDE);
        for (int64_t i = 0; i < count; i++)
            for (int k = 0; k < 8; k++)
                sums[k] += weights[i] * cleaned(load(rows + i * width + first + k * WIDE));
        for (int k = 0; k < 8; k++)
            store(out + first + k * WIDE, sums[k]);
    }
    for (int64_t j = whole; j < width; j++)
        out[j] = fresh ? 0 : out[j];
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = whole; j < width; j++)
            out[j] += weights[i] * cleaned_one(rows[i * width + j]);
}

/* Adds up the rows with equal (example, index), in the order in which pairs come first; returns how many there are.
 *
 * slots: 2^bits numbers, at least twice as many as rows. Places in it follow from factor, an odd random number.
 * found: [rows] of example, index and values.
 */
int64_t add_equal(const int64_t *example, const int64_t *index, const float *rows, int64_t count, int64_t width,
                  int64_t *slots, int bits, uint64_t factor, int64_t *examples, int64_t *indices, float *values)
{
    uint64_t mask = ((uint64_t)1 << bits) - 1;
    int64_t found = 0;
    memset(slots, 0xff, sizeof(int64_t) << bits);
    for (int64_t t = 0; t < count; t++) {
        uint64_t place = (((uint64_t)example[t] * 0x9e3779b97f4a7c15u + (uint64_t)index[t]) * factor) >> (64 - bits);
        while (slots[place] >= 0 && (examples[slots[place]] != example[t] || indices[slots[place]] != index[t]))
            place = (place + 1) & mask;
        const float *from = rows + t * width;
        if (slots[place] < 0) {
            slots[place] = found;
            examples[found] = example[t];
            indices[found] = index[t];
            memcpy(values + found++ * width, from, (size_t)width * sizeof(float));
        } else {
            float *to = values + slots[place] * width;
            for (int64_t j = 0; j < width; j++)
                to[j] += from[j];
        }
    }
    return found;
}

/* out[example] += ||row||^2; 0 where there is no such example, of `examples`. */
int add_squares(const int64_t *example, const float *rows, int64_t count, int64_t width, double *out, int64_t examples)
{
    for (int64_t t = 0; t < count; t++) {
        if (example[t] < 0 || example[t] >= examples)
            return 0;
        out[example[t]] += squares(rows + t * width, width);
    }
    return 1;
}

/* table[index] += weights[example] cleaned(row); 0 where there is no such example or row of the table. */
int add_rows(const int64_t *example, const int64_t *index, const float *weights, const float *rows, int64_t count,
             int64_t width, float *table, int64_t examples, int64_t table_rows)
{
    for (int64_t t = 0; t < count; t++) {
        if (example[t] < 0 || example[t] >= examples || index[t] < 0 || index[t] >= table_rows)
            return 0;
        float weight = weights[example[t]], *to = table + index[t] * width;
        const float *from = rows + t * width;
        for (int64_t j = 0; j < width; j++)
            to[j] += weight * cleaned_one(from[j]);
    }
    return 1;
}
