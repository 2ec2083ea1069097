// Products by a matrix of whole numbers in 8 bits: out = x W^T, each output multiplied by its scale.
//
// Notable: few rows wait for memory, and a number of 8 bits is a quarter of one in float32. It is widened in registers,
// once for all rows of a tile, and inputs and sums stay in float32. A row's sum runs in the same order whatever else is
// in the batch.
//
// Layout of a matrix (out, in): blocks of 16 outputs, [out/16][in][16], the last filled up with zeros (int8.py packs it).
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { AHEAD = 2048, ROWS = 6 };  // numbers asked of memory before their turn; rows of a tile, as registers allow

typedef struct {
    int64_t in, out;
    const int8_t *w;
    const float *scale;  // (out), filled up with zeros to a multiple of 16
} Matrix;

static inline __m256 widened(const int8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}

// Blocks [first, first + blocks) of outputs for m rows. blocks * m are at most 6 pairs of sums; with fewer, instructions
// would wait for each other.
static inline __attribute__((always_inline)) void
tile(const int m, const int blocks, const Matrix *a, int64_t first, const float *x, float *out) {
    __m256 low[ROWS], high[ROWS];
    const int64_t in = a->in;
    const int8_t *w = a->w + first * in * 16;
#pragma GCC unroll 6
    for (int i = 0; i < m * blocks; i++) low[i] = high[i] = _mm256_setzero_ps();
    for (int64_t k = 0; k < in; k++, w += 16) {
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
        int64_t column = (first + b) * 16, columns = a->out - column < 16 ? a->out - column : 16;
#pragma GCC unroll 6
        for (int i = 0; i < m; i++) {
            float scaled[16];
            _mm256_storeu_ps(scaled, _mm256_mul_ps(low[b * m + i], _mm256_loadu_ps(a->scale + column)));
            _mm256_storeu_ps(scaled + 8, _mm256_mul_ps(high[b * m + i], _mm256_loadu_ps(a->scale + column + 8)));
            memcpy(out + i * a->out + column, scaled, columns * sizeof(float));
        }
    }
}

// Up to 6 rows and up to 6 blocks, as many at a time as registers allow.
static void rows_by_blocks(int64_t rows, int64_t blocks, const Matrix *a, int64_t first, const float *x, float *out) {
    for (int64_t end = first + blocks; first < end;) {
        int64_t left = end - first;
        switch (rows) {
            case 1: if (left >= 4) { tile(1, 4, a, first, x, out); first += 4; } else { tile(1, 1, a, first, x, out); first++; } break;
            case 2: if (left >= 2) { tile(2, 2, a, first, x, out); first += 2; } else { tile(2, 1, a, first, x, out); first++; } break;
            case 3: tile(3, 1, a, first++, x, out); break;
            case 4: tile(4, 1, a, first++, x, out); break;
            case 5: tile(5, 1, a, first++, x, out); break;
            default: tile(6, 1, a, first++, x, out);
        }
    }
}

// out (rows, a->out) of x (rows, a->in).
void coterie_int8(const Matrix *a, int64_t rows, const float *x, float *out, int threads) {
    enum { TOGETHER = 4 };  // blocks: they stay in the first cache while all rows pass
    int64_t blocks = (a->out + 15) / 16, parts = (blocks + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        int64_t first = p * TOGETHER, count = blocks - first < TOGETHER ? blocks - first : TOGETHER;
        if (rows <= 2) rows_by_blocks(rows, count, a, first, x, out);
        else for (int64_t b = first; b < first + count; b++)
            for (int64_t n = 0; n < rows; n += ROWS)
                rows_by_blocks(rows - n < ROWS ? rows - n : ROWS, 1, a, b, x + n * a->in, out + n * a->out);
    }
}
