// One step of a Llama-like decoder for a batch whose rows use different experts, in one call. A row is a token: the
// next one of a sequence, or one of a stretch of its prompt, whose rows follow one another.
//
// Notable: a step of a small model is a few hundred small operations; run one by one, calls and synchronisation cost
// more than the arithmetic. Here the threads stay together for the whole step and share each product by columns.
// Every weight is read once for all rows. A row's sum runs in the same order whatever else is in the batch, so a
// request's tokens do not depend on its neighbours.
// Weights, cache and inputs of products are bfloat16 where the processor multiplies it, else float32 (vector.h); sums,
// residual stream, norms and softmax are float32.
//
// Layout of a matrix (out, in): blocks of 16 outputs, [out/16][in][16]; in bfloat16 pairs of inputs, [out/16][in/2][16][2]
// (step.py packs it), so that one instruction multiplies a pair of inputs by 16 outputs.
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "vector.h"

enum { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };
enum { ATTN, FFN, BLOCKS };
enum { RELU, SILU, GELU };
enum { AHEAD = 4096 };  // numbers of a matrix asked of memory before their turn: with 16 rows, 1.7 times as fast

enum { GROUP = 32 };  // inputs that share a scale and an offset, where a matrix is in 8 bits

// A matrix of the base, as it is or, where `exact` is NULL, in 8 bits: [out/16][in][16], and the groups' scales and
// offsets [out/16][in/32][2][16] (coterie_round makes it).
typedef struct {
    const num *exact;
    const int8_t *in8;
    const float *scales;
} Matrix;

// Of one layer. Biases, q_norm and k_norm may be NULL. Norm weights, biases and router are float32. Where there is a
// router (experts, width), the feed-forward is a mixture: gate_ups and downs have a matrix for each expert.
typedef struct {
    const float *attn_norm, *ffn_norm, *q_norm, *k_norm, *qkv_bias, *o_bias;
    Matrix qkv, o, gate_up, down;
    const float *router;
    const Matrix *gate_ups, *downs;
} Layer;

typedef struct {
    int64_t layers, width, heads, kv_heads, head_dim, ffn, vocab;
    int64_t experts, per_token, inner, gate_normed;  // of mixtures: how many, that a token wakes, width of each
    float eps;
    const Layer *layer;
    const float *final_norm, *cos, *sin;  // tables (context, head_dim / 2)
    Matrix head;                          // (vocab, width)
} Model;

// A low-rank update of one projection: a (rank, in), b (out, rank), rank a multiple of 16. Where a is NULL, none.
// gain (out) is DoRA's, or NULL.
typedef struct {
    const num *a, *b;
    const float *gain;
    int64_t rank;
} LowRank;

// A bottleneck adapter after one block: down (size, width), up (width, size), size a multiple of 16.
typedef struct {
    const num *down, *up;
    const float *down_bias, *up_bias;
    int64_t size, activation, reads_sum;
} Bottleneck;

typedef struct {
    const LowRank *low_rank;       // (layers, PROJECTIONS)
    const Bottleneck *bottleneck;  // (layers, BLOCKS)
    int64_t widest;                // most columns that an intermediate of this expert has, over layers and sites
} Expert;

// Rows [first, first + count) of the batch use `expert`, its update multiplied by `share`. Groups may overlap.
typedef struct {
    const Expert *expert;
    int64_t first, count;
    float share;
} Group;

// Keys and values lie in blocks of `page` tokens of one layer: (blocks, kv_heads, page, head_dim). `table` (slots, layers,
// span) says which block holds the tokens [b * page, ...) of a sequence; `entries`, of the same shape, which block of
// `streams` (blocks, page, width) holds their residual stream before that layer, -1 where nobody keeps it.
typedef struct {
    num *keys, *values;
    float *streams;
    const int32_t *table, *entries;
    int64_t layers, span, page;  // page is a multiple of 4
} Cache;

static void activate(float *x, int64_t n, int64_t kind) {  // n is a multiple of 16
    for (int64_t i = 0; i < n; i += 16) {
        Wide v = load16(x + i);
        if (kind == RELU) v = max16(v, set16(0));
        if (kind == SILU) v = silu16(v);
        store16(x + i, v);
    }
    if (kind == GELU)
        for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}

// TILE: rows whose sums registers hold; FEW: as many beside what widens a matrix in 8 bits; STRETCH: inputs that all rows
// meet before the next ones.
#ifdef ONE_REGISTER
enum { TILE = 16, FEW = 8, PAIRED = 12 };  // PAIRED: rows by two blocks at once
#else
enum { TILE = 6, FEW = 4 };
#endif
#ifdef __AVX512BF16__
enum { STRETCH = 1 << 30 };
#else
enum { STRETCH = 192 };
#endif

// out (m, 16), rows `step` apart, += x (m, in), rows `stride` apart, by one block of a packed matrix. Memory is
// asked for as much from `ask` on.
static inline __attribute__((always_inline)) void
tile(const int m, float *out, int64_t step, const num *x, int64_t stride, const num *w, int64_t in, const num *ask) {
    Wide sum[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) sum[i] = load16(out + i * step);
#ifdef __AVX512BF16__
    for (int64_t k = 0; k < in; k += 2) {
        __m512bh pair = (__m512bh)_mm512_loadu_si512(w + k * 16);
        _mm_prefetch((const char *)(ask + k * 16), _MM_HINT_T0);
        for (int i = 0; i < m; i++) {
            int32_t two;
            memcpy(&two, x + i * stride + k, 4);
            sum[i] = _mm512_dpbf16_ps(sum[i], pair, (__m512bh)_mm512_set1_epi32(two));
        }
    }
#else
    for (int64_t k = 0; k < in; k++) {
        Wide one = load16(w + k * 16);
        _mm_prefetch((const char *)(ask + k * 16), _MM_HINT_T0);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++) sum[i] = fma16(set16(x[i * stride + k]), one, sum[i]);
    }
