// linear: activation(x · Wᵀ + bias) + residual, for weights of every kind.
//
// Few rows: each weight row is read once, dequantized in registers and multiplied with all rows of x.
// Many rows: a panel of 32 weight rows is dequantized, 256 in-features at a time and transposed, into the
// thread's scratch, and multiplied by register tiles. The sums do not depend on how the items are shared out.
#include "kernels.h"
#include "tile.h"
#include "weight.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

// -- the end of each output row
// ---------------------------------------------------------------------------------------

V finish(V y, V bias, V residual, bool gelu) {
    y = y + bias;
    if (gelu) y = splat(0.5f) * y * (splat(1.0f) + verf(y * splat(0.70710678f)));
    return y + residual;
}

void finish_row(const Linear& a, int64_t row, int64_t begin, int64_t end) {
    if (!a.weight.bias && !a.gelu && !a.residual) return;
    const V zero = splat(0.0f);
    float* y = a.out + row * a.weight.n;
    const float* bias = a.weight.bias;
    const float* residual = a.residual ? a.residual + row * a.weight.n : nullptr;
    int64_t n = begin;
    for (; n + W <= end; n += W) {
        store(y + n, finish(load(y + n), bias ? load(bias + n) : zero, residual ? load(residual + n) : zero,
                            a.gelu));
    }
    if (const int64_t rest = end - n) {
        const V b = bias ? load_part(bias + n, rest) : zero,
                r = residual ? load_part(residual + n, rest) : zero;
        store_part(y + n, finish(load_part(y + n, rest), b, r, a.gelu), rest);
    }
}

// -- few rows
// ---------------------------------------------------------------------------------------------------------

constexpr int64_t kFetchBytes = 4096;

// How far ahead of a load to fetch, in bytes. R rows are read side by side, so what comes next lies whole
// sets of R rows further on; rows so long that the next set is out of reach are left to their own
// continuation.
int64_t fetch_distance(int64_t row_bytes, int64_t rows) {
    const int64_t set = row_bytes * rows;
    return set >= kFetchBytes ? kFetchBytes / rows : set * blocks(kFetchBytes, set);
}

