// The products of a mixture of experts, forward and backward, each one call for all experts: rows lie in order of
// expert (`ends`: where each expert's rows end), and each expert has a matrix of its own.
//
// Notable: all matrices are copied into the order in which they are read, some strips of columns and a chunk of their
// depth at a time (Goto and van de Geijn 2008): what a thread multiplies next is in its own cache, whichever way round
// it is stored, all rows pass it while it is there, and plain weights need no second, packed copy in
// memory. Rows are fetched (by `from`), activated, scaled and put in their places (by `to`) on the way.
// Everything is counted in words of 4 bytes: one float, or, with AVX512-BF16, two bfloat16 that one instruction multiplies
// and adds.
// Sums are float32. A sum's order depends on the shapes and on how many rows its expert has, not on the threads.
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vector.h"

enum { NONE, RELU, SWIGLU };
enum { COLS = 32 };                // columns of a tile: a strip of the matrix
enum { STRIPS = 8, CHUNK = 256 };  // strips and words of their depth that are copied at once: 256 KiB
enum { SPAN = 8 };   // tiles whose slopes are laid ready together: whole lines are read

// ROWS: rows of a tile, TOGETHER: 16s of its columns whose sums stay in registers at once; FEW: rows of an expert up to
// which its matrix is multiplied where it lies. Words: 16 words.
#ifdef ONE_REGISTER

enum { ROWS = 12, TOGETHER = 2, FEW = 8 };
typedef __m512i Words;

static inline Words words(const int32_t *x, int64_t left) { return _mm512_maskz_loadu_epi32(first_of_16(left), x); }
static inline Words same(const int32_t *x) { return _mm512_set1_epi32(*x); }

static inline __attribute__((always_inline)) Wide multiply(const int bf, Wide sum, Words a, Words b) {
#ifdef __AVX512BF16__
    if (bf) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)bf;
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

#else

enum { ROWS = 6, TOGETHER = 1, FEW = 2 };
typedef Wide Words;

static inline Words words(const int32_t *x, int64_t left) { return load_some((const float *)x, left); }

static inline Words same(const int32_t *x) {
    float one;
    memcpy(&one, x, 4);
    return set16(one);
}

static inline __attribute__((always_inline)) Wide multiply(const int bf, Wide sum, Words a, Words b) {
    (void)bf;  // never: this processor does not multiply bfloat16
    return fma16(a, b, sum);
}

#endif

typedef struct {
    int64_t bf, experts, threads;
    const int64_t *ends;  // (experts)
} Shape;

// Lines of memory that are asked for while something else is computed: 16 of them `hop` bytes apart, the next 16 `leap`
// bytes further.
typedef struct {
    const char *first;
    int64_t hop, leap;
} Ahead;