#endif
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) store16(out + i * step, sum[i]);
}

// The same for any number of rows. A stretch of the block stays in the nearest cache while all rows pass. What lies `ahead`
// numbers behind it is asked for by the first of them.
static void rows_by(int64_t m, float *out, int64_t step, const num *x, int64_t stride, const num *w, int64_t in,
                    int64_t ahead) {
    for (int64_t k = 0; k < in; k += STRETCH)
        for (int64_t n = 0; n < m; n += TILE) {
            int64_t wide = in - k < STRETCH ? in - k : STRETCH;
            const num *ask = w + k * 16 + (n ? 0 : ahead);
#define ROWS(r) case r: tile(r, out + n * step, step, x + n * stride + k, stride, w + k * 16, wide, ask); break;
            switch (m - n < TILE ? m - n : TILE) {
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#ifdef ONE_REGISTER
                ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14) ROWS(15) ROWS(16)
#endif
            }
#undef ROWS
        }
}

static void block(int64_t m, float *out, int64_t step, const num *x, int64_t stride, const num *w, int64_t in) {
    rows_by(m, out, step, x, stride, w, in, AHEAD);
}

#ifdef ONE_REGISTER

// Two blocks at once, so that an input, once it is read, is multiplied twice: out and other (m, 16) += x by w and by v.
static inline __attribute__((always_inline)) void
tile_pair(const int m, float *out, float *other, const num *x, int64_t stride, const num *w, const num *v, int64_t in,
          int64_t ahead) {
    Wide sum[PAIRED], second[PAIRED];
#pragma GCC unroll 12
    for (int i = 0; i < m; i++) sum[i] = load16(out + i * 16), second[i] = load16(other + i * 16);
    const int together = 4 / sizeof(num);
    for (int64_t k = 0; k < in; k += together) {
        Wide one = load16((const float *)(w + k * 16)), two = load16((const float *)(v + k * 16));
        _mm_prefetch((const char *)(w + k * 16 + ahead), _MM_HINT_T0);
        _mm_prefetch((const char *)(v + k * 16 + ahead), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int i = 0; i < m; i++) {
            float given;
            memcpy(&given, x + i * stride + k, 4);
#ifdef __AVX512BF16__
            __m512bh both = (__m512bh)set16(given);
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)one, both);
            second[i] = _mm512_dpbf16_ps(second[i], (__m512bh)two, both);
#else
            sum[i] = fma16(set16(given), one, sum[i]);
            second[i] = fma16(set16(given), two, second[i]);
#endif
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; i++) store16(out + i * 16, sum[i]), store16(other + i * 16, second[i]);
}

static void pair_by(int64_t m, float *out, float *other, const num *x, int64_t stride, const num *w, const num *v, int64_t in,
                    int64_t ahead) {
    int64_t tiles = (m + PAIRED - 1) / PAIRED, rows = (m + tiles - 1) / tiles;  // of one size, but for the last
    for (int64_t k = 0; k < in; k += STRETCH)
        for (int64_t n = 0; n < m; n += rows) {
            int64_t wide = in - k < STRETCH ? in - k : STRETCH, more = n ? 0 : ahead;
#define ROWS(r) \
    case r: tile_pair(r, out + n * 16, other + n * 16, x + n * stride + k, stride, w + k * 16, v + k * 16, wide, more); break;
            switch (m - n < rows ? m - n : rows) {
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
            }
#undef ROWS
        }
}

#endif

#ifndef __AVX512BF16__

static inline Wide widened(const int8_t *w, Wide scale, Wide offset) {
#ifdef ONE_REGISTER
    Wide whole = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#else
    __m256i a = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w));
    __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + 8)));
    Wide whole = {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
#endif
    return fma16(whole, scale, offset);
}

static inline void ask_group(const int8_t *w) {
    for (int i = 0; i < GROUP * 16; i += 64) _mm_prefetch((const char *)(w + i + AHEAD), _MM_HINT_T0);
}

