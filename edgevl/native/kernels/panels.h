// Products of int8 activations and int4 weights in panels of 16 out-features, in whole numbers inside a
// group.
//
// The integers are the same for every instruction set: activations are rounded once (coded_rows.h), products
// and sums of a group fit 32 bits. Only the sum over groups is in f32.
#pragma once

#include "coded_rows.h"

namespace edgevl {
namespace EDGEVL_ISA {

constexpr int kLanes = int(kPanelRows);  // out-features of a panel
constexpr int64_t kAhead = 4096;         // bytes of codes of each panel that are fetched ahead
constexpr int kParts = kLanes / W;       // vectors of f32 that hold one value of each

// -- whole numbers
// ---------------------------------------------------------------------------------------------------------

// Two int16 of a lane.
static inline int32_t pair(int8_t low, int8_t high) {
    return int32_t(uint32_t(uint16_t(int16_t(low))) | uint32_t(uint16_t(int16_t(high))) << 16);
}

// Four in-features of each of 16 out-features, and sums over them.
#if EDGEVL_LEVEL == 2
struct Fours {
    __m512i low, high;  // in-features 0..3 and 4..7 of eight
};
using Sums = __m512i;
static inline Sums no_sums() { return _mm512_setzero_si512(); }
static inline Fours load_fours(const uint8_t* p) {
    __m512i codes = _mm512_loadu_si512(p);
    asm("" : "+v"(codes));  // loaded once, into a register
    const __m512i mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(codes, mask), _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask)};
}
static inline Sums dot4(Sums sums, __m512i codes, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
    return add_fours(sums, codes, _mm512_set1_epi32(four));
#else
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi32(four));  // at most 2 · 15 · 127
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
static inline V as_float(const Sums& sums, int) { return _mm512_cvtepi32_ps(sums); }
using Bytes = __m512i;
#if defined(__AVX512VNNI__)
// signed codes are moved up by 128 for an instruction that wants them unsigned; the sums begin with what that
// adds
static inline Sums first_sums(int32_t whole) { return _mm512_set1_epi32(-128 * whole); }
static inline Bytes load_bytes(const uint8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)));
}
static inline Sums dot_bytes(Sums sums, Bytes codes, const int8_t* x) { return dot4(sums, codes, x); }
#else
static inline Sums first_sums(int32_t) { return no_sums(); }
static inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Sums dot_bytes(Sums sums, Bytes codes, const int8_t* x) {
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 8), odd = _mm512_srai_epi16(codes, 8);
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(even, _mm512_set1_epi32(pair(x[0], x[2]))));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(odd, _mm512_set1_epi32(pair(x[1], x[3]))));
}
#endif
static inline V load_zeros(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif EDGEVL_LEVEL == 1
struct Bytes64 {
    __m256i half[2];
};
struct Fours {
    Bytes64 low, high;
};
struct Sums {
    __m256i half[2];
};
static inline Sums no_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
static inline Fours load_fours(const uint8_t* p) {
    Fours out;
    const __m256i mask = _mm256_set1_epi8(15);
    EDGEVL_UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * h));
        out.low.half[h] = _mm256_and_si256(codes, mask);
        out.high.half[h] = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
    }
    return out;
}
static inline Sums dot4(Sums sums, const Bytes64& codes, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i all = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    EDGEVL_UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256i pairs = _mm256_maddubs_epi16(codes.half[h], all);  // at most 2 · 15 · 127
        sums.half[h] = _mm256_add_epi32(sums.half[h], _mm256_madd_epi16(pairs, ones));
    }
    return sums;
}
static inline V as_float(const Sums& sums, int part) { return _mm256_cvtepi32_ps(sums.half[part]); }
using Bytes = Bytes64;
static inline Sums first_sums(int32_t) { return no_sums(); }
static inline Bytes load_bytes(const uint8_t* p) {
    const __m256i* from = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}
