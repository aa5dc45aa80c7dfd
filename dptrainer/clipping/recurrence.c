/* What a step of an LSTM does to each element, in one pass; the products with the state are the library's.
 *
 * Compiled after rows.c. Gates lie one after another, in the order i, f, o, g of recurrence.py. Exponentials have a
 * relative error of a few units in the last place; tanh near 0 is the polynomial of Moshier's Cephes (tanhf).
 */
static inline floats splat(float x) { return (floats){0} + x; }
static inline floats choose(ints mask, floats yes, floats no)
{
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}
static inline floats magnitude(floats x) { return (floats)((ints)x & 0x7fffffff); }

/* e^x for x <= 0, from 2^n e^r with |r| <= ln 2 / 2; 0 below -87, NaN for NaN. */
static inline floats exponential(floats x)
{
    floats shifted = choose(x > -87.0f, x, splat(-87.0f)) * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    floats scale = (floats)(((ints)shifted + (127 - 0x4b400000)) << 23);
    return choose(x != x, x, choose(x > -87.0f, p * scale, splat(0.0f)));
}

static inline floats logistic(floats x)
{
    floats e = exponential(-magnitude(x));
    return choose(x < 0, e, splat(1.0f)) / (1.0f + e);
}

static inline floats tangent(floats x)
{
    floats a = magnitude(x), e = exponential(-2.0f * a), z = x * x, large = (1.0f - e) / (1.0f + e);
    floats p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    large = (floats)((ints)large | ((ints)x & (int32_t)0x80000000));
    return choose(a < 0.625f, p * z * x + x, large);
}

/* The gates squashed in place; c' = f c + i g, its tanh, and h = o tanh c'. */
void lstm_forward(float *gates, const float *c, float *c_next, float *tanh_c, float *h, int64_t count, int threads)
{
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t j = 0; j < count; j += WIDE) {
        int64_t left = count - j < WIDE ? count - j : WIDE;
        floats v[5] = {{0}};
        for (int k = 0; k < 4; k++)
            memcpy(&v[k], gates + k * count + j, (size_t)left * sizeof(float));
        memcpy(&v[4], c + j, (size_t)left * sizeof(float));
        for (int k = 0; k < 3; k++)
            v[k] = logistic(v[k]);
        v[3] = tangent(v[3]);
        floats next = v[1] * v[4] + v[0] * v[3], squashed = tangent(next), out = v[2] * squashed;
        for (int k = 0; k < 4; k++)
            memcpy(gates + k * count + j, &v[k], (size_t)left * sizeof(float));
        memcpy(c_next + j, &next, (size_t)left * sizeof(float));
        memcpy(tanh_c + j, &squashed, (size_t)left * sizeof(float));
        memcpy(h + j, &out, (size_t)left * sizeof(float));
    }
}

static void cell_backward(const float *restrict i, const float *restrict f, const float *restrict o,
                          const float *restrict g, const float *restrict c, const float *restrict squashed,
                          const float *restrict incoming, float *restrict dh, float *restrict dc,
                          float *restrict to, int64_t width)
{
    for (int64_t j = 0; j < width; j++) {
        float u = dh[j] + incoming[j], s = dc[j] + u * (o[j] * (1 - squashed[j] * squashed[j]));
        dh[j] = u;
        dc[j] = s * f[j];
        to[j] = s * (g[j] * (i[j] * (1 - i[j])));
        to[width + j] = s * (c[j] * (f[j] * (1 - f[j])));
        to[2 * width + j] = s * (i[j] * (1 - g[j] * g[j]));
        to[3 * width + j] = u * (squashed[j] * (o[j] * (1 - o[j])));
    }
}

/* dh += incoming; dc += dh o (1 - tanh^2 c); the gradients of the gates before their squashing to found [rows, 4 width]
 * in the order i, f, g, o; and dc for the step before. */
void lstm_backward(const float *gates, const float *c, const float *tanh_c, const float *incoming, float *dh, float *dc,
                   float *found, int64_t rows, int64_t width, int threads)
{
    int64_t count = rows * width;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * width;
        const float *i = gates + at;
        cell_backward(i, i + count, i + 2 * count, i + 3 * count, c + at, tanh_c + at, incoming + at, dh + at, dc + at,
                      found + 4 * at, width);
    }
}