// As `tile`, by a block in 8 bits.
static inline __attribute__((always_inline)) void
tile_in8(const int m, float *out, int64_t step, const num *x, int64_t stride, const int8_t *w, const float *scales, int64_t in) {
    Wide sum[FEW];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) sum[i] = load16(out + i * step);
    for (int64_t g = 0; g < in; g += GROUP, scales += 32) {
        Wide scale = load16(scales), offset = load16(scales + 16);
        ask_group(w + g * 16);
        for (int64_t k = g; k < g + GROUP; k++) {
            Wide one = widened(w + k * 16, scale, offset);
#pragma GCC unroll 8
            for (int i = 0; i < m; i++) sum[i] = fma16(set16(x[i * stride + k]), one, sum[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) store16(out + i * step, sum[i]);
}

// `width` inputs of a block in 8 bits, from input k, as float32.
static void widen_block(num *out, const int8_t *w, const float *scales, int64_t k, int64_t width) {
    for (int64_t g = k; g < k + width; g += GROUP) {
        Wide scale = load16(scales + g), offset = load16(scales + g + 16);  // 32 of them for 32 inputs
        ask_group(w + g * 16);
        for (int64_t i = g; i < g + GROUP; i++) store16(out + (i - k) * 16, widened(w + i * 16, scale, offset));
    }
}

// As `block`, by one in 8 bits. For more than a few rows it becomes float32 first, stretch by stretch: the same numbers.
static void block_in8(int64_t m, float *out, int64_t step, const num *x, int64_t stride, const int8_t *w,
                      const float *scales, int64_t in) {
    if (m <= 2 * FEW) {
        for (; m > 0; m -= FEW, out += FEW * step, x += FEW * stride)
            switch (m < FEW ? m : FEW) {
#define ROWS(r) case r: tile_in8(r, out, step, x, stride, w, scales, in); break;
                ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#ifdef ONE_REGISTER
                ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#endif
#undef ROWS
            }
        return;
    }
    num wide[STRETCH * 16] __attribute__((aligned(64)));
    for (int64_t k = 0; k < in; k += STRETCH) {
        int64_t width = in - k < STRETCH ? in - k : STRETCH;
        widen_block(wide, w, scales, k, width);
        rows_by(m, out, step, x + k, stride, wide, width, 0);
    }
}

#endif

// out (rows, 16) = x W^T for 16 columns of a matrix of the base, from `column`.
static void columns_of(const Matrix *a, int64_t column, int64_t rows, float *out, const num *x, int64_t in) {
    memset(out, 0, rows * 16 * sizeof(float));
    if (a->exact) block(rows, out, 16, x, in, a->exact + column * in, in);
#ifndef __AVX512BF16__
    else block_in8(rows, out, 16, x, in, a->in8 + column * in, a->scales + column * in / GROUP * 2, in);
#endif
}

// The same twice, for the columns from `one` and those from `two`, in the order that the processor likes best: a sum is
// the same. Where `two` is < 0, once. out (2, rows, 16).
static void two_columns(const Matrix *a, int64_t one, int64_t two, int64_t rows, float *out, const num *x, int64_t in) {
    float *other = out + rows * 16;
#ifdef ONE_REGISTER
    if (two >= 0 && rows >= PAIRED && a->exact) {
        memset(out, 0, 2 * rows * 16 * sizeof(float));
        pair_by(rows, out, other, x, in, a->exact + one * in, a->exact + two * in, in, AHEAD);
        return;
    }
#ifndef __AVX512BF16__
    if (two >= 0 && rows > FEW && !a->exact) {
        num wide[2][STRETCH * 16] __attribute__((aligned(64)));
        memset(out, 0, 2 * rows * 16 * sizeof(float));
        for (int64_t k = 0; k < in; k += STRETCH) {
            int64_t width = in - k < STRETCH ? in - k : STRETCH;
            widen_block(wide[0], a->in8 + one * in, a->scales + one * in / GROUP * 2, k, width);
            widen_block(wide[1], a->in8 + two * in, a->scales + two * in / GROUP * 2, k, width);
            pair_by(rows, out, other, x + k, in, wide[0], wide[1], width, 0);
        }
        return;
    }
#endif
#endif
    columns_of(a, one, rows, out, x, in);
    if (two >= 0) columns_of(a, two, rows, other, x, in);
}

// The columns (rows, 16) of block b, of those from `first` to `end` that a thread goes through; made two by two in `both`
// (2, rows, 16).
static float *next_columns(const Matrix *a, int64_t b, int64_t first, int64_t end, int64_t rows, float *both, const num *x,
                           int64_t in) {
    float *out = both + (b - first) % 2 * rows * 16;
    if (out == both) two_columns(a, b * 16, b + 1 < end ? b * 16 + 16 : -1, rows, both, x, in);
    return out;
}

static void rms_norm(float *out, const float *x, const float *weight, int64_t n, float eps) {
    Wide sum = set16(0);
    for (int64_t i = 0; i < n; i += 16) {
        Wide v = load16(x + i);
        sum = fma16(v, v, sum);
    }
    Wide scale = set16(1.0f / sqrtf(sum16(sum) / n + eps));
    for (int64_t i = 0; i < n; i += 16)
        store16(out + i, mul16(mul16(load16(x + i), scale), load16(weight + i)));
}

// A meeting of the threads, hundreds of times in a step. OpenMP's own spins for milliseconds where another process
// holds a processor; this one soon lets go of its own.
typedef struct {
    atomic_int arrived, round;
} Meeting;

static void meet(Meeting *m, int threads) {
    int round = atomic_load_explicit(&m->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&m->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&m->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&m->round, round + 1, memory_order_release);
        return;
    }
    for (int tries = 0; atomic_load_explicit(&m->round, memory_order_acquire) == round; tries++)
        if (tries < 2000) _mm_pause();
        else sched_yield();
}

// What the threads of one step share. Buffers are (rows, ...).
typedef struct {
    Meeting *meeting;
    const Model *model;
    const Group *groups;
    const Cache *cache;
    const int64_t *positions, *slots;
    int64_t rows, n_groups, widest, longest;
    float *hidden, *qkv, *added;           // added: a block's output
    num *x, *mixed, *fed, *low;            // low: (groups, PROJECTIONS, rows, widest) x A^T
    float *scores;                         // (threads, longest)
    // Of a mixture. Choices are (rows, per_token): `chosen` expert and `gate`, and `place` in the order of experts, in
    // which lie `choice` (back again), `sorted` (normed rows) and `inner`; `ends`: where each expert's choices end.
    int64_t *chosen, *place, *choice, *ends;
    float *gate;
    num *sorted, *inner;
} Step;

static void share_of(int64_t n, int thread, int threads, int64_t *first, int64_t *end) {
    *first = n * thread / threads;
    *end = n * (thread + 1) / threads;
}

// The rows of the residual stream, or `count` of them that `chosen` names, normed into x.
static void norm_rows(const Step *s, const float *weight, int64_t count, const int64_t *chosen, int thread, int threads) {
    int64_t first, end, width = s->model->width;
    share_of(count, thread, threads, &first, &end);
    for (int64_t n = first; n < end; n++) {
        float out[width];
        rms_norm(out, s->hidden + (chosen ? chosen[n] : n) * width, weight, width, s->model->eps);
        for (int64_t i = 0; i < width; i += 16) narrow(s->x + n * width + i, load16(out + i));
    }
}

static num *low_of(const Step *s, int64_t g, int projection) {
    return s->low + (g * PROJECTIONS + projection) * s->rows * s->widest;
}

// x A^T of every group, for some projections of a layer; ends in a barrier, so that all threads see all of it.
static void lower(const Step *s, int64_t layer, int from, int to, const num *x, int64_t in, int thread, int threads) {
    if (!s->n_groups) return;
    int64_t turn = 0;
    for (int64_t g = 0; g < s->n_groups; g++) {
        const Group *group = s->groups + g;
        for (int p = from; p <= to; p++) {
            const LowRank *update = group->expert->low_rank + layer * PROJECTIONS + p;
            if (!update->a) continue;
            for (int64_t b = 0; b < update->rank / 16; b++) {
                if (turn++ % threads != thread) continue;
                for (int64_t n = 0; n < group->count; n += 16) {
                    int64_t m = group->count - n < 16 ? group->count - n : 16;
                    float out[16 * 16] = {0};
                    block(m, out, 16, x + (group->first + n) * in, in, update->a + b * 16 * in, in);
                    for (int64_t i = 0; i < m; i++) {
                        Wide v = mul16(load16(out + i * 16), set16(group->share));
                        narrow(low_of(s, g, p) + (n + i) * s->widest + b * 16, v);
                    }
                }
            }
        }
    }
    meet(s->meeting, threads);
}

// Add the updates of one projection to 16 of its columns, from `column`, for the batch's rows: out (rows, 16).
static void raise_(const Step *s, int64_t layer, int projection, int64_t column, float *out) {
    for (int64_t g = 0; g < s->n_groups; g++) {
        const Group *group = s->groups + g;
        const LowRank *update = group->expert->low_rank + layer * PROJECTIONS + projection;
        if (!update->a) continue;
        float *here = out + group->first * 16;
        block(group->count, here, 16, low_of(s, g, projection), s->widest, update->b + column * update->rank, update->rank);
        if (update->gain)
            for (int64_t i = 0; i < group->count; i++)
                store16(here + i * 16, mul16(load16(here + i * 16), load16(update->gain + column)));
    }
}

// Complete 16 columns of a projection, from `column`, by its updates and its bias: out (rows, 16).
static void complete(const Step *s, int64_t layer, int projection, int64_t column, const float *bias, float *out) {
    raise_(s, layer, projection, column, out);
    if (bias)
        for (int64_t n = 0; n < s->rows; n++)
            store16(out + n * 16, add16(load16(out + n * 16), load16(bias)));
}

// What row n of 16 gates and 16 ups (2, rows, 16) makes.
static inline Wide gated(const float *both, int64_t rows, int64_t n) {
    return mul16(silu16(load16(both + n * 16)), load16(both + (rows + n) * 16));
}

static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; i += 16) {
        Wide a = load16(x + i), b = load16(x + half + i);
        Wide c = load16(cos + i), d = load16(sin + i);
        store16(x + i, fms16(a, c, mul16(b, d)));
        store16(x + half + i, fma16(b, c, mul16(a, d)));
    }
}

