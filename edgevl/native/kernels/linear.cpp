// linear: activation(x · Wᵀ + bias) + residual, for weights of every kind.
//
// int8 and int4: x comes in int8 or is rounded to it first, by each item for itself when rows are few, in a
// phase of its own when they are many; then panels of 16 out-features are multiplied in whole numbers
// (panels.h). The other kinds,
// few rows: each weight row is read once, converted in registers and multiplied with all rows of x. Many
// rows: a panel of 32 weight rows is converted, 256 in-features at a time and transposed, into the thread's
// scratch, and multiplied by register tiles. The sums do not depend on how the items are shared out.
#include "panels.h"
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
constexpr int64_t kPanelBytes = 256 << 10;  // of int4 codes that all rows of x pass by together

// How far ahead of a load to fetch, in bytes. R rows are read side by side, so what comes next lies whole
// sets of R rows further on; rows so long that the next set is out of reach are left to their own
// continuation.
int64_t fetch_distance(int64_t row_bytes, int64_t rows) {
    const int64_t set = row_bytes * rows;
    return set >= kFetchBytes ? kFetchBytes / rows : set * blocks(kFetchBytes, set);
}

// R weight rows from n on, times T rows of x.
template <Kind kind, int T, int R>
void dot_rows(const Weight& w, const float* x, int64_t n, float* out) {
    V acc[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = splat(0.0f);
    }
    int64_t k = 0;
    const int64_t item = kind == Kind::f32 ? 4 : 2;
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
            EDGEVL_UNROLL
            for (int t = 0; t < T; ++t) acc[r][t] = fma(v, load(x + t * w.k + k), acc[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            float y = sum(acc[r][t]);
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

void run_few(const Linear& a, int64_t rows, int64_t begin, int64_t end) {
    const Weight& w = a.weight;
    if (w.kind == Kind::f32) {
        dot<Kind::f32>(w, rows, a.x, begin, end, a.out);
    } else {
        dot<Kind::f16>(w, rows, a.x, begin, end, a.out);
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
    V columns[W];
    for (; k + W <= depth; k += W) {
        for (int r = 0; r < W; ++r) columns[r] = r < valid ? weight_vector(w, n + r, k0 + k) : splat(0.0f);
        transpose(columns);
        for (int j = 0; j < W; ++j) store(panel + (k + j) * kPanelWidth, columns[j]);
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

bool in_panels(const Weight& w) { return w.kind == Kind::int4 || w.kind == Kind::int8; }

// Out-features of one item of a weight in panels: whole ones, about four items a thread, and no more than
// what stays in a core's cache while all rows of x pass.
int64_t panel_grain(const Linear& a, const Step& step, int64_t rows) {
    const int64_t panels = blocks(a.weight.n, kPanelRows);
    // where panels pass once, larger items: up to kGemvRows, each rounds the rows for itself
    if (rows <= kPanelTile) return blocks(panels, step.threads == 1 ? 1 : 2 * int64_t(step.threads));
    const int64_t cached =
        blocks(kPanelBytes, a.weight.k * kPanelRows / (a.weight.kind == Kind::int4 ? 2 : 1));
    const int64_t abreast = panels_abreast(kPanelTile);
    return blocks(smaller(cached, blocks(panels, 4 * int64_t(step.threads))), abreast) * abreast;
}

int64_t items(const Linear& a, const Step& step, int phase) {
    const int64_t rows = rows_of(a.rows, step.counts);
    if (rows == 0) return 0;
    if (phase == 0) {  // rounding of x
        return in_panels(a.weight) && a.x && rows > kGemvRows ? row_items(a, step, phase) : 0;
    }
    if (in_panels(a.weight)) return blocks(blocks(a.weight.n, kPanelRows), panel_grain(a, step, rows));
    if (rows <= kGemvRows) return blocks(a.weight.n, few_grain(a, step));
    return blocks(a.weight.n, kPanelWidth) * blocks(rows, many_grain(a, step, rows));
}

void run_panels(const Linear& a, const Step& step, int64_t rows, int64_t item, float* scratch) {
    const Weight& w = a.weight;
    Activations x = a.coded;
    if (a.x && rows <= kGemvRows) {
        x.data = reinterpret_cast<uint8_t*>(scratch);
        for (int64_t t = 0; t < rows; ++t) round_columns(x, rows, t, 0, w.k, a.x + t * w.k);
    }
    const int64_t grain = panel_grain(a, step, rows), first = item * grain;
    const int64_t last = smaller(first + grain, blocks(w.n, kPanelRows));
    const auto finish_rows = [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            finish_row(a, t, first * kPanelRows, smaller(last * kPanelRows, w.n));
    };
    if (w.kind == Kind::int4) {
        multiply_coded<Kind::int4>(w, first, last, x, rows, a.out, finish_rows);
    } else {
        multiply_coded<Kind::int8>(w, first, last, x, rows, a.out, finish_rows);
    }
}

void run(const Linear& a, const Step& step, int phase, int64_t item, float* scratch) {
    const int64_t rows = rows_of(a.rows, step.counts);
    const Weight& w = a.weight;
    if (phase == 0) {
        return run_item(a.rows, step, item,
                        [&](int64_t row) { round_columns(a.coded, rows, row, 0, w.k, a.x + row * w.k); });
    }
    if (in_panels(w)) return run_panels(a, step, rows, item, scratch);
    if (rows <= kGemvRows) {
        const int64_t grain = few_grain(a, step);
        return run_few(a, rows, item * grain, smaller(w.n, (item + 1) * grain));
    }
    const int64_t grain = many_grain(a, step, rows), cuts = blocks(rows, grain);
    const int64_t first = item % cuts * grain;
    run_many(a, first, smaller(rows, first + grain), item / cuts * kPanelWidth, scratch);
}

}  // namespace

const Kernel<Linear> linear_kernel = {2, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
