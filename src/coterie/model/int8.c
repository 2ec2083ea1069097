// Products by a matrix of whole numbers in 8 bits, a scale and an offset for every 32 of a row: out = x W^T.
//
// Notable: few rows wait for memory, and such a matrix has 1.25 bytes a number where float32 has 4. Whole numbers are
// widened in registers, once for all rows of a tile, and inputs and sums stay in float32; a group's offset multiplies
// the sum of its inputs. A row's sum runs in the same order whatever else is in the batch.
//
// Layout of a matrix (out, in): blocks of 16 outputs, the last filled up with zeros: w [out/16][in][16], and the groups'
// scales and offsets [out/16][groups][2][16] (int8.py packs it).
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { GROUP = 32 };              // inputs that share a scale
enum { AHEAD = 2048, ROWS = 6 };  // numbers asked of memory before their turn; rows of a tile, as registers allow

typedef struct {
    int64_t in, out;
    const int8_t *w;
    const float *scales;
} Matrix;

static inline __m256 widened(const int8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}

// Blocks [first, first + blocks) of outputs for m rows, whose inputs' sums by group are `sums` (m, groups). blocks * m
// are at most 6 pairs of sums; with fewer, instructions would wait for each other.
static inline __attribute__((always_inline)) void
tile(const int m, const int blocks, const Matrix *a, int64_t first, const float *x, const float *sums, float *out) {
    __m256 total[ROWS][2];
    const int64_t in = a->in, groups = (in + GROUP - 1) / GROUP;
    const int8_t *w = a->w + first * in * 16;
#pragma GCC unroll 6
    for (int i = 0; i < m * blocks; i++) total[i][0] = total[i][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m256 low[ROWS], high[ROWS];
        int64_t end = (g + 1) * GROUP < in ? (g + 1) * GROUP : in;
#pragma GCC unroll 6
        for (int i = 0; i < m * blocks; i++) low[i] = high[i] = _mm256_setzero_ps();
        for (int64_t k = g * GROUP; k < end; k++, w += 16) {
#pragma GCC unroll 4
            for (int b = 0; b < blocks; b++) {
                __m256 l = widened(w + b * in * 16), h = widened(w + b * in * 16 + 8);
                _mm_prefetch((const char *)(w + b * in * 16 + AHEAD), _MM_HINT_T0);
#pragma GCC unroll 6
                for (int i = 0; i < m; i++) {
                    __m256 v = _mm256_broadcast_ss(x + i * in + k);
                    low[b * m + i] = _mm256_fmadd_ps(l, v, low[b * m + i]);
                    high[b * m + i] = _mm256_fmadd_ps(h, v, high[b * m + i]);
                }
            }
        }
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) {
            const float *scale = a->scales + ((first + b) * groups + g) * 32, *offset = scale + 16;
            __m256 s0 = _mm256_loadu_ps(scale), s1 = _mm256_loadu_ps(scale + 8);
            __m256 o0 = _mm256_loadu_ps(offset), o1 = _mm256_loadu_ps(offset + 8);
#pragma GCC unroll 6
            for (int i = 0; i < m; i++) {
                __m256 v = _mm256_broadcast_ss(sums + i * groups + g), *t = total[b * m + i];
                t[0] = _mm256_fmadd_ps(low[b * m + i], s0, _mm256_fmadd_ps(v, o0, t[0]));
                t[1] = _mm256_fmadd_ps(high[b * m + i], s1, _mm256_fmadd_ps(v, o1, t[1]));
            }
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++) {
        int64_t column = (first + b) * 16, columns = a->out - column < 16 ? a->out - column : 16;
#pragma GCC unroll 6
        for (int i = 0; i < m; i++) {
            float whole[16];
            _mm256_storeu_ps(whole, total[b * m + i][0]);
            _mm256_storeu_ps(whole + 8, total[b * m + i][1]);
            memcpy(out + i * a->out + column, whole, columns * sizeof(float));
        }
    }
}

// Up to 6 rows, and up to 4 blocks, as many at a time as registers allow.
static void few(int64_t rows, int64_t blocks, const Matrix *a, int64_t first, const float *x, const float *sums, float *out) {
    for (int64_t end = first + blocks; first < end;) {
#define TILE(m, n) { tile(m, n, a, first, x, sums, out); first += n; break; }
        switch (rows) {
            case 1: if (end - first >= 4) TILE(1, 4) else TILE(1, 1)
            case 2: if (end - first >= 2) TILE(2, 2) else TILE(2, 1)
            case 3: TILE(3, 1)
            case 4: TILE(4, 1)
            case 5: TILE(5, 1)
            default: TILE(6, 1)
        }
#undef TILE
    }
}

// out (rows, a->out) of x (rows, a->in).
void coterie_int8(const Matrix *a, int64_t rows, const float *x, float *out, int threads) {
    enum { TOGETHER = 4 };  // blocks: they stay in the first cache while all rows pass
    int64_t blocks = (a->out + 15) / 16, parts = (blocks + TOGETHER - 1) / TOGETHER;
    int64_t groups = (a->in + GROUP - 1) / GROUP;
    float sums[rows * groups];
    for (int64_t n = 0; n < rows; n++)
        for (int64_t g = 0; g < groups; g++) {
            float sum = 0;
            for (int64_t k = g * GROUP; k < (g + 1) * GROUP && k < a->in; k++) sum += x[n * a->in + k];
            sums[n * groups + g] = sum;
        }
    const float *of = sums;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        int64_t first = p * TOGETHER, count = blocks - first < TOGETHER ? blocks - first : TOGETHER;
        if (rows <= 2) few(rows, count, a, first, x, of, out);
        else for (int64_t b = first; b < first + count; b++)
            for (int64_t n = 0; n < rows; n += ROWS)
                few(rows - n < ROWS ? rows - n : ROWS, 1, a, b, x + n * a->in, of + n * groups, out + n * a->out);
    }
}