// The scalar products of `b` and four vectors that lie one behind the other.
static inline __m128 four_dots(const num *a, const num *b, int64_t dim) {
    return four_sums(dot(a, b, dim), dot(a + dim, b, dim), dot(a + 2 * dim, b, dim), dot(a + 3 * dim, b, dim));
}

// Which block of each kind holds the tokens of a row's sequence before a layer, from `table` or `entries`.
static const int32_t *blocks_of(const Step *s, const int32_t *table, int64_t layer, int64_t row) {
    return table + (s->slots[row] * s->cache->layers + layer) * s->cache->span;
}

// Where a block of the cache begins, at a key-value head.
static int64_t head_of(const Step *s, int64_t block, int64_t kv) {
    return (block * s->model->kv_heads + kv) * s->cache->page * s->model->head_dim;
}

// Have memory bring `n` numbers.
static inline void ask(const num *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(num)) _mm_prefetch((const char *)(x + i), _MM_HINT_T0);
}

// Where the residual stream of a row before a layer is kept, or NULL.
static float *entry_of(const Step *s, int64_t layer, int64_t row) {
    int64_t at = s->positions[row], page = s->cache->page;
    int32_t block = blocks_of(s, s->cache->entries, layer, row)[at / page];
    return block < 0 ? NULL : s->cache->streams + (block * page + at % page) * s->model->width;
}

// out (16 n) = share * the sum of the values of `seen` tokens, from `column` of a head on, each by its score.
static inline __attribute__((always_inline)) void
weigh(const int n, num *out, const Step *s, const int32_t *blocks, int64_t kv, int64_t column, const float *score,
      int64_t seen, float share) {
    int64_t dim = s->model->head_dim, page = s->cache->page;
    Wide sum[4];
    for (int i = 0; i < n; i++) sum[i] = set16(0);
    for (int64_t t = 0; t < seen; t += page) {
        const num *values = s->cache->values + head_of(s, blocks[t / page], kv) + column;
        int64_t here = seen - t < page ? seen - t : page;
        for (int64_t j = 0; j < here; j++)
            for (int i = 0; i < n; i++)
                sum[i] = fma16(set16(score[t + j]), widen(values + j * dim + i * 16), sum[i]);
    }
    for (int i = 0; i < n; i++) narrow(out + i * 16, mul16(sum[i], set16(share)));
}

