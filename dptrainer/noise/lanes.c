/* Binary64 numbers and their bits, in loops that compilers turn into vector code. Compiled after chacha.c. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static double number(int64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static int64_t bits_of(double x) { int64_t b; memcpy(&b, &x, 8); return b; }

/* (double)n: most vector units cannot convert 64-bit integers. Halves as the low bits of 2^84 and 2^52, one rounding. */
static double real(int64_t n)
{
#if defined(__AVX512DQ__) || defined(__aarch64__)
    return (double)n;
#else
    double high = number((int64_t)(((uint64_t)n >> 32) ^ 0x80000000) | 0x4530000000000000);
    return high - 19342822341709703277445120.0 + number((n & 0xffffffff) | 0x4330000000000000);
#endif
}

static double small(int64_t n) { return number(0x4338000000000000 + n) - 6755399441055744.0; } /* |n| < 2^51 */
