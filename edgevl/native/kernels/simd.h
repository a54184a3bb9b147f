// Vectors of f32 for the instruction set this file is compiled for: V with W lanes, and what the kernels do
// with them. Four versions: AVX-512, AVX2 with FMA and F16C, NEON, and portable (GCC vector extensions, 128
// bits). Everything has internal linkage. + - * / on V come from the compiler.
#pragma once

#include <cstdint>
#include <cstring>

#if EDGEVL_LEVEL >= 1
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define EDGEVL_NEON
#include <arm_neon.h>
#endif

#define EDGEVL_UNROLL _Pragma("GCC unroll 16")

namespace edgevl {
namespace EDGEVL_ISA {

// -- scalar f16
// ------------------------------------------------------------------------------------------------------

static inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float half_to_float(uint16_t h) {
#if EDGEVL_LEVEL >= 1
    return _cvtsh_ss(h);
#elif defined(EDGEVL_NEON)
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
    // the exponent is moved by a multiplication, which takes care of subnormals too
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000)));
#endif
}

static inline uint16_t float_to_half(float f) {
#if EDGEVL_LEVEL >= 1
    return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(EDGEVL_NEON)
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(f))), 0);
#else
    const uint32_t bits = to_bits(f), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {  // subnormal: the addition of 0.5 rounds to even
        return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
#endif
}

// -- vectors
// ---------------------------------------------------------------------------------------------------------

#if EDGEVL_LEVEL == 2

using V = __m512;
constexpr int W = 16;
constexpr int kTile = 12;  // rows of a register tile: 12 × 2 accumulators of 32 registers

static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline V splat(float x) { return _mm512_set1_ps(x); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
static inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
static inline V vabs(V a) { return _mm512_abs_ps(a); }
static inline V vround(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V scale2(V a, V n) { return _mm512_scalef_ps(a, n); }
static inline V copysign(V magnitude, V sign) {
    const __m512i mask = _mm512_set1_epi32(int(0x80000000));
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_castps_si512(magnitude), _mm512_and_si512(_mm512_castps_si512(sign), mask)));
}
static inline float sum(V a) { return _mm512_reduce_add_ps(a); }
static inline float highest(V a) { return _mm512_reduce_max_ps(a); }
static inline V load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline V load_codes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline void store_half(uint16_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

static inline void transpose(V r[W]) {
    V t[16];
    EDGEVL_UNROLL
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    EDGEVL_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
        const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // r[4i + j] now holds, in quarter q, column 4q + j of rows 4i..4i+3
    EDGEVL_UNROLL
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    }
    EDGEVL_UNROLL
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
        r[4 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

#elif EDGEVL_LEVEL == 1

using V = __m256;
constexpr int W = 8;
constexpr int kTile = 6;  // 6 × 2 accumulators of 16 registers

static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
static inline V splat(float x) { return _mm256_set1_ps(x); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
static inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
static inline V vabs(V a) { return _mm256_andnot_ps(splat(-0.0f), a); }
static inline V vround(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V scale2(V a, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return a * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static inline V copysign(V magnitude, V sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, splat(-0.0f)));
}
static inline float sum(V a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float highest(V a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline V load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline V load_codes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline void store_half(uint16_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

static inline void transpose(V r[W]) {
    V t[8];
    EDGEVL_UNROLL
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    EDGEVL_UNROLL
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    EDGEVL_UNROLL
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    EDGEVL_UNROLL
    for (int j = 0; j < 8; ++j) r[j] = t[j];
}

#elif defined(EDGEVL_NEON)

using V = float32x4_t;
constexpr int W = 4;
constexpr int kTile = 8;  // 8 × 2 accumulators of 32 registers

static inline V load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, V v) { vst1q_f32(p, v); }
static inline V splat(float x) { return vdupq_n_f32(x); }
static inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
static inline V vmax(V a, V b) { return vmaxq_f32(a, b); }
static inline V vmin(V a, V b) { return vminq_f32(a, b); }
static inline V vabs(V a) { return vabsq_f32(a); }
static inline V vround(V a) { return vrndnq_f32(a); }
static inline V scale2(V a, V n) {
    return a * vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
static inline V copysign(V magnitude, V sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
static inline float sum(V a) { return vaddvq_f32(a); }
static inline float highest(V a) { return vmaxvq_f32(a); }
static inline V load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline V load_codes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
static inline void store_half(uint16_t* p, V v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

static inline void transpose(V r[W]) {
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

#else

typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int W = 4;
#if defined(__aarch64__)
constexpr int kTile = 8;  // 8 × 2 accumulators of 32 registers
#else
constexpr int kTile = 4;
#endif

static inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline V splat(float x) { return V{x, x, x, x}; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V vmax(V a, V b) { return a > b ? a : b; }
static inline V vmin(V a, V b) { return a < b ? a : b; }
static inline V vabs(V a) { return (V)((I)a & 0x7fffffff); }
static inline V vround(V a) {
    const V magic = splat(12582912.0f);  // 1.5·2^23: the addition drops the fraction, to nearest
    return (a + magic) - magic;
}
static inline V scale2(V a, V n) { return a * (V)((__builtin_convertvector(n, I) + 127) << 23); }
static inline V copysign(V magnitude, V sign) { return (V)((I)magnitude | ((I)sign & int32_t(0x80000000))); }
static inline float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float highest(V a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}
static inline V load_half(const uint16_t* p) {
    return V{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
static inline V load_codes(const int8_t* p) { return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
static inline void store_half(uint16_t* p, V v) {
    for (int i = 0; i < W; ++i) p[i] = float_to_half(v[i]);
}

static inline void transpose(V r[W]) {
    const V a = r[0], b = r[1], c = r[2], d = r[3];
    for (int j = 0; j < 4; ++j) r[j] = V{a[j], b[j], c[j], d[j]};
}

#endif

#if defined(__AVX512VNNI__)
// sums += products of unsigned and signed int8 by fours, or of int16 by twos. Written out, since GCC 12 moves
// sums that an intrinsic adds to from register to register and out to memory.
static inline __m512i add_fours(__m512i sums, __m512i codes, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
    return sums;
}
static inline __m512i add_twos(__m512i sums, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
#endif

// -- functions
// -------------------------------------------------------------------------------------------------------

// e^x to about two units in the last place, x clamped to -87..88. Range reduction by multiples of ln 2, then
// the Taylor series to degree 7 on |r| <= ln(2)/2.
static inline V vexp(V x) {
    x = vmax(vmin(x, splat(88.0f)), splat(-87.0f));
    const V n = vround(x * splat(1.44269504f));
    V r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    V p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return scale2(p, n);
}

// erf(x) within 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, formula 7.1.26.
static inline V verf(V x) {
    const V a = vabs(x);
    const V t = splat(1.0f) / fma(a, splat(0.3275911f), splat(1.0f));
    V p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    return copysign(splat(1.0f) - p * t * vexp(splat(0.0f) - a * a), x);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The first `count` < W floats of p, zeros behind.
static inline V load_part(const float* p, int64_t count) {
    float lanes[W] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}
// The first `count` lanes of v, `rest` behind.
static inline V first_of(V v, int64_t count, float rest) {
    float lanes[2 * W];
    store(lanes, v);
    store(lanes + count, splat(rest));
    return load(lanes);
}
static inline void store_part(float* p, V v, int64_t count) {
    float lanes[W];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