// One row and key-value head: rotate its queries and its key, and store key and value in the cache.
static void store(const Step *s, int64_t layer, int64_t row, int64_t kv) {
    const Model *m = s->model;
    const Layer *l = m->layer + layer;
    int64_t dim = m->head_dim, group = m->heads / m->kv_heads, at = s->positions[row];
    float *all = s->qkv + row * (m->heads + 2 * m->kv_heads) * dim;
    float *k = all + (m->heads + kv) * dim, *v = all + (m->heads + m->kv_heads + kv) * dim;
    const float *cos = m->cos + at * dim / 2, *sin = m->sin + at * dim / 2;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        if (l->q_norm) rms_norm(all + h * dim, all + h * dim, l->q_norm, dim, m->eps);
        rotate(all + h * dim, cos, sin, dim / 2);
    }
    if (l->k_norm) rms_norm(k, k, l->k_norm, dim, m->eps);
    rotate(k, cos, sin, dim / 2);
    int64_t page = s->cache->page, block = blocks_of(s, s->cache->table, layer, row)[at / page];
    int64_t place = head_of(s, block, kv) + at % page * dim;
    for (int64_t i = 0; i < dim; i += 16) {
        narrow(s->cache->keys + place + i, load16(k + i));
        narrow(s->cache->values + place + i, load16(v + i));
    }
}

// One row and key-value head: attend to its own place in the sequence, and to all before.
static void attend(const Step *s, int64_t layer, int64_t row, int64_t kv, float *score) {
    const Model *m = s->model;
    int64_t dim = m->head_dim, group = m->heads / m->kv_heads, seen = s->positions[row] + 1, page = s->cache->page;
    const int32_t *blocks = blocks_of(s, s->cache->table, layer, row);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        const float *query = s->qkv + (row * (m->heads + 2 * m->kv_heads) + h) * dim;
        float scale = 1.0f / sqrtf(dim), most = -INFINITY;
        num narrowed[dim];
        for (int64_t i = 0; i < dim; i += 16) narrow(narrowed + i, load16(query + i));
        int64_t t = 0;
        for (int64_t start = 0; start < seen; start += page) {
            const num *keys = s->cache->keys + head_of(s, blocks[start / page], kv) - start * dim;
            int64_t end = seen - start < page ? seen : start + page;
            if (h == kv * group) {  // blocks lie apart: ask for what comes next
                ask(s->cache->values + head_of(s, blocks[start / page], kv), page * dim);
                if (end < seen) ask(s->cache->keys + head_of(s, blocks[start / page + 1], kv), page * dim);
            }
            for (; t + 4 <= end; t += 4)
                _mm_storeu_ps(score + t, _mm_mul_ps(four_dots(keys + t * dim, narrowed, dim), _mm_set1_ps(scale)));
            for (; t < end; t++) score[t] = sum16(dot(keys + t * dim, narrowed, dim)) * scale;
        }
        for (t = 0; t < seen; t++) most = score[t] > most ? score[t] : most;
        for (t = seen; t % 16; t++) score[t] = -INFINITY;  // the last 16 are whole
        Wide total = set16(0);
        for (t = 0; t < seen; t += 16) {
            Wide e = exp16(sub16(load16(score + t), set16(most)));
            store16(score + t, e);
            total = add16(total, e);
        }
        float share = 1.0f / sum16(total);
        num *out = s->mixed + (row * m->heads + h) * dim;
        for (int64_t i = 0; i < dim; i += 64)
            if (dim - i >= 64) weigh(4, out + i, s, blocks, kv, i, score, seen, share);
            else weigh(2, out + i, s, blocks, kv, i, score, seen, share);
    }
}

static int adapted(const Step *s, int64_t layer, int which) {
    for (int64_t g = 0; g < s->n_groups; g++)
        if (s->groups[g].expert->bottleneck[layer * BLOCKS + which].down) return 1;
    return 0;
}

// The adapters after a block: added += up f(down read), for the rows that have one. Begins and ends in barriers.
static void adapt(const Step *s, int64_t layer, int which, int thread, int threads) {
    int64_t width = s->model->width, turn = 0;
    meet(s->meeting, threads);
    for (int64_t g = 0; g < s->n_groups; g++) {
        const Group *group = s->groups + g;
        const Bottleneck *b = group->expert->bottleneck + layer * BLOCKS + which;
        if (!b->down) continue;
        for (int64_t n = 0; n < group->count; n++) {
            if (turn++ % threads != thread) continue;
            int64_t row = group->first + n;
            num read[width];
            for (int64_t i = 0; i < width; i += 16) {
                Wide v = load16(s->added + row * width + i);
                if (b->reads_sum) v = add16(v, load16(s->hidden + row * width + i));
                narrow(read + i, v);
            }
            float inner[b->size];
            memcpy(inner, b->down_bias, sizeof inner);
            for (int64_t c = 0; c < b->size; c += 16) block(1, inner + c, 16, read, width, b->down + c * width, width);
            activate(inner, b->size, b->activation);
            num *low = low_of(s, g, 0) + n * s->widest;
            for (int64_t c = 0; c < b->size; c += 16) narrow(low + c, load16(inner + c));
        }
    }
    meet(s->meeting, threads);
    int64_t first, end;
    share_of(width / 16, thread, threads, &first, &end);
    for (int64_t column = first * 16; column < end * 16; column += 16)
        for (int64_t g = 0; g < s->n_groups; g++) {
            const Group *group = s->groups + g;
            const Bottleneck *b = group->expert->bottleneck + layer * BLOCKS + which;
            if (!b->down) continue;
            float *out = s->added + group->first * width + column;
            block(group->count, out, width, low_of(s, g, 0), s->widest, b->up + column * b->size, b->size);
            for (int64_t i = 0; i < group->count; i++)
                store16(out + i * width, add16(load16(out + i * width), load16(b->up_bias + column)));
        }
    meet(s->meeting, threads);
    share_of(s->rows * width / 16, thread, threads, &first, &end);
    for (int64_t i = first * 16; i < end * 16; i += 16)
        store16(s->hidden + i, add16(load16(s->hidden + i), load16(s->added + i)));
}