static inline Sums dot_bytes(Sums sums, const Bytes& codes, const int8_t* x) {
    const __m256i outer = _mm256_set1_epi32(pair(x[0], x[2])), inner = _mm256_set1_epi32(pair(x[1], x[3]));
    EDGEVL_UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes.half[h], 8), 8);
        const __m256i odd = _mm256_srai_epi16(codes.half[h], 8);
        const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even, outer), _mm256_madd_epi16(odd, inner));
        sums.half[h] = _mm256_add_epi32(sums.half[h], both);
    }
    return sums;
}
static inline V load_zeros(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(EDGEVL_NEON)
struct Bytes64 {
    int8x16_t quarter[4];
};
struct Fours {
    Bytes64 low, high;
};
struct Sums {
    int32x4_t quarter[4];
};
static inline Sums no_sums() {
    const int32x4_t zero = vdupq_n_s32(0);
    return {{zero, zero, zero, zero}};
}
static inline Fours load_fours(const uint8_t* p) {
    Fours out;
    EDGEVL_UNROLL
    for (int q = 0; q < 4; ++q) {
        const uint8x16_t codes = vld1q_u8(p + 16 * q);
        out.low.quarter[q] = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
        out.high.quarter[q] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
    }
    return out;
}
static inline Sums dot4(Sums sums, const Bytes64& codes, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    EDGEVL_UNROLL
    for (int q = 0; q < 4; ++q) sums.quarter[q] = vdotq_s32(sums.quarter[q], codes.quarter[q], all);
    return sums;
}
static inline V as_float(const Sums& sums, int part) { return vcvtq_f32_s32(sums.quarter[part]); }
using Bytes = Bytes64;
static inline Sums first_sums(int32_t) { return no_sums(); }
static inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    EDGEVL_UNROLL
    for (int q = 0; q < 4; ++q) out.quarter[q] = vld1q_s8(reinterpret_cast<const int8_t*>(p) + 16 * q);
    return out;
}
static inline Sums dot_bytes(Sums sums, const Bytes& codes, const int8_t* x) { return dot4(sums, codes, x); }
#if defined(__ARM_FEATURE_MATMUL_INT8)
// Eight in-features of two rows x and y at once. Until `part_rows`, a vector of the sums of both holds two
// out-features of x and the same two of y.
static inline void dot_rows(Sums& x_sums, Sums& y_sums, const Bytes64& low, const Bytes64& high,
                            const int8_t* x, const int8_t* y) {
    const int8x16_t both = vcombine_s8(vld1_s8(x), vld1_s8(y));
    EDGEVL_UNROLL
    for (int q = 0; q < 4; ++q) {
        const int32x4_t a = vreinterpretq_s32_s8(low.quarter[q]), b = vreinterpretq_s32_s8(high.quarter[q]);
        const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(a, b));
        x_sums.quarter[q] = vmmlaq_s32(x_sums.quarter[q], both, first);
        y_sums.quarter[q] = vmmlaq_s32(y_sums.quarter[q], both, second);
    }
}
static inline void part_rows(Sums& x_sums, Sums& y_sums) {
    EDGEVL_UNROLL
    for (int q = 0; q < 4; ++q) {
        const int64x2_t a = vreinterpretq_s64_s32(x_sums.quarter[q]);
        const int64x2_t b = vreinterpretq_s64_s32(y_sums.quarter[q]);
        x_sums.quarter[q] = vreinterpretq_s32_s64(vzip1q_s64(a, b));
        y_sums.quarter[q] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
    }
}
constexpr bool kRowPairs = true;
#define EDGEVL_ROW_PAIRS
#endif
static inline V load_zeros(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}
#else
struct Fours {
    uint8_t low[64], high[64];
};
struct Sums {
    int32_t lane[kLanes];
};
static inline Sums no_sums() { return {}; }
static inline Fours load_fours(const uint8_t* p) {
    Fours out;
    for (int i = 0; i < 64; ++i) {
        out.low[i] = p[i] & 15;
        out.high[i] = p[i] >> 4;
    }
    return out;
}
static inline Sums dot4(Sums sums, const uint8_t* codes, const int8_t* x) {
    for (int i = 0; i < kLanes; ++i) {
        int32_t total = 0;
        for (int j = 0; j < 4; ++j) total += int32_t(codes[4 * i + j]) * x[j];
        sums.lane[i] += total;
    }
    return sums;
}
struct Bytes {
    int8_t code[64];
};
static inline Sums first_sums(int32_t) { return no_sums(); }
static inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.code, p, 64);
    return out;
}
static inline Sums dot_bytes(Sums sums, const Bytes& codes, const int8_t* x) {
    for (int i = 0; i < kLanes; ++i) {
        int32_t total = 0;
        for (int j = 0; j < 4; ++j) total += int32_t(codes.code[4 * i + j]) * x[j];
        sums.lane[i] += total;
    }
    return sums;
}
static inline V as_float(const Sums& sums, int part) {
    const int32_t* s = sums.lane + part * W;
    return V{float(s[0]), float(s[1]), float(s[2]), float(s[3])};
}
static inline V load_zeros(const uint8_t* p) { return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
#endif

#if !defined(EDGEVL_ROW_PAIRS)
constexpr bool kRowPairs = false;  // whether two rows of activations are multiplied at once
#endif

// -- panels
// ----------------------------------------------------------------------------------------------------------------

// Eight in-features of a panel: 64 bytes of int4 codes, or 128 of int8.
template <Kind kind>
struct Eight;
template <>
struct Eight<Kind::int4> {
    static constexpr int64_t bytes = 64;
    Fours codes;
    static Eight load(const uint8_t* p) { return {load_fours(p)}; }
    Sums low(Sums sums, const int8_t* x) const { return dot4(sums, codes.low, x); }
    Sums high(Sums sums, const int8_t* x) const { return dot4(sums, codes.high, x); }
#if defined(EDGEVL_ROW_PAIRS)
    void pair(Sums& x_sums, Sums& y_sums, const int8_t* x, const int8_t* y) const {
        dot_rows(x_sums, y_sums, codes.low, codes.high, x, y);
    }
#endif
};
template <>
struct Eight<Kind::int8> {
    static constexpr int64_t bytes = 128;
    Bytes first, second;
    static Eight load(const uint8_t* p) { return {load_bytes(p), load_bytes(p + 64)}; }
    Sums low(Sums sums, const int8_t* x) const { return dot_bytes(sums, first, x); }
    Sums high(Sums sums, const int8_t* x) const { return dot_bytes(sums, second, x); }
#if defined(EDGEVL_ROW_PAIRS)
    void pair(Sums& x_sums, Sums& y_sums, const int8_t* x, const int8_t* y) const {
        dot_rows(x_sums, y_sums, first, second, x, y);
    }
#endif
};

// P panels from `first` on times the first T of S coded rows side by side: y (T, 16·P), rows `stride` apart.
template <Kind kind, int T, int S, int P>
static inline void multiply_panels(const Weight& w, int64_t first, const CodedRows& x, float* y,
                                   int64_t stride) {
    constexpr int64_t bytes = Eight<kind>::bytes;
    const int64_t codes_bytes = w.groups * w.group / 8 * bytes, group_bytes = w.group / 8 * bytes;
    const uint8_t* codes = static_cast<const uint8_t*>(w.values) + first * codes_bytes;
    const int8_t* line = x.codes;
    constexpr bool fetch = W < 16 || S != kPanelTile;  // else panels pass several times, from a cache
    constexpr int C = T * P < 4 ? 2 : 1;  // sums of a value, so that none waits for the one before
    constexpr int kPaired = kRowPairs ? T / 2 * 2 : 0;
    V acc[P][T][kParts];
    EDGEVL_UNROLL
    for (int t = 0; t < T; ++t) {
        EDGEVL_UNROLL
        for (int p = 0; p < P; ++p) {
            EDGEVL_UNROLL
            for (int i = 0; i < kParts; ++i) acc[p][t][i] = splat(0.0f);
        }
    }
    for (int64_t g = 0; g < w.groups; ++g) {
        Sums sums[C][P][T];
        EDGEVL_UNROLL
        for (int t = 0; t < T; ++t) {
            EDGEVL_UNROLL
            for (int p = 0; p < P; ++p) {
                sums[C - 1][p][t] = no_sums();
                sums[0][p][t] = kind == Kind::int8 ? first_sums(x.whole[g * S + t]) : no_sums();
            }
        }
        // what is fetched ahead of the end of a panel is the beginning of the one P further on
        const bool ends = (g + 1) * group_bytes + kAhead > codes_bytes;
        const int64_t ahead = ends ? kAhead + (P - 1) * codes_bytes : kAhead;
        for (int64_t block = 0; block < w.group; block += kCodes, line += kCodes * (S - 1)) {
            for (int64_t j = 0; j < kCodes; j += 8, codes += bytes, line += 8) {
                Eight<kind> eight[P];
                EDGEVL_UNROLL
                for (int p = 0; p < P; ++p) {
                    const uint8_t* from = codes + p * codes_bytes;
                    if (fetch) {
                        EDGEVL_UNROLL
                        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + ahead + b);
                    }
                    eight[p] = Eight<kind>::load(from);
                }
                if constexpr (kRowPairs) {
                    EDGEVL_UNROLL
                    for (int t = 0; t < kPaired; t += 2) {
                        EDGEVL_UNROLL
                        for (int p = 0; p < P; ++p) {
                            eight[p].pair(sums[0][p][t], sums[0][p][t + 1], line + t * kCodes,
                                          line + (t + 1) * kCodes);
                        }
                    }
                }
                EDGEVL_UNROLL
                for (int t = kPaired; t < T; ++t) {
                    EDGEVL_UNROLL
                    for (int p = 0; p < P; ++p) {
                        sums[0][p][t] = eight[p].low(sums[0][p][t], line + t * kCodes);
                        sums[C - 1][p][t] = eight[p].high(sums[C - 1][p][t], line + t * kCodes + 4);
                    }
                }
            }
        }
        if constexpr (kRowPairs) {
            EDGEVL_UNROLL
            for (int t = 0; t < kPaired; t += 2) {
                EDGEVL_UNROLL
                for (int p = 0; p < P; ++p) part_rows(sums[0][p][t], sums[0][p][t + 1]);
            }
        }
        EDGEVL_UNROLL
        for (int p = 0; p < P; ++p) {
            EDGEVL_UNROLL
            for (int i = 0; i < kParts; ++i) {
                V scale = splat(1.0f), shift = splat(0.0f);
                if constexpr (kind == Kind::int4) {
                    const int64_t at = ((first + p) * w.groups + g) * kLanes + i * W;
                    scale = load_half(static_cast<const uint16_t*>(w.scales) + at);
                    shift = scale * load_zeros(w.zeros + at);
                    if (fetch) {
                        const int64_t next = at + P * w.groups * kLanes;
                        __builtin_prefetch(static_cast<const uint16_t*>(w.scales) + next);
                        __builtin_prefetch(w.zeros + next);
                    }
                }
                EDGEVL_UNROLL
                for (int t = 0; t < T; ++t) {
                    V whole = as_float(sums[0][p][t], i);
                    if (C > 1) whole = whole + as_float(sums[C - 1][p][t], i);  // both exact, so rounded once
                    whole = whole * splat(x.scales[g * S + t]);
                    if constexpr (kind == Kind::int4) {
                        acc[p][t][i] = fma(scale, whole, acc[p][t][i]) - shift * splat(x.sums[g * S + t]);
                    } else {
                        acc[p][t][i] = acc[p][t][i] + whole;
                    }
                }
            }
        }
    }
    EDGEVL_UNROLL
    for (int p = 0; p < P; ++p) {
        EDGEVL_UNROLL
        for (int i = 0; i < kParts; ++i) {
            V scale = splat(1.0f);
            if constexpr (kind == Kind::int8)
                scale = load(static_cast<const float*>(w.scales) + (first + p) * kLanes + i * W);
            EDGEVL_UNROLL
            for (int t = 0; t < T; ++t) store(y + t * stride + p * kLanes + i * W, acc[p][t][i] * scale);
        }
    }
}

