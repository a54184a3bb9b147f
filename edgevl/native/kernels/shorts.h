// Products of int16 in pairs, summed in int32: N holds W sums, or W pairs of two int16.
#pragma once

#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {

#if EDGEVL_LEVEL == 2

using N = __m512i;
static inline N no_products() { return _mm512_setzero_si512(); }
static inline N load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
static inline void store_pairs(int16_t* p, N v) { _mm512_storeu_si512(p, v); }
static inline N splat_pair(const int16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
}
static inline N dot2(N sums, N a, N b) {
#if defined(__AVX512VNNI__)
    return add_twos(sums, a, b);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}
static inline V to_float(N sums) { return _mm512_cvtepi32_ps(sums); }
static inline N pair_up(V first, V second) {  // each rounded to an int16
    const N low = _mm512_and_si512(_mm512_cvtps_epi32(first), _mm512_set1_epi32(0xffff));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtps_epi32(second), 16));
}
static inline void store_shorts(int16_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}

#elif EDGEVL_LEVEL == 1

using N = __m256i;
static inline N no_products() { return _mm256_setzero_si256(); }
static inline N load_pairs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const N*>(p)); }
static inline void store_pairs(int16_t* p, N v) { _mm256_storeu_si256(reinterpret_cast<N*>(p), v); }
static inline N splat_pair(const int16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return _mm256_set1_epi32(both);
}
static inline N dot2(N sums, N a, N b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
static inline V to_float(N sums) { return _mm256_cvtepi32_ps(sums); }
static inline N pair_up(V first, V second) {
    const N low = _mm256_and_si256(_mm256_cvtps_epi32(first), _mm256_set1_epi32(0xffff));
    return _mm256_or_si256(low, _mm256_slli_epi32(_mm256_cvtps_epi32(second), 16));
}
static inline void store_shorts(int16_t* p, V v) {
    const N x = _mm256_cvtps_epi32(v);
    const __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), y);
}

#else

struct N {
    int16_t pair[2 * W];
};
struct Products {
    int32_t lane[W];
};
static inline Products no_products() { return {}; }
static inline N load_pairs(const int16_t* p) {
    N out;
    std::memcpy(out.pair, p, sizeof out.pair);
    return out;
}
static inline void store_pairs(int16_t* p, const N& v) { std::memcpy(p, v.pair, sizeof v.pair); }
static inline N splat_pair(const int16_t* p) {
    N out;
    for (int i = 0; i < 2 * W; ++i) out.pair[i] = p[i % 2];
    return out;
}
static inline Products dot2(Products sums, const N& a, const N& b) {
    for (int i = 0; i < W; ++i) {
        sums.lane[i] +=
            int32_t(a.pair[2 * i]) * b.pair[2 * i] + int32_t(a.pair[2 * i + 1]) * b.pair[2 * i + 1];
    }
    return sums;
}
static inline V to_float(const Products& sums) {
    return V{float(sums.lane[0]), float(sums.lane[1]), float(sums.lane[2]), float(sums.lane[3])};
}
static inline N pair_up(V first, V second) {
    const V low = vround(first), high = vround(second);
    N out;
    for (int i = 0; i < W; ++i) {
        out.pair[2 * i] = int16_t(low[i]);
        out.pair[2 * i + 1] = int16_t(high[i]);
    }
    return out;
}
static inline void store_shorts(int16_t* p, V v) {
    const V whole = vround(v);
    for (int i = 0; i < W; ++i) p[i] = int16_t(whole[i]);
}

#endif

#if EDGEVL_LEVEL >= 1
using Products = N;
#endif

// R rows of pairs, `lda` int16 apart, times B vectors of columns whose pairs lie `ldb` int16 apart.
template <int R, int B>
static inline void multiply_pairs(const int16_t* a, int64_t lda, const int16_t* b, int64_t ldb, int64_t pairs,
                                  Products (&sums)[R][B]) {
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
        EDGEVL_UNROLL
        for (int c = 0; c < B; ++c) sums[r][c] = no_products();
    }
    for (int64_t i = 0; i < pairs; ++i, b += ldb) {
        N columns[B];
        EDGEVL_UNROLL
        for (int c = 0; c < B; ++c) columns[c] = load_pairs(b + 2 * c * W);
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
            const N x = splat_pair(a + r * lda + 2 * i);
            EDGEVL_UNROLL
            for (int c = 0; c < B; ++c) sums[r][c] = dot2(sums[r][c], x, columns[c]);
        }
    }
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
