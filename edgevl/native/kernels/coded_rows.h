// Activations in int8: how rows are rounded, and where an op that may round its output leaves them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {

constexpr int kPanelTile = W == 16 ? 12 : W == 8 ? 3 : 4;  // rows of a register tile of panels.h

constexpr int64_t kCodes = 32;  // codes of a row that lie together; a group is whole ones

// Rows that lie side by side in a step of `rows`: a register tile, or all where they are fewer.
static inline int64_t side_of(int64_t rows) { return smaller(rows, kPanelTile); }

// Rows of activations in int8, `side` of them side by side, so that one address will do for all of them:
// codes (K'/32, side, 32), then for each group and row its scale, the sum of its codes, and that sum times
// the scale, which the zeros of the weights are multiplied with: (groups, side) each.
struct CodedRows {
    int8_t* codes;
    float *scales, *sums;
    int32_t* whole;
};

static inline CodedRows coded_rows(const Activations& x, int64_t first, int64_t side) {
    uint8_t* p = x.data + first * coded_row_bytes(x);
    float* scales = reinterpret_cast<float*>(p + x.groups * x.group * side);
    return {reinterpret_cast<int8_t*>(p), scales, scales + x.groups * side,
            reinterpret_cast<int32_t*>(scales + 2 * x.groups * side)};
}

static inline void store_codes(int8_t* p, V v) {
#if EDGEVL_LEVEL == 2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
#elif EDGEVL_LEVEL == 1
    const __m256i x = _mm256_cvtps_epi32(v);
    const __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(y, y));
#elif defined(EDGEVL_NEON)
    const int16x4_t halves = vmovn_s32(vcvtq_s32_f32(v));
    vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))),
                  0);
#else
    for (int i = 0; i < W; ++i) p[i] = int8_t(v[i]);
#endif
}

// One group of a row: codes -127..127 to the nearest of its own scale, max|x| / 127. at(i) gives columns i to
// i + W of it.
template <class At>
static inline void round_group(const CodedRows& out, int64_t group, int64_t side, int8_t* codes,
                               int64_t place, const At& at) {
    V most = splat(0.0f), total = splat(0.0f);
    for (int64_t i = 0; i < group; i += W) most = vmax(most, vabs(at(i)));
    const float top = highest(most), inverse = top > 0.0f ? 127.0f / top : 0.0f;
    for (int64_t i = 0; i < group; i += kCodes, codes += kCodes * side) {
        EDGEVL_UNROLL
        for (int64_t j = 0; j < kCodes; j += W) {
            const V code = vround(at(i + j) * splat(inverse));
            store_codes(codes + j, code);
            total = total + code;  // whole numbers, exact
        }
    }
    out.whole[place] = int32_t(sum(total));
    out.scales[place] = top / 127.0f;
    out.sums[place] = out.scales[place] * float(out.whole[place]);
}

// Rounds `count` columns of row `row` of `rows`, from `column` on: whole groups, but that the last one may be
// short of columns; its other codes are zero.
static inline void round_columns(const Activations& out, int64_t rows, int64_t row, int64_t column,
                                 int64_t count, const float* x) {
    const int64_t side = side_of(rows), line = row % side;
    const CodedRows to = coded_rows(out, row - line, side);
    for (int64_t g = column / out.group; count > 0; ++g, x += out.group, count -= out.group) {
        int8_t* codes = to.codes + g * out.group * side + line * kCodes;
        const auto some = [&](int64_t i) {
            return i + W <= count ? load(x + i) : i < count ? load_part(x + i, count - i) : splat(0.0f);
        };
        if (count >= out.group) {
            round_group(to, out.group, side, codes, g * side + line, [&](int64_t i) { return load(x + i); });
        } else {
            round_group(to, out.group, side, codes, g * side + line, some);
        }
    }
}

// Has write(p) leave `count` columns of a row, from `column` on, at p: in their place, or in `room` to be
// rounded from there; columns that are rounded are whole groups.
template <class Write>
static inline void put(const Activations& out, int64_t rows, int64_t row, int64_t column, int64_t count,
                       float* room, const Write& write) {
    if (out.group == 0) return write(reinterpret_cast<float*>(out.data) + row * out.width + column);
    write(room);
    round_columns(out, rows, row, column, count, room);
}

// `run` of an op that treats rows alike: one_row(args, row, p) leaves a row at p.
template <class Args, void (*one_row)(const Args&, int64_t, float*)>
static void put_rows(const Args& a, const Step& step, int, int64_t item, float* scratch) {
    const int64_t rows = rows_of(a.rows, step.counts);
    run_item(a.rows, step, item, [&](int64_t row) {
        put(a.out, rows, row, 0, a.out.width, scratch, [&](float* out) { one_row(a, row, out); });
    });
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