// A block's last projection, into the residual stream, or into `added` where adapters come after it.
static void close_block(const Step *s, int64_t layer, int projection, const Matrix *a, const num *x, int64_t in,
                        const float *bias, int which, int thread, int threads) {
    int64_t width = s->model->width, first, end;
    int more = adapted(s, layer, which);
    float both[2 * s->rows * 16];
    share_of(width / 16, thread, threads, &first, &end);
    for (int64_t b = first; b < end; b++) {
        float *out = next_columns(a, b, first, end, s->rows, both, x, in);
        int64_t c = b * 16;
        complete(s, layer, projection, c, bias ? bias + c : NULL, out);
        for (int64_t n = 0; n < s->rows; n++) {
            Wide v = load16(out + n * 16);
            if (!more) v = add16(v, load16(s->hidden + n * width + c));
            store16((more ? s->added : s->hidden) + n * width + c, v);
        }
    }
    if (more) adapt(s, layer, which, thread, threads);
    meet(s->meeting, threads);
}

// Each row's best experts and their gates: softmax over all experts, or over those chosen.
static void choose(const Step *s, const float *router, int thread, int threads) {
    const Model *m = s->model;
    int64_t first, end, k = m->per_token;
    share_of(s->rows, thread, threads, &first, &end);
    for (int64_t n = first; n < end; n++) {
        float logit[m->experts], most = -INFINITY, total = 0, taken = 0;
        for (int64_t e = 0; e < m->experts; e++) {
            Wide sum = set16(0);
            for (int64_t i = 0; i < m->width; i += 16)
                sum = fma16(widen(s->x + n * m->width + i), load16(router + e * m->width + i), sum);
            logit[e] = sum16(sum);
            most = logit[e] > most ? logit[e] : most;
        }
        for (int64_t e = 0; e < m->experts; e++) total += expf(logit[e] - most);
        char gone[m->experts];
        memset(gone, 0, sizeof gone);
        for (int64_t j = n * k; j < (n + 1) * k; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < m->experts; e++)
                if (!gone[e] && (best < 0 || logit[e] > logit[best])) best = e;
            gone[best] = 1;
            s->chosen[j] = best;
            s->gate[j] = expf(logit[best] - most) / total;
            taken += s->gate[j];
        }
        for (int64_t j = n * k; m->gate_normed && j < (n + 1) * k; j++) s->gate[j] /= taken;
    }
}

// All choices in the order of their experts.
static void sort_choices(const Step *s) {
    int64_t choices = s->rows * s->model->per_token, at = 0;
    for (int64_t e = 0; e < s->model->experts; e++) {
        for (int64_t j = 0; j < choices; j++)
            if (s->chosen[j] == e) s->choice[s->place[j] = at++] = j;
        s->ends[e] = at;
    }
}

// A mixture's feed-forward, from normed rows into the residual stream, or into `added`. A row's experts are added up in
// their order, whoever else is in the batch.
static void mix(const Step *s, int64_t layer, int thread, int threads) {
    const Model *m = s->model;
    const Layer *l = m->layer + layer;
    int64_t width = m->width, inner = m->inner, k = m->per_token, first, end;
    choose(s, l->router, thread, threads);
    meet(s->meeting, threads);
    if (!thread) sort_choices(s);
    meet(s->meeting, threads);
    for (int64_t j = thread; j < s->rows * k; j += threads)
        memcpy(s->sorted + s->place[j] * width, s->x + j / k * width, width * sizeof(num));
    meet(s->meeting, threads);
    float out[2 * s->rows * 16];
    share_of(inner / 16, thread, threads, &first, &end);
    for (int64_t e = 0, from = 0; e < m->experts; from = s->ends[e++]) {
        int64_t rows = s->ends[e] - from;
        for (int64_t c = first * 16; c < end * 16 && rows; c += 16) {
            two_columns(l->gate_ups + e, c, inner + c, rows, out, s->sorted + from * width, width);
            for (int64_t n = 0; n < rows; n++)
                narrow(s->inner + (from + n) * inner + c, gated(out, rows, n));
        }
    }
    meet(s->meeting, threads);
    int more = adapted(s, layer, FFN);
    float *into = more ? s->added : s->hidden;
    share_of(width / 16, thread, threads, &first, &end);
    for (int64_t n = 0; n < s->rows && more; n++) memset(into + n * width + first * 16, 0, (end - first) * 16 * 4);
    for (int64_t e = 0, from = 0; e < m->experts; from = s->ends[e++]) {
        int64_t rows = s->ends[e] - from;
        for (int64_t b = first; b < end && rows; b++) {
            const float *made = next_columns(l->downs + e, b, first, end, rows, out, s->inner + from * inner, inner);
            for (int64_t n = 0; n < rows; n++) {
                int64_t j = s->choice[from + n];
                float *to = into + j / k * width + b * 16;
                store16(to, fma16(load16(made + n * 16), set16(s->gate[j]), load16(to)));
            }
        }
    }
    if (more) adapt(s, layer, FFN, thread, threads);
    meet(s->meeting, threads);
}