// R weight rows from n on, times T rows of x. For int4, x has been dealt out by `deal`.
template <Kind kind, int T, int R>
void dot_rows(const Weight& w, const float* x, int64_t n, float* out) {
    V acc[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = splat(0.0f);
    }
    int64_t k = 0;
    if constexpr (kind == Kind::int4) {
        const uint8_t* codes = static_cast<const uint8_t*>(w.values) + n * (w.k / 2);
        const int64_t ahead = fetch_distance(w.k / 2, R);
        for (int64_t g = 0; k < w.k; ++g) {
            Group group[R];
            EDGEVL_UNROLL
            for (int r = 0; r < R; ++r) group[r] = int4_group(w, n + r, g);
            for (const int64_t end = k + w.group; k < end; k += 2 * W) {
                EDGEVL_UNROLL
                for (int r = 0; r < R; ++r) {
                    V even, odd;
                    const uint8_t* p = codes + r * (w.k / 2) + k / 2;
                    __builtin_prefetch(p + ahead);
                    load_int4(p, group[r], even, odd);
                    EDGEVL_UNROLL
                    for (int t = 0; t < T; ++t) {
                        acc[r][t] = fma(even, load(x + t * w.k + k), acc[r][t]);
                        acc[r][t] = fma(odd, load(x + t * w.k + k + W), acc[r][t]);
                    }
                }
            }
        }
    } else {
        const int64_t item = kind == Kind::f32 ? 4 : kind == Kind::f16 ? 2 : 1;
        const int64_t ahead = fetch_distance(w.k * item, R);
        const uint8_t* row = static_cast<const uint8_t*>(w.values) + n * w.k * item;
        for (; k + W <= w.k; k += W) {
            EDGEVL_UNROLL
            for (int r = 0; r < R; ++r) {
                V v;
                const uint8_t* p = row + (r * w.k + k) * item;
                __builtin_prefetch(p + ahead);
                if constexpr (kind == Kind::f32) v = load(reinterpret_cast<const float*>(p));
                if constexpr (kind == Kind::f16) v = load_half(reinterpret_cast<const uint16_t*>(p));
                if constexpr (kind == Kind::int8) v = load_int8(reinterpret_cast<const int8_t*>(p));
                EDGEVL_UNROLL
                for (int t = 0; t < T; ++t) acc[r][t] = fma(v, load(x + t * w.k + k), acc[r][t]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            float y = sum(acc[r][t]);
            if constexpr (kind == Kind::int8) y *= static_cast<const float*>(w.scales)[n + r];
            for (int64_t i = k; i < w.k; ++i) y += weight_at(w, n + r, i) * x[t * w.k + i];
            out[t * w.n + n + r] = y;
        }
    }
}

template <Kind kind, int T>
void dot_range(const Weight& w, const float* x, int64_t begin, int64_t end, float* out) {
    constexpr int R = T <= 2 ? 4 : 2;
    int64_t n = begin;
    for (; n + R <= end; n += R) dot_rows<kind, T, R>(w, x, n, out);
    for (; n < end; ++n) dot_rows<kind, T, 1>(w, x, n, out);
}

template <Kind kind>
void dot(const Weight& w, int64_t rows, const float* x, int64_t begin, int64_t end, float* out) {
    static_assert(kGemvRows == 7, "one case for each number of rows");
    switch (rows) {
        case 1:
            return dot_range<kind, 1>(w, x, begin, end, out);
        case 2:
            return dot_range<kind, 2>(w, x, begin, end, out);
        case 3:
            return dot_range<kind, 3>(w, x, begin, end, out);
        case 4:
            return dot_range<kind, 4>(w, x, begin, end, out);
        case 5:
            return dot_range<kind, 5>(w, x, begin, end, out);
        case 6:
            return dot_range<kind, 6>(w, x, begin, end, out);
        default:
            return dot_range<kind, 7>(w, x, begin, end, out);
    }
}

// Deals x out the way int4 codes unpack: of each 2W in-features the even ones first, then the odd ones.
void deal(const float* x, int64_t count, float* out) {
    for (int64_t k = 0; k < count; k += 2 * W) {
        for (int j = 0; j < W; ++j) {
            out[k + j] = x[k + 2 * j];
            out[k + W + j] = x[k + 2 * j + 1];
        }
    }
}

void run_few(const Linear& a, int64_t rows, int64_t begin, int64_t end, float* scratch) {
    const Weight& w = a.weight;
    if (w.kind == Kind::f32) {
        dot<Kind::f32>(w, rows, a.x, begin, end, a.out);
    } else if (w.kind == Kind::f16) {
        dot<Kind::f16>(w, rows, a.x, begin, end, a.out);
    } else if (w.kind == Kind::int8) {
        dot<Kind::int8>(w, rows, a.x, begin, end, a.out);
    } else if (w.group % (2 * W) == 0) {
        deal(a.x, rows * w.k, scratch);
        dot<Kind::int4>(w, rows, scratch, begin, end, a.out);
    } else {
        for (int64_t t = 0; t < rows; ++t) {
            for (int64_t n = begin; n < end; ++n) {
                float y = 0.0f;
                for (int64_t k = 0; k < w.k; ++k) y += weight_at(w, n, k) * a.x[t * w.k + k];
                a.out[t * w.n + n] = y;
            }
        }
    }
    for (int64_t t = 0; t < rows; ++t) finish_row(a, t, begin, end);
}

// -- many rows
// --------------------------------------------------------------------------------------------------------

// W weight rows from n on, in-features k0..k0+depth, to columns of panel (depth, 32); rows past the end are
// zero.
void pack_columns(const Weight& w, int64_t n, int64_t k0, int64_t depth, float* panel) {
    const int64_t valid = larger(0, smaller(W, w.n - n));
    int64_t k = 0;
    V even[W], odd[W];
    if (w.kind != Kind::int4) {
        for (; k + W <= depth; k += W) {
            for (int r = 0; r < W; ++r) even[r] = r < valid ? weight_vector(w, n + r, k0 + k) : splat(0.0f);
            transpose(even);
            for (int j = 0; j < W; ++j) store(panel + (k + j) * kPanelWidth, even[j]);
        }
    } else if (w.group % (2 * W) == 0) {
        const uint8_t* codes = static_cast<const uint8_t*>(w.values) + (n * w.k + k0) / 2;
        while (valid > 0 && k < depth) {
            const int64_t g = (k0 + k) / w.group, end = smaller(depth, (g + 1) * w.group - k0);
            Group groups[W];
            for (int r = 0; r < W; ++r)
                groups[r] = r < valid ? int4_group(w, n + r, g) : make_group(0.0f, 0.0f);
            for (; k < end; k += 2 * W) {
                EDGEVL_UNROLL
                for (int r = 0; r < W; ++r) {
                    const int64_t row = r < valid ? r : 0;  // rows past the end read the first, times zero
                    load_int4(codes + (row * w.k + k) / 2, groups[r], even[r], odd[r]);
                }
                transpose(even);
                transpose(odd);
                EDGEVL_UNROLL
                for (int j = 0; j < W; ++j) {
                    store(panel + (k + 2 * j) * kPanelWidth, even[j]);
                    store(panel + (k + 2 * j + 1) * kPanelWidth, odd[j]);
                }
            }
        }
    }
    for (; k < depth; ++k) {
        for (int r = 0; r < W; ++r)
            panel[k * kPanelWidth + r] = r < valid ? weight_at(w, n + r, k0 + k) : 0.0f;
    }
}

void run_many(const Linear& a, int64_t first, int64_t last, int64_t n0, float* scratch) {
    const Weight& w = a.weight;
    const int64_t width = smaller(kPanelWidth, w.n - n0);
    float* panel = scratch;
    float* ragged = scratch + kPanelDepth * kPanelWidth;  // (kTile, kTileWidth)
    for (int64_t k0 = 0; k0 < w.k; k0 += kPanelDepth) {
        const int64_t depth = smaller(kPanelDepth, w.k - k0);
        for (int64_t c = 0; c < width; c += W) pack_columns(w, n0 + c, k0, depth, panel + c);
        // a tile is two vectors wide, so an odd last vector needs a neighbour
        if (blocks(width, W) % 2)
            pack_columns(w, n0 + blocks(width, W) * W, k0, depth, panel + blocks(width, W) * W);
        for (int64_t c = 0; c < width; c += kTileWidth) {
            const float* x = a.x + first * w.k + k0;
            float* y = a.out + first * w.n + n0 + c;
            const int64_t inside = smaller(kTileWidth, width - c);
            if (inside == kTileWidth) {
                multiply(last - first, x, w.k, panel + c, kPanelWidth, y, w.n, depth, k0 > 0);
                continue;
            }
            for (int64_t t = first; t < last; t += kTile, x += kTile * w.k, y += kTile * w.n) {
                const int64_t rows = smaller(kTile, last - t);
                multiply(rows, x, w.k, panel + c, kPanelWidth, ragged, kTileWidth, depth, false);
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t j = 0; j < inside; ++j) {
                        const float before = k0 > 0 ? y[r * w.n + j] : 0.0f;
                        y[r * w.n + j] = before + ragged[r * kTileWidth + j];
                    }
                }
            }
        }
    }
    for (int64_t t = first; t < last; ++t) finish_row(a, t, n0, n0 + width);
}

