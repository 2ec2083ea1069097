// What the kernels in C share: 16 numbers at a time, in one register of AVX-512 or in two of AVX2.
//
// `num` is what weights, cache and the inputs of products are made of: bfloat16 where the processor multiplies it
// (AVX512-BF16), else float32. Sums are float32 in both.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ONE_REGISTER  // and 32 of them, where AVX2 has 16

typedef __m512 Wide;

static inline Wide load16(const float *x) { return _mm512_loadu_ps(x); }
static inline void store16(float *x, Wide v) { _mm512_storeu_ps(x, v); }
static inline Wide set16(float x) { return _mm512_set1_ps(x); }
static inline Wide add16(Wide a, Wide b) { return _mm512_add_ps(a, b); }
static inline Wide sub16(Wide a, Wide b) { return _mm512_sub_ps(a, b); }
static inline Wide mul16(Wide a, Wide b) { return _mm512_mul_ps(a, b); }
static inline Wide div16(Wide a, Wide b) { return _mm512_div_ps(a, b); }
static inline Wide max16(Wide a, Wide b) { return _mm512_max_ps(a, b); }
static inline Wide min16(Wide a, Wide b) { return _mm512_min_ps(a, b); }
static inline Wide fma16(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
static inline Wide fms16(Wide a, Wide b, Wide c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
static inline Wide fnma16(Wide a, Wide b, Wide c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
static inline Wide round16(Wide x) { return _mm512_roundscale_ps(x, 0); }
static inline Wide scale16(Wide x, Wide n) { return _mm512_scalef_ps(x, n); }  // x 2^n
static inline float sum16(Wide x) { return _mm512_reduce_add_ps(x); }
static inline Wide positive16(Wide x, Wide v) {  // v where x > 0, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), v);
}

// The first `left` of 16; the others are read as 0, and not written.
static inline __mmask16 first_of_16(int64_t left) { return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }
static inline Wide load_some(const float *x, int64_t left) { return _mm512_maskz_loadu_ps(first_of_16(left), x); }
static inline void store_some(float *x, Wide v, int64_t left) { _mm512_mask_storeu_ps(x, first_of_16(left), v); }
static inline void stream16(float *x, Wide v) { _mm512_stream_ps(x, v); }  // past the caches; x at a multiple of 64 bytes

// The sums of each of four.
static inline __m128 four_sums(Wide s0, Wide s1, Wide s2, Wide s3) {
    Wide s01 = _mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1));
    Wide s23 = _mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3));
    Wide all = _mm512_add_ps(_mm512_shuffle_ps(s01, s23, 0x44), _mm512_shuffle_ps(s01, s23, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#else

typedef struct {
    __m256 a, b;
} Wide;

#define EACH(name, instruction) \
    static inline Wide name(Wide x, Wide y) { return (Wide){instruction(x.a, y.a), instruction(x.b, y.b)}; }
EACH(add16, _mm256_add_ps)
EACH(sub16, _mm256_sub_ps)
EACH(mul16, _mm256_mul_ps)
EACH(div16, _mm256_div_ps)
EACH(max16, _mm256_max_ps)
EACH(min16, _mm256_min_ps)
#undef EACH
#define EACH(name, instruction) \
    static inline Wide name(Wide x, Wide y, Wide z) { return (Wide){instruction(x.a, y.a, z.a), instruction(x.b, y.b, z.b)}; }
EACH(fma16, _mm256_fmadd_ps)
EACH(fms16, _mm256_fmsub_ps)
EACH(fnma16, _mm256_fnmadd_ps)
#undef EACH

static inline Wide load16(const float *x) { return (Wide){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
static inline void store16(float *x, Wide v) { _mm256_storeu_ps(x, v.a), _mm256_storeu_ps(x + 8, v.b); }
static inline Wide set16(float x) { return (Wide){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

static inline Wide positive16(Wide x, Wide v) {  // v where x > 0, else 0
    __m256 zero = _mm256_setzero_ps();
    return (Wide){_mm256_and_ps(_mm256_cmp_ps(x.a, zero, _CMP_GT_OQ), v.a),
                  _mm256_and_ps(_mm256_cmp_ps(x.b, zero, _CMP_GT_OQ), v.b)};
}

// The first `left` of 16; the others are read as 0, and not written.
static inline __m256i first_of_8(int64_t left) {
    int some = left > 8 ? 8 : left < 0 ? 0 : (int)left;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(some), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Wide load_some(const float *x, int64_t left) {
    if (left >= 16) return load16(x);
    return (Wide){_mm256_maskload_ps(x, first_of_8(left)), _mm256_maskload_ps(x + 8, first_of_8(left - 8))};
}
static inline void store_some(float *x, Wide v, int64_t left) {
    if (left >= 16) {
        store16(x, v);
        return;
    }
    _mm256_maskstore_ps(x, first_of_8(left), v.a);
    _mm256_maskstore_ps(x + 8, first_of_8(left - 8), v.b);
}
static inline void stream16(float *x, Wide v) {  // past the caches; x at a multiple of 64 bytes
    _mm256_stream_ps(x, v.a), _mm256_stream_ps(x + 8, v.b);
}

static inline Wide round16(Wide x) {
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    return (Wide){_mm256_round_ps(x.a, NEAREST), _mm256_round_ps(x.b, NEAREST)};
}

static inline __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

// x 2^n, n a whole number from -126 to 127.
static inline Wide scale16(Wide x, Wide n) { return mul16(x, (Wide){power_of_two(n.a), power_of_two(n.b)}); }

// The sums of each of four.
static inline __m128 four_sums(Wide s0, Wide s1, Wide s2, Wide s3) {
    __m256 s01 = _mm256_hadd_ps(_mm256_add_ps(s0.a, s0.b), _mm256_add_ps(s1.a, s1.b));
    __m256 s23 = _mm256_hadd_ps(_mm256_add_ps(s2.a, s2.b), _mm256_add_ps(s3.a, s3.b));
    __m256 all = _mm256_hadd_ps(s01, s23);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

static inline float sum16(Wide x) { return _mm_cvtss_f32(four_sums(x, x, x, x)); }

#endif

#ifdef __AVX512BF16__

typedef uint16_t bf16;
typedef bf16 num;

static inline Wide widen(const num *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline void narrow(num *out, Wide x) { _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(x)); }

// The products of two vectors, `dim` a multiple of 32, in 16 sums.
static inline Wide dot(const num *a, const num *b, int64_t dim) {
    Wide sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
    return sum;
}

#else

typedef float num;

static inline Wide widen(const num *x) { return load16(x); }
static inline void narrow(num *out, Wide x) { store16(out, x); }

static inline Wide dot(const num *a, const num *b, int64_t dim) {
    Wide sum = set16(0);
    for (int64_t i = 0; i < dim; i += 16) sum = fma16(load16(a + i), load16(b + i), sum);
    return sum;
}

#endif

// e^x, within a few units in the last place of float32.
static inline Wide exp16(Wide x) {
    x = min16(max16(x, set16(-87.0f)), set16(88.0f));
    Wide n = round16(mul16(x, set16(1.44269504f)));
    Wide r = fnma16(n, set16(0.693359375f), x);
    r = fnma16(n, set16(-2.12194440e-4f), r);
    Wide p = set16(1.9875691500e-4f);
    p = fma16(p, r, set16(1.3981999507e-3f));
    p = fma16(p, r, set16(8.3334519073e-3f));
    p = fma16(p, r, set16(4.1665795894e-2f));
    p = fma16(p, r, set16(1.6666665459e-1f));
    p = fma16(p, r, set16(5.0000001201e-1f));
    p = fma16(p, mul16(r, r), add16(r, set16(1.0f)));
    return scale16(p, n);
}

static inline Wide sigmoid16(Wide x) { return div16(set16(1.0f), add16(set16(1.0f), exp16(sub16(set16(0.0f), x)))); }

static inline Wide silu16(Wide x) { return div16(x, add16(set16(1.0f), exp16(sub16(set16(0.0f), x)))); }

// Of each library: the bytes of `num`, 2 where it is bfloat16.
int coterie_num(void) { return sizeof(num); }