// Panels that are worked on together. Few rows wait for memory, which is quickest read in one piece; many,
// and those left over behind them, want as many sums as there are registers.
constexpr int panels_abreast(int rows) { return W == 16 && rows > 8 ? 2 : 1; }

// Panels [first, last) times the first T of S coded rows side by side: into y (T, N), the last panel cut off
// at N.
template <Kind kind, int T, int S>
static inline void multiply_rows(const Weight& w, int64_t first, int64_t last, const CodedRows& x, float* y) {
    constexpr int P = panels_abreast(S);
    int64_t p = first;
    const int64_t whole = smaller(last, w.n / kLanes);
    for (; p + P <= whole; p += P) multiply_panels<kind, T, S, P>(w, p, x, y + p * kLanes, w.n);
    for (; p < whole; ++p) multiply_panels<kind, T, S, 1>(w, p, x, y + p * kLanes, w.n);
    for (; p < last; ++p) {
        float ragged[T * kLanes];
        multiply_panels<kind, T, S, 1>(w, p, x, ragged, kLanes);
        for (int t = 0; t < T; ++t) {
            for (int64_t n = p * kLanes; n < w.n; ++n) y[t * w.n + n] = ragged[t * kLanes + n - p * kLanes];
        }
    }
}

// `count` < T rows side by side by themselves (S = 0), or behind whole tiles.
template <Kind kind, int T, int S>
static inline void multiply_tail(int64_t count, const Weight& w, int64_t first, int64_t last,
                                 const CodedRows& x, float* y) {
    if (count == T) return multiply_rows<kind, T, S == 0 ? T : S>(w, first, last, x, y);
    if constexpr (T > 1) multiply_tail<kind, T - 1, S>(count, w, first, last, x, y);
}

// Panels [first, last) times any number of coded rows; done(begin, end) is called behind each tile of them.
template <Kind kind, class Done>
static inline void multiply_coded(const Weight& w, int64_t first, int64_t last, const Activations& x,
                                  int64_t count, float* out, const Done& done) {
    constexpr int S = kPanelTile;
    int64_t row = 0;
    for (; row + S <= count; row += S) {
        multiply_rows<kind, S, S>(w, first, last, coded_rows(x, row, S), out + row * w.n);
        done(row, row + S);
    }
    if (row == count) return;
    if (row == 0) {
        multiply_tail<kind, S - 1, 0>(count, w, first, last, coded_rows(x, 0, count), out);
    } else {
        multiply_tail<kind, S - 1, S>(count - row, w, first, last, coded_rows(x, row, S), out + row * w.n);
    }
    done(row, count);
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