static void run_layer(const Step *s, int64_t layer, int thread, int threads) {
    const Model *m = s->model;
    const Layer *l = m->layer + layer;
    int64_t q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim, all = q + 2 * kv, width = m->width, first, end;
    float both[2 * s->rows * 16];

    norm_rows(s, l->attn_norm, s->rows, NULL, thread, threads);
    meet(s->meeting, threads);
    lower(s, layer, Q, V, s->x, width, thread, threads);
    share_of(all / 16, thread, threads, &first, &end);
    for (int64_t b = first; b < end; b++) {
        float *out = next_columns(&l->qkv, b, first, end, s->rows, both, s->x, width);
        int64_t c = b * 16;
        int p = c < q ? Q : c < q + kv ? K : V;
        int64_t column = c - (p == Q ? 0 : p == K ? q : q + kv);
        complete(s, layer, p, column, l->qkv_bias ? l->qkv_bias + c : NULL, out);
        for (int64_t n = 0; n < s->rows; n++) store16(s->qkv + n * all + c, load16(out + n * 16));
    }
    meet(s->meeting, threads);
    for (int64_t i = thread; i < s->rows * m->kv_heads; i += threads) store(s, layer, i / m->kv_heads, i % m->kv_heads);
    meet(s->meeting, threads);
    for (int64_t i = thread; i < s->rows * m->kv_heads; i += threads) {
        int64_t next = i + threads < s->rows * m->kv_heads ? i + threads : i;
        const num *keys = s->cache->keys + head_of(s, *blocks_of(s, s->cache->table, layer, next / m->kv_heads), next % m->kv_heads);
        ask(keys, s->cache->page * m->head_dim);
        attend(s, layer, i / m->kv_heads, i % m->kv_heads, s->scores + thread * s->longest);
    }
    meet(s->meeting, threads);
    lower(s, layer, O, O, s->mixed, q, thread, threads);
    close_block(s, layer, O, &l->o, s->mixed, q, l->o_bias, ATTN, thread, threads);

    norm_rows(s, l->ffn_norm, s->rows, NULL, thread, threads);
    meet(s->meeting, threads);
    if (l->router) {
        mix(s, layer, thread, threads);
        return;
    }
    lower(s, layer, GATE, UP, s->x, width, thread, threads);
    share_of(m->ffn / 16, thread, threads, &first, &end);
    for (int64_t c = first * 16; c < end * 16; c += 16) {
        two_columns(&l->gate_up, c, m->ffn + c, s->rows, both, s->x, width);
        complete(s, layer, GATE, c, NULL, both);
        complete(s, layer, UP, c, NULL, both + s->rows * 16);
        for (int64_t n = 0; n < s->rows; n++) narrow(s->fed + n * m->ffn + c, gated(both, s->rows, n));
    }
    meet(s->meeting, threads);
    lower(s, layer, DOWN, DOWN, s->fed, m->ffn, thread, threads);
    close_block(s, layer, DOWN, &l->down, s->fed, m->ffn, NULL, FFN, thread, threads);
}

// The first `rows` of the batch through one layer, and what comes out of it to where the next one's entry is kept.
static void run_rows(const Step *all, int64_t rows, int64_t layer, int64_t layers, int thread, int threads) {
    Step s = *all;
    s.rows = rows;
    while (s.n_groups && s.groups[s.n_groups - 1].first >= rows) s.n_groups--;
    run_layer(&s, layer, thread, threads);
    for (int64_t n = thread; n < rows && layer + 1 < layers; n += threads) {
        float *kept = entry_of(&s, layer + 1, n);
        if (kept) memcpy(kept, s.hidden + n * s.model->width, s.model->width * sizeof(float));
    }
}

static void *room(size_t bytes) { return aligned_alloc(64, bytes / 64 * 64 + 64); }

// Round a matrix w (out, in), in a multiple of GROUP, to whole numbers in 8 bits as `Matrix` has them. A group is rounded
// in the better of two ways: evenly about zero, or evenly from its least to its largest number, as GGUF's Q8_0 and Q4_1
// have stored theirs. Returns the squared error as a share of the squared norm.
double coterie_round(const float *w, int64_t out, int64_t in, int8_t *in8, float *scales, int threads) {
    double off = 0, norm = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : off, norm)
    for (int64_t row = 0; row < (out + 15) / 16 * 16; row++)
        for (int64_t g = 0; g < in / GROUP; g++) {
            float x[GROUP] = {0}, lows[16], highs[16], value[GROUP], best = INFINITY;
            if (row < out) memcpy(x, w + row * in + g * GROUP, sizeof x);
            const Wide v[2] = {load16(x), load16(x + 16)};
            store16(lows, min16(v[0], v[1]));
            store16(highs, max16(v[0], v[1]));
            float least = lows[0], largest = highs[0];
            for (int k = 1; k < 16; k++) {
                least = lows[k] < least ? lows[k] : least;
                largest = highs[k] > largest ? highs[k] : largest;
            }
            float even = (-least > largest ? -least : largest) / 127, between = (largest - least) / 255;
            const float ways[2][2] = {{even, 0}, {between, least + 128 * between}};
            for (int way = 0; way < 2; way++) {
                float scale = ways[way][0] > 0 ? ways[way][0] : 1, offset = ways[way][1];
                Wide error = set16(0), number[2];
                for (int half = 0; half < 2; half++) {
                    Wide whole = round16(div16(sub16(v[half], set16(offset)), set16(scale)));
                    number[half] = max16(min16(whole, set16(127)), set16(-128));
                    Wide d = sub16(fma16(number[half], set16(scale), set16(offset)), v[half]);
                    error = fma16(d, d, error);
                }
                float all = sum16(error);
                if (all >= best) continue;
                best = all;
                store16(value, number[0]);
                store16(value + 16, number[1]);
                float *to = scales + (row / 16 * (in / GROUP) + g) * 32 + row % 16;
                to[0] = scale, to[16] = offset;
            }
            int8_t *to = in8 + row / 16 * in * 16 + g * GROUP * 16 + row % 16;
            for (int k = 0; k < GROUP; k++) to[k * 16] = (int8_t)value[k];
            off += best;
            norm += sum16(fma16(v[0], v[0], mul16(v[1], v[1])));
        }
    return norm > 0 ? off / norm : 0;
}