// out (m, COLS) = a (depth, ROWS), of which m count, transposed, by b (depth, COLS); with `more`, added to what is there.
static inline __attribute__((always_inline)) void
tile(const int bf, const int m, float *out, int more, int64_t depth, const int32_t *a, const int32_t *b, Ahead ahead) {
    for (int part = 0; part < COLS / 16; part += TOGETHER) {
        Wide sum[ROWS][TOGETHER];
        const int32_t *left = a, *right = b + part * 16;
#pragma GCC unroll 12
        for (int i = 0; i < m; i++)
            for (int c = 0; c < TOGETHER; c++)
                sum[i][c] = more ? load16(out + i * COLS + (part + c) * 16) : set16(0);
        for (int64_t d = 0; d < depth; d++, left += ROWS, right += COLS) {
            if (!part) _mm_prefetch(ahead.first + d / 16 * ahead.leap + d % 16 * ahead.hop, _MM_HINT_T1);
            Words column[TOGETHER];
            for (int c = 0; c < TOGETHER; c++) column[c] = words(right + c * 16, 16);
#pragma GCC unroll 12
            for (int i = 0; i < m; i++) {
                Words one = same(left + i);
                for (int c = 0; c < TOGETHER; c++) sum[i][c] = multiply(bf, sum[i][c], one, column[c]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < m; i++)
            for (int c = 0; c < TOGETHER; c++) store16(out + i * COLS + (part + c) * 16, sum[i][c]);
    }
}

static void any_tile(int bf, int m, float *out, int more, int64_t depth, const int32_t *a, const int32_t *b, Ahead ahead) {
#define CASE(n) \
    case n: if (bf) tile(1, n, out, more, depth, a, b, ahead); else tile(0, n, out, more, depth, a, b, ahead); break;
    switch (m) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#ifdef ONE_REGISTER
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

// out (m, COLS): every of m <= FEW rows by every of COLS rows, `depth` words each; absent rows (NULL) give 0.
static inline __attribute__((always_inline)) void
dots(const int bf, const int m, float *out, int64_t depth, const int32_t **x, const int32_t **w) {
    const int columns = m > FEW / 2 ? 2 : 4;  // as many sums as there are registers
    for (int j = 0; j < COLS; j += columns) {
        Wide sum[FEW][4];
        const int32_t *some_w[4];
        for (int c = 0; c < columns; c++) {
            some_w[c] = w[j + c] ? w[j + c] : w[0];
            for (int i = 0; i < m; i++) sum[i][c] = set16(0);
        }
        for (int64_t d = 0; d < depth; d += 16) {
            Words row[FEW];
            for (int i = 0; i < m; i++) row[i] = words(x[i] + d, depth - d);
            for (int c = 0; c < columns; c++) {
                Words column = words(some_w[c] + d, depth - d);
                _mm_prefetch((const char *)(some_w[c] + d + 8 * depth), _MM_HINT_T0);
                for (int i = 0; i < m; i++) sum[i][c] = multiply(bf, sum[i][c], row[i], column);
            }
        }
        for (int i = 0; i < m; i++)
            for (int c = 0; c < columns; c++) out[i * COLS + j + c] = w[j + c] ? sum16(sum[i][c]) : 0;
    }
}

static void any_dots(int bf, int m, float *out, int64_t depth, const int32_t **x, const int32_t **w) {
#define CASE(n) case n: if (bf) dots(1, n, out, depth, x, w); else dots(0, n, out, depth, x, w); break;
    switch (m) {
        CASE(1) CASE(2)
#ifdef ONE_REGISTER
        CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#endif
    }
#undef CASE
}

// Up to 16 rows (absent ones NULL), 16 words of each from `at`, to out (16, step) transposed; writes `count` columns.
#ifdef ONE_REGISTER
static inline void transpose(int32_t *out, int64_t step, int count, const int32_t **row, int64_t at) {
    __mmask16 some = (1u << count) - 1;
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = row[i] ? _mm512_loadu_si512(row[i] + at) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // r[4 g + i]: rows 4 g to 4 g + 3, words i, 4 + i, 8 + i, 12 + i
        __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        __m512i c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        _mm512_mask_storeu_epi32(out + i * step, some, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_mask_storeu_epi32(out + (4 + i) * step, some, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_mask_storeu_epi32(out + (8 + i) * step, some, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_mask_storeu_epi32(out + (12 + i) * step, some, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}
#else
static inline void transpose(int32_t *out, int64_t step, int count, const int32_t **row, int64_t at) {
    for (int first = 0; first < count; first += 8)
        for (int half = 0; half < 16; half += 8) {
            int32_t *to = out + half * step + first;
            __m256 r[8], t[8];
            for (int i = 0; i < 8; i++) {
                const int32_t *one = row[first + i];
                r[i] = one ? _mm256_loadu_ps((const float *)(one + at + half)) : _mm256_setzero_ps();
            }
            for (int i = 0; i < 8; i += 2) {
                t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
            }
            for (int i = 0; i < 8; i += 4) {  // r[i + k]: rows i to i + 3, words k and 4 + k
                r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
                r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
                r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
                r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
            }
            for (int i = 0; i < 4; i++) {
                t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
                t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
            }
            for (int i = 0; i < 8; i++) {
                float lines[8];
                if (count - first >= 8) _mm256_storeu_ps((float *)(to + i * step), t[i]);
                else {  // faster here than to store by a mask
                    _mm256_storeu_ps(lines, t[i]);
                    memcpy(to + i * step, lines, 4 * (count - first));
                }
            }
        }
}
#endif

// out (depth, COLS): `depth` words of COLS rows from word `at`, standing; absent rows (NULL) are 0.
static void stand(int32_t *out, const int32_t **row, int64_t at, int64_t depth) {
    int64_t d = 0;
    for (; d + 16 <= depth; d += 16) {
        transpose(out + d * COLS, COLS, 16, row, at + d);
        transpose(out + d * COLS + 16, COLS, 16, row + 16, at + d);
    }
    for (; d < depth; d++)
        for (int j = 0; j < COLS; j++) out[d * COLS + j] = row[j] ? row[j][at + d] : 0;
}

// out (depth, COLS): columns [at, at + COLS) of rows of `width` numbers, lying; absent ones are 0. In bfloat16 each
// word has the numbers of two rows. Row r is `from[r]` of x, or r.
static void lie(int bf, int32_t *out, const void *x, const int64_t *from, int64_t rows, int64_t width, int64_t at) {
    int64_t left = width - at < COLS ? width - at : COLS;
    if (!bf) {
        for (int64_t r = 0; r < rows; r++) {
            const float *row = (const float *)x + (from ? from[r] : r) * width + at;
            store16((float *)out + r * COLS, load_some(row, left));
            store16((float *)out + r * COLS + 16, load_some(row + 16, left - 16));
        }
        return;
    }
#ifdef __AVX512BF16__
    int16_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (i % 2) * 32 + i / 2;
    __m512i low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + 32);
    __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    for (int64_t r = 0; r < rows; r += 2) {
        const bf16 *base = (const bf16 *)x + at;
        __m512i one = _mm512_maskz_loadu_epi16(some, base + (from ? from[r] : r) * width), two = _mm512_setzero_si512();
        if (r + 1 < rows) two = _mm512_maskz_loadu_epi16(some, base + (from ? from[r + 1] : r + 1) * width);
        _mm512_store_si512(out + r / 2 * COLS, _mm512_permutex2var_epi16(one, low, two));
        _mm512_store_si512(out + r / 2 * COLS + 16, _mm512_permutex2var_epi16(one, high, two));
    }
#endif
}

static void put(int bf, void *out, int64_t at, Wide v, int64_t left) {
#ifdef __AVX512BF16__
    if (bf) {
        _mm256_mask_storeu_epi16((bf16 *)out + at, first_of_16(left), (__m256i)_mm512_cvtneps_pbh(v));
        return;
    }
#endif
    (void)bf;
    store_some((float *)out + at, v, left);
}

// A row of a tile, past the caches where it fills whole lines: gradients of weights are larger than they are.
static void put_row(int bf, void *out, int64_t at, const float *row, int64_t left) {
    Wide one = load16(row), two = load16(row + 16);
    char *here = (char *)out + at * (bf ? 2 : 4);
    if (left < COLS || (uintptr_t)here % 64) {
        put(bf, out, at, one, left);
        put(bf, out, at + 16, two, left - 16);
        return;
    }
#ifdef __AVX512BF16__
    if (bf) {
        _mm512_stream_si512((__m512i *)here, (__m512i)_mm512_cvtne2ps_pbh(two, one));
        return;
    }
#endif
    stream16((float *)here, one);
    stream16((float *)here + 16, two);
}

static inline Wide get(int bf, const void *x, int64_t at, int64_t left) {
#ifdef __AVX512BF16__
    if (bf) {
        __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of_16(left), (const bf16 *)x + at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
    }
#endif
    (void)bf;
    return load_some((const float *)x + at, left);
}

static void *grow(void *buffer, size_t *has, size_t bytes) {
    if (*has >= bytes) return buffer;
    free(buffer);
    *has = (bytes + 4095) & ~(size_t)4095;
    return aligned_alloc(4096, *has);
}

// Of each thread, and kept: fresh memory would be faulted in page by page at each call.
static _Thread_local void *strip_memory;
static _Thread_local size_t strip_bytes;

static void *strip(size_t bytes) { return strip_memory = grow(strip_memory, &strip_bytes, bytes); }

// What coterie_grouped does, and what it makes of a product before it stores it.
typedef struct {
    int64_t inputs, outputs;
    const int64_t *from, *to;  // (rows), or NULL: in order
    const float *scale;        // (rows), or NULL
    void *before, *out;        // (rows, outputs), or NULL; (rows, outputs), half as many where SWIGLU
    int64_t stands, activation;
} Product;

static int64_t first_of(const Shape *s, int64_t e) { return e ? s->ends[e - 1] : 0; }

static const int32_t *row_of(const Product *p, const void *x, int64_t r, int64_t depth) {
    return (const int32_t *)x + (p->from ? p->from[r] : r) * depth;
}

// Columns of `out`, and how many of them a strip makes: where one half of the outputs gates the other, 16 of each.
static int64_t columns_of(const Product *p) { return p->activation == SWIGLU ? p->outputs / 2 : p->outputs; }
static int64_t step_of(const Product *p) { return p->activation == SWIGLU ? COLS / 2 : COLS; }

// Store m rows of a tile, from row `first` and column `at`.
static void finish(const Shape *s, const Product *p, const float *made, int m, int64_t first, int64_t at) {
    const int bf = s->bf, gated = p->activation == SWIGLU;
    const int64_t half = p->outputs / 2, columns = columns_of(p), left = columns - at;
    for (int i = 0; i < m; i++) {
        int64_t r = first + i, place = p->to ? p->to[r] : r;
        Wide one = load16(made + i * COLS), two = load16(made + i * COLS + 16);
        if (p->before) {
            put(bf, p->before, r * p->outputs + at, one, left);
            put(bf, p->before, r * p->outputs + at + (gated ? half : 16), two, gated ? left : left - 16);
        }
        if (gated) one = mul16(silu16(one), two);
        if (p->activation == RELU) {
            one = max16(one, set16(0));
            two = max16(two, set16(0));
        }
        if (p->scale) {
            one = mul16(one, set16(p->scale[r]));
            two = mul16(two, set16(p->scale[r]));
        }
        put(bf, p->out, place * columns + at, one, left);
        if (!gated) put(bf, p->out, place * columns + at + 16, two, left - 16);
    }
}

// The rows of a standing matrix that are the COLS columns of strip `n`; NULL where there are no more.
static void rows_of_strip(const Product *p, const char *matrix, int64_t depth, int64_t n, const int32_t **row) {
    const int64_t gated = p->activation == SWIGLU, columns = columns_of(p), at = n * step_of(p);
    for (int j = 0; j < COLS; j++) {
        int64_t column = at + (gated ? j % 16 : j);
        row[j] = column < columns ? (const int32_t *)matrix + column * depth : NULL;
        if (gated && j >= 16 && row[j]) row[j] += columns * depth;
    }
}

// `n` strips, from strip `begin`, of the products of an expert with at most FEW rows by its standing matrix.
static void few_rows(const Shape *s, const Product *p, int64_t e, const void *x, const char *matrix, int64_t begin, int64_t n) {
    const int64_t depth = p->inputs * (s->bf ? 2 : 4) / 4, first = first_of(s, e), m = s->ends[e] - first;
    float made[FEW * COLS] __attribute__((aligned(64)));
    const int32_t *given[FEW], *row[COLS];
    for (int i = 0; i < m; i++) given[i] = row_of(p, x, first + i, depth);
    for (int64_t g = begin; g < begin + n; g++) {
        rows_of_strip(p, matrix, depth, g, row);
        any_dots(s->bf, m, made, depth, given, row);
        finish(s, p, made, m, first, g * step_of(p));
    }
}

// What words [k, k + CHUNK) of the depth add to `n` strips, from strip `begin`, of an expert's products. packed: its rows
// (tiles, depth, ROWS); b: memory for the strips; sums: what the words before have made (tiles, STRIPS, ROWS, COLS).
static void chunk(const Shape *s, const Product *p, int64_t e, const int32_t *packed, const char *matrix, int64_t begin,
                  int64_t n, int64_t k, int32_t *b, float *sums) {
    const int64_t size = s->bf ? 2 : 4, depth = p->inputs * size / 4, first = first_of(s, e), rows = s->ends[e] - first;
    const int64_t words = depth - k < CHUNK ? depth - k : CHUNK, step = step_of(p), line = p->outputs * size;
    const int32_t *row[COLS];
    const char *lying = matrix + k * 4 * p->outputs;  // where it does not stand: a word is of one row, or of two in bfloat16
    for (int64_t g = 0; g < n; g++) {
        int32_t *to = b + g * CHUNK * COLS;
        if (!p->stands) lie(s->bf, to, lying, NULL, words * 4 / size, p->outputs, (begin + g) * step);
        else {
            rows_of_strip(p, matrix, depth, begin + g, row);
            stand(to, row, k, words);
        }
    }
    for (int64_t t = 0; t * ROWS < rows; t++)
        for (int64_t g = 0; g < n; g++) {
            int m = rows - t * ROWS < ROWS ? rows - t * ROWS : ROWS;
            float *made = sums + (t * STRIPS + g) * ROWS * COLS;
            // The same strips' next chunk is asked for in two halves, by turns of tiles.
            Ahead ahead = {lying + CHUNK * 4 * p->outputs + (begin + g) * step * size, 4 * p->outputs, 64 * p->outputs};
            ahead.first += s->bf ? t % 2 * line : t % 2 * 64;
            if (p->stands) {
                int64_t column = (begin + g) * step + (p->activation == SWIGLU ? t % 2 * p->outputs / 2 : t % 2 * 16);
                ahead = (Ahead){matrix + (column * depth + k + CHUNK) * 4, 64, 4 * depth};
            }
            any_tile(s->bf, m, made, k > 0, words, packed + (t * depth + k) * ROWS, b + g * CHUNK * COLS, ahead);
            if (k + CHUNK >= depth) finish(s, p, made, m, first + t * ROWS, (begin + g) * step);
        }
}

// x (rows, inputs), its rows from `from`, by each expert's matrix in w: (outputs, inputs) where it `stands`, as weights
// of a projection do, else (inputs, outputs). A copy of the product goes to `before`; then it is activated (SWIGLU: the
// first half of the outputs gates the second), scaled, and row r stored at to[r] of `out`.
// packed: memory for the rows, (tiles, depth, ROWS) words. Returns 1 where memory is lacking.
int coterie_grouped(const Shape *s, const Product *p, const void *x, const void *w, int32_t *packed) {
    const int64_t size = s->bf ? 2 : 4, depth = p->inputs * size / 4, step = step_of(p);
    const int64_t strips = (columns_of(p) + step - 1) / step, groups = (strips + STRIPS - 1) / STRIPS;
    int failed = 0;
    int64_t tiles[s->experts + 1], most = 0;
    tiles[0] = 0;
    for (int64_t e = 0; e < s->experts; e++) {
        int64_t mine = (s->ends[e] - first_of(s, e) + ROWS - 1) / ROWS;
        tiles[e + 1] = tiles[e] + mine;
        if (mine > most) most = mine;
    }
#pragma omp parallel num_threads(s->threads) reduction(| : failed)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles[s->experts]; t++) {
            int64_t e = 0, d = 0;
            while (tiles[e + 1] <= t) e++;
            int64_t first = first_of(s, e) + (t - tiles[e]) * ROWS, m = s->ends[e] - first;
            if (m > ROWS) m = ROWS;
            int32_t *a = packed + t * depth * ROWS;
            const int32_t *row[16] = {0};
            for (int i = 0; i < m; i++) row[i] = row_of(p, x, first + i, depth);
            for (; d + 16 <= depth; d += 16) transpose(a + d * ROWS, ROWS, m, row, d);
            for (; d < depth; d++)
                for (int i = 0; i < m; i++) a[d * ROWS + i] = row[i][d];
        }
        int32_t *b = strip((CHUNK * COLS + most * ROWS * COLS) * STRIPS * 4);
        float *sums = (float *)(b + STRIPS * CHUNK * COLS);  // (tiles, STRIPS, ROWS, COLS)
        if (!b) failed = 1;
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < s->experts * groups; task++) {
            int64_t e = task / groups, begin = task % groups * STRIPS;
            int64_t n = strips - begin < STRIPS ? strips - begin : STRIPS;
            if (tiles[e] == tiles[e + 1] || !b) continue;
            const char *mine = (const char *)w + e * p->inputs * p->outputs * size;
            if (p->stands && s->ends[e] - first_of(s, e) <= FEW) few_rows(s, p, e, x, mine, begin, n);
            else
                for (int64_t k = 0; k < depth; k += CHUNK)
                    chunk(s, p, e, packed + tiles[e] * depth * ROWS, mine, begin, n, k, b, sums);
        }
    }
    return failed;
}

// The next ROWS numbers of x from `one` as words; in bfloat16 paired with those from `two`, or with 0 where it is < 0.
static inline void pair(int bf, int32_t *out, const void *x, int64_t one, int64_t two, int64_t left) {
#ifdef __AVX512BF16__
    if (bf) {
        __mmask16 some = first_of_16(left >= ROWS ? ROWS : left);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const bf16 *)x + one)), high;
        high = two < 0 ? _mm512_setzero_si512()
                       : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const bf16 *)x + two));
        _mm512_mask_storeu_epi32(out, some, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        return;
    }