// -- sharing out
// ------------------------------------------------------------------------------------------------------

// Weight rows of one item when rows are few: about four items a thread, so that a slow thread takes fewer.
int64_t few_grain(const Linear& a, const Step& step) {
    return larger(16, blocks(blocks(a.weight.n, 4 * int64_t(step.threads)), 4) * 4);
}

// Rows of x of one item when rows are many: all of them, unless there are too few panels to go round.
int64_t many_grain(const Linear& a, const Step& step, int64_t rows) {
    const int64_t panels = blocks(a.weight.n, kPanelWidth);
    return panels >= 4 * int64_t(step.threads) ? rows : 8 * kTileRows;
}

int64_t items(const Linear& a, const Step& step, int) {
    const int64_t rows = rows_of(a.rows, step.counts);
    if (rows == 0) return 0;
    if (rows <= kGemvRows) return blocks(a.weight.n, few_grain(a, step));
    return blocks(a.weight.n, kPanelWidth) * blocks(rows, many_grain(a, step, rows));
}

void run(const Linear& a, const Step& step, int, int64_t item, float* scratch) {
    const int64_t rows = rows_of(a.rows, step.counts);
    if (rows <= kGemvRows) {
        const int64_t grain = few_grain(a, step);
        return run_few(a, rows, item * grain, smaller(a.weight.n, (item + 1) * grain), scratch);
    }
    const int64_t grain = many_grain(a, step, rows), cuts = blocks(rows, grain);
    const int64_t first = item % cuts * grain;
    run_many(a, first, smaller(rows, first + grain), item / cuts * kPanelWidth, scratch);
}

}  // namespace

const Kernel<Linear> linear_kernel = {1, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