// y (rows, out) = x (rows, in) W^T, out a multiple of 16: what a step does with each matrix.
void coterie_product(const Matrix *a, int64_t rows, const num *x, int64_t in, float *y, int64_t out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float columns[2 * rows * 16];
        int64_t first, end;
        share_of(out / 16, omp_get_thread_num(), omp_get_num_threads(), &first, &end);
        for (int64_t b = first; b < end; b++) {
            const float *made = next_columns(a, b, first, end, rows, columns, x, in);
            for (int64_t n = 0; n < rows; n++) memcpy(y + n * out + b * 16, made + n * 16, 16 * sizeof(float));
        }
    }
}

// Go on with every row: `embedded` (rows, width) are the tokens' embeddings, `positions` where they stand, `slots` where
// their sequences lie in the cache, `starts` (rows, ascending) the layers at which they begin: a row that begins above 0
// takes its residual stream from the cache, and a group's rows begin at one layer. Groups lie in the rows' order.
// Writes the scores (scored, vocab) after the rows `wanted` (scored), and where `stream` is not NULL the residual stream
// after the first `layers` (rows, width). Returns 0, or 1 where memory ran out.
int coterie_step(const Model *m, const Cache *cache, int64_t rows, const num *embedded, const int64_t *positions,
                 const int64_t *slots, const int64_t *starts, int64_t n_groups, const Group *groups, int64_t scored,
                 const int64_t *wanted, float *logits, int64_t layers, float *stream, int threads) {
    int64_t width = m->width, q = m->heads * m->head_dim, all = q + 2 * m->kv_heads * m->head_dim;
    Meeting meeting = {0};
    Step s = {.meeting = &meeting, .model = m, .groups = groups, .cache = cache, .positions = positions, .slots = slots,
              .rows = rows, .n_groups = n_groups, .widest = 16};
    for (int64_t g = 0; g < n_groups; g++)
        if (groups[g].expert->widest > s.widest) s.widest = groups[g].expert->widest;
    for (int64_t n = 0; n < rows; n++)
        if (positions[n] + 1 > s.longest) s.longest = positions[n] + 1;
    s.longest = (s.longest + 15) / 16 * 16;
    int64_t choices = rows * m->per_token;
    void *rooms[] = {
        s.hidden = room(rows * width * 4), s.qkv = room(rows * all * 4), s.added = room(rows * width * 4),
        s.x = room(rows * width * sizeof(num)), s.mixed = room(rows * q * sizeof(num)),
        s.fed = room(rows * m->ffn * sizeof(num)),
        s.low = room((n_groups + 1) * PROJECTIONS * rows * s.widest * sizeof(num)), s.scores = room(threads * s.longest * 4),
        s.chosen = room(choices * 8), s.place = room(choices * 8), s.choice = room(choices * 8), s.ends = room(m->experts * 8),
        s.gate = room(choices * 4), s.sorted = room(choices * width * sizeof(num)),
        s.inner = room(choices * m->inner * sizeof(num)),
    };
    int failed = 0, count = sizeof rooms / sizeof *rooms;
    for (int i = 0; i < count; i++) failed |= !rooms[i];
    if (!failed) {
        for (int64_t n = 0; n < rows; n++) {
            float *hidden = s.hidden + n * width;
            if (starts[n]) memcpy(hidden, entry_of(&s, starts[n], n), width * sizeof(float));
            else for (int64_t i = 0; i < width; i += 16) store16(hidden + i, widen(embedded + n * width + i));
        }
#pragma omp parallel num_threads(threads)
        {
            int thread = omp_get_thread_num(), team = omp_get_num_threads();
            for (int64_t layer = 0, begun = 0; layer < layers; layer++) {
                while (begun < rows && starts[begun] <= layer) begun++;
                if (begun) run_rows(&s, begun, layer, layers, thread, team);
            }
            norm_rows(&s, m->final_norm, scored, wanted, thread, team);
            meet(s.meeting, team);
            int64_t first, end;
            share_of((m->vocab + 15) / 16, thread, team, &first, &end);
            float both[2 * (scored + 1) * 16];
            for (int64_t b = first; b < end && scored; b++) {
                const float *out = next_columns(&m->head, b, first, end, scored, both, s.x, width);
                int64_t c = b * 16, columns = m->vocab - c < 16 ? m->vocab - c : 16;
                for (int64_t n = 0; n < scored; n++) memcpy(logits + n * m->vocab + c, out + n * 16, columns * 4);
            }
        }
    }
    if (!failed && stream) memcpy(stream, s.hidden, rows * width * 4);
    for (int i = 0; i < count; i++) free(rooms[i]);
    return failed;
}