#endif
    (void)bf, (void)two;
    const float *from = (const float *)x + one;
    if (left >= ROWS) memcpy(out, from, ROWS * 4);
    else memcpy(out, from, left * 4);
}

// The system's largest pages for the memory of `out`, which is about to be written whole: a fault for each 2 MB.
static void large_pages(void *out, int64_t bytes) {
    const uintptr_t page = 1 << 21, begin = ((uintptr_t)out + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)out + bytes) & ~(page - 1);
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}

// out (experts, outputs, inputs) = slope (rows, outputs), its rows from `whence`, transposed, by x (rows, inputs), its
// rows from `from`, over each expert's rows. packed: (tiles of outputs, rows, ROWS) words.
int coterie_grouped_weights(const Shape *s, int64_t inputs, int64_t outputs, const void *slope, const int64_t *whence,
                            const void *x, const int64_t *from, void *out, int32_t *packed) {
    const int bf = s->bf, size = bf ? 2 : 4;
    const int64_t tiles = (outputs + ROWS - 1) / ROWS, strips = (inputs + COLS - 1) / COLS;
    int failed = 0;
    int64_t depths[s->experts + 1];  // where each expert's rows begin in a tile of `packed`
    depths[0] = 0;
    for (int64_t e = 0; e < s->experts; e++) {
        int64_t rows = s->ends[e] - first_of(s, e);
        depths[e + 1] = depths[e] + (bf ? (rows + 1) / 2 : rows);
    }
    large_pages(out, s->experts * inputs * outputs * size);
#pragma omp parallel num_threads(s->threads) reduction(| : failed)
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t e = 0; e < s->experts; e++)
            for (int64_t block = 0; block < tiles; block += SPAN) {
                int64_t first = first_of(s, e), rows = s->ends[e] - first, depth = depths[e + 1] - depths[e];
                for (int64_t d = 0; d < depth; d++) {
                    int64_t one = first + (bf ? 2 * d : d), two = bf && 2 * d + 1 < rows ? one + 1 : -1;
                    if (whence) one = whence[one], two = two < 0 ? two : whence[two];
                    for (int64_t t = block; t < tiles && t < block + SPAN; t++)
                        pair(bf, packed + (depths[e] * tiles + t * depth + d) * ROWS, slope, one * outputs + t * ROWS,
                             two < 0 ? two : two * outputs + t * ROWS, outputs - t * ROWS);
                }
            }
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < s->experts * strips; task++) {
            int64_t e = task / strips, at = task % strips * COLS, first = first_of(s, e), rows = s->ends[e] - first;
            int64_t depth = depths[e + 1] - depths[e];
            int32_t *b = strip((depth + 1) * COLS * 4);
            if (!b) {
                failed = 1;
                continue;
            }
            if (from) lie(bf, b, x, from + first, rows, inputs, at);
            else lie(bf, b, (const char *)x + first * inputs * size, NULL, rows, inputs, at);
            for (int64_t t = 0; t < tiles; t++) {
                int m = outputs - t * ROWS < ROWS ? outputs - t * ROWS : ROWS;
                float made[ROWS * COLS] __attribute__((aligned(64)));
                const int32_t *a = packed + (depths[e] * tiles + t * depth) * ROWS;
                any_tile(bf, m, made, 0, depth, a, b, (Ahead){(const char *)b, 0, 0});
                for (int i = 0; i < m; i++)
                    put_row(bf, out, (e * outputs + t * ROWS + i) * inputs + at, made + i * COLS, inputs - at);
            }
        }
        _mm_sfence();
    }
    return failed;
}

