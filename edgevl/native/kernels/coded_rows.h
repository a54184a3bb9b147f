// Activations in int8: how rows are rounded, and where an op that may round its output leaves them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {

constexpr int kPanelTile = W == 16 ? 12 : W == 8 ? 3 : 4;  // rows of a register tile of panels.h

// Rows that lie side by side in a step of `rows`: a register tile, or all where they are fewer.
static inline int64_t side_of(int64_t rows) { return smaller(rows, kPanelTile); }

// Rows of activations in int8, `side` of them side by side, so that four in-features of all rows are
// neighbours: codes (K'/4, side, 4), then for each group and row its scale, the sum of its codes, and that
// sum times the scale, which the zeros of the weights are multiplied with: (groups, side) each.
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

// W codes, each four of them `stride` behind the four before.
static inline void store_codes(int8_t* p, int64_t stride, V v) {
    int8_t codes[W];
#if EDGEVL_LEVEL == 2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
#elif EDGEVL_LEVEL == 1
    const __m256i x = _mm256_cvtps_epi32(v);
    const __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packs_epi16(y, y));
#elif defined(EDGEVL_NEON)
    const int16x4_t halves = vmovn_s32(vcvtq_s32_f32(v));
    vst1_lane_s32(reinterpret_cast<int32_t*>(codes),
                  vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
#else
    for (int i = 0; i < W; ++i) codes[i] = int8_t(v[i]);
#endif
    for (int64_t j = 0; j < W; j += 4) std::memcpy(p + j / 4 * stride, codes + j, 4);
}

// `count` columns of row `row` of `rows`, from `column` on, whole groups of them: codes -127..127 to the
// nearest of each group's own scale, max|x| / 127. The last group may be short of columns; its other codes
// are zero.
static inline void round_columns(const Activations& out, int64_t rows, int64_t row, int64_t column,
                                 int64_t count, const float* x) {
    const int64_t side = side_of(rows), at = row % side;
    const CodedRows to = coded_rows(out, row - at, side);
    for (int64_t g = column / out.group; count > 0; ++g, x += out.group, count -= out.group) {
        const int64_t here = smaller(out.group, count), full = here / W * W;
        const V rest = full < here ? load_part(x + full, here - full) : splat(0.0f);
        V most = vabs(rest);
        for (int64_t i = 0; i < full; i += W) most = vmax(most, vabs(load(x + i)));
        const float top = highest(most), inverse = top > 0.0f ? 127.0f / top : 0.0f;
        V total = splat(0.0f);
        int8_t* codes = to.codes + g * out.group * side + 4 * at;
        for (int64_t i = 0; i < out.group; i += W, codes += W * side) {
            const V value = i < full ? load(x + i) : i < here ? rest : splat(0.0f);
            const V code = vround(value * splat(inverse));
            store_codes(codes, 4 * side, code);
            total = total + code;  // whole numbers, exact
        }
        const int64_t place = g * side + at;
        to.whole[place] = int32_t(sum(total));
        to.scales[place] = top / 127.0f;
        to.sums[place] = to.scales[place] * float(to.whole[place]);
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