// Back through scale and activation. Of each row: before (columns, SWIGLU: 2 columns), slope (columns) of scale x
// activation(before) over scale; made: scale x activation; out: slope of `before`; to_scale: slope of scale.
void coterie_activated(const Shape *s, int64_t rows, int64_t columns, int activation, const void *before,
                       const void *slope, const float *scale, void *made, void *out, float *to_scale) {
    const int bf = s->bf;
    const int64_t wide = activation == SWIGLU ? 2 * columns : columns;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        Wide sum = set16(0), by = set16(scale[r]);
        for (int64_t i = 0; i < columns; i += 16) {
            int64_t left = columns - i, at = r * columns + i;
            Wide gate = get(bf, before, r * wide + i, left), back = get(bf, slope, at, left), active;
            Wide scaled = mul16(back, by);
            if (activation == SWIGLU) {
                Wide up = get(bf, before, r * wide + columns + i, left), sigmoid = sigmoid16(gate);
                Wide silu = mul16(gate, sigmoid), bend = fma16(silu, sub16(set16(1), sigmoid), sigmoid);
                active = mul16(silu, up);
                put(bf, out, r * wide + i, mul16(scaled, mul16(up, bend)), left);
                put(bf, out, r * wide + columns + i, mul16(scaled, silu), left);
            } else {
                active = max16(gate, set16(0));
                put(bf, out, at, positive16(gate, scaled), left);
            }
            sum = fma16(active, back, sum);
            put(bf, made, at, mul16(active, by), left);
        }
        to_scale[r] = sum16(sum);
    }
}
