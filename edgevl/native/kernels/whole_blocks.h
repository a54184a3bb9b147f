// Attention of many query rows in whole numbers: queries, keys and values are rounded to int16, weights to 13
// bits, and products of a block are summed in int32. What is rounded has a scale for each query, each key,
// and each column of a block of values, so that nothing is off by more than f16 would be.
//
// In the scratch of a Flash: q holds int16 (rows, padded); keys hold pairs of two in-features, (D/2, kKeys,
// 2), and then their scales; values hold pairs of two keys, (kKeys/2, padded, 2), and then theirs; a row of
// scores becomes int16 weights where it lies.
#pragma once

#include "flash.h"
#include "shorts.h"

namespace edgevl {
namespace EDGEVL_ISA {

constexpr float kMostWeight = 8192.0f,
                kMostValue = 4095.0f;  // their products, kKeys of them, stay below 2^31

static inline int64_t pairs_of(const Flash& f) { return (f.size + 1) / 2; }
static inline int16_t* whole_keys(const Flash& f) { return reinterpret_cast<int16_t*>(f.keys); }
static inline float* whole_key_scales(const Flash& f) { return f.keys + f.padded / 2 * kKeys; }
static inline int16_t* whole_values(const Flash& f) { return reinterpret_cast<int16_t*>(f.values); }
static inline float* whole_value_scales(const Flash& f) { return f.values + kKeys / 2 * f.padded; }
static inline int16_t* whole_weights(const Flash& f) { return reinterpret_cast<int16_t*>(f.scores); }

// The largest code of queries and keys: D products of two stay below 2^31.
static inline float most_code(int64_t size) {
    const float most = 46340.0f / __builtin_sqrtf(float(size));
    return most < 32767.0f ? float(int32_t(most)) : 32767.0f;
}

// The largest |at(i)| of `count`, lane by lane and above zero; in four, so that none waits for the one
// before.
template <class At>
static inline V most_of(int64_t count, At at) {
    V most[4] = {splat(1e-30f), splat(1e-30f), splat(1e-30f), splat(1e-30f)};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        EDGEVL_UNROLL
        for (int j = 0; j < 4; ++j) most[j] = vmax(most[j], vabs(at(i + j)));
    }
    for (; i < count; ++i) most[0] = vmax(most[0], vabs(at(i)));
    return vmax(vmax(most[0], most[1]), vmax(most[2], most[3]));
}

static inline void round_query(const Flash& f, int64_t row, const float* q) {
    int16_t* out = reinterpret_cast<int16_t*>(f.q) + row * f.padded;
    float padded[2 * W];
    V most = splat(0.0f);
    int64_t d = 0;
    for (; d + W <= f.size; d += W) most = vmax(most, vabs(load(q + d)));
    const int64_t rest = f.size - d;
    if (rest) most = vmax(most, vabs(load_part(q + d, rest)));
    const float top = highest(most), limit = most_code(f.size), inverse = top > 0.0f ? limit / top : 0.0f;
    for (d = 0; d + W <= f.size; d += W) store_shorts(out + d, load(q + d) * splat(inverse));
    if (rest) {  // the row has room for a whole vector
        store(padded, load_part(q + d, rest) * splat(inverse));
        store_shorts(out + d, load(padded));
    }
    f.q_scales[row] = top / limit / __builtin_sqrtf(float(f.size));
}

// -- keys
// ----------------------------------------------------------------------------------------------------------

// `count` keys, transposed, from row `first` of the source on; f32.
static inline void round_keys(const Flash& f, const Source& keys, int64_t first, int64_t count) {
    const float* data = static_cast<const float*>(keys.data);
    const float limit = most_code(f.size);
    for (int64_t i = 0; i < count; i += W) {
        const int64_t n = smaller(W, count - i);
        float inverse[W] = {};
        for (int64_t j = 0; j < n; ++j) {
            const float* row = data + (first + i + j) * keys.stride;
            V most = splat(0.0f);
            int64_t d = 0;
            for (; d + W <= f.size; d += W) most = vmax(most, vabs(load(row + d)));
            if (d < f.size) most = vmax(most, vabs(load_part(row + d, f.size - d)));
            const float top = highest(most);
            inverse[j] = top > 0.0f ? limit / top : 0.0f;
            whole_key_scales(f)[i + j] = top / limit;
        }
        for (int64_t d = 0; d < f.size; d += 2 * W) {  // W pairs of W keys
            V block[W];
            for (int64_t j = 0; j < W; ++j) {
                int16_t codes[2 * W] = {};
                const float* row = data + (first + i + j) * keys.stride;
                for (int64_t half = 0; half < 2 && j < n; ++half) {
                    const int64_t at = d + half * W, left = f.size - at;
                    if (left <= 0) break;
                    const V x = left >= W ? load(row + at) : load_part(row + at, left);
                    store_shorts(codes + half * W, x * splat(inverse[j]));
                }
                std::memcpy(&block[j], codes, sizeof codes);
            }
            transpose(block);
            for (int64_t p = 0; p < smaller(W, pairs_of(f) - d / 2); ++p) {
                std::memcpy(whole_keys(f) + ((d / 2 + p) * kKeys + i) * 2, &block[p], sizeof block[p]);
            }
        }
    }
}

// The same from the cache; `first` is a multiple of kKeyLanes.
template <Kind kind>
static inline void round_cached(const Flash& f, const CachedKeys& from, int64_t first, int64_t count) {
    const CachedKeys keys = {from.data, kind, from.size, from.scales};
    const V zero = splat(0.0f), limit = splat(most_code(f.size));
    for (int64_t i = 0; i < count; i += W) {
        V inverse = splat(1.0f), scales = key_scales(keys, first + i);
        if (keys.kind != Kind::int8) {  // int8 is whole already
            const V most = most_of(f.size, [&](int64_t d) { return key_vector(keys, first + i, d); });
            inverse = limit / most;
            scales = most / limit;
        }
        store(whole_key_scales(f) + i, scales);
        for (int64_t d = 0; d < f.size; d += 2) {
            const V low = key_vector(keys, first + i, d) * inverse;
            const V high = d + 1 < f.size ? key_vector(keys, first + i, d + 1) * inverse : zero;
            store_pairs(whole_keys(f) + (d / 2 * kKeys + i) * 2, pair_up(low, high));
        }
    }
}

// -- values
// --------------------------------------------------------------------------------------------------------

// Up to W numbers of a row of values from `at` on, zeros behind the `left` that there are.
static inline V some_values(const Source& values, int64_t at, int64_t left) {
    if (left >= W) return stored_vector(values.data, values.kind, at);
    float lanes[W] = {};
    for (int64_t i = 0; i < left; ++i) lanes[i] = stored_at(values.data, values.kind, at + i);
    return load(lanes);
}

// `count` values from row `first` of the source on.
template <Kind kind>
static inline void round_values(const Flash& f, const Source& from, int64_t first, int64_t count) {
    const Source values = {from.data, kind, from.stride, from.scales};
    for (int64_t d = 0; d < f.size; d += W) {
        const int64_t left = f.size - d;
        const V most = most_of(count, [&](int64_t i) {
            const V x = some_values(values, (first + i) * values.stride + d, left);
            return x * splat(row_scale(values, first + i));
        });
        const V inverse = splat(kMostValue) / most;
        store(whole_value_scales(f) + d, most / splat(kMostValue * kMostWeight));
        for (int64_t i = 0; i < count; i += 2) {
            V pair[2] = {splat(0.0f), splat(0.0f)};
            for (int64_t j = 0; j < smaller(2, count - i); ++j) {
                const V x = some_values(values, (first + i + j) * values.stride + d, left);
                pair[j] = x * splat(row_scale(values, first + i + j)) * inverse;
            }
            store_pairs(whole_values(f) + (i / 2 * f.padded + d) * 2, pair_up(pair[0], pair[1]));
        }
    }
}

// -- a block
// -------------------------------------------------------------------------------------------------------

constexpr float kLog2e = 1.44269504f;

// The nearest whole number to 2^13 · e^(score - top), `shift` being 13 - top · log2(e): a power of two times
// the series of 2^f to degree 5, |f| <= 1/2, which is within 3e-6.
static inline V whole_weight(V score, V shift) {
    const V t = vmax(fma(score, splat(kLog2e), shift), splat(-20.0f));
    const V n = vround(t), f = t - n;
    V p = splat(1.3333558e-3f);
    p = fma(p, f, splat(9.6181291e-3f));
    p = fma(p, f, splat(5.5504109e-2f));
    p = fma(p, f, splat(2.4022651e-1f));
    p = fma(p, f, splat(6.9314718e-1f));
    p = fma(p, f, splat(1.0f));
    return vround(scale2(p, n));
}

constexpr float kUnseen = -1e30f;  // a score whose weight is zero

// Turns the first `count` scores of a row, and what fills their last vector, into whole weights where they
// lie, zeros behind them up to `keys`. The row's largest score is known. Gives the weights' sum, lane by
// lane.
static inline V soften_row(const Flash& f, int64_t row, int64_t count, int64_t keys) {
    const float* s = f.scores + row * kKeys;
    int16_t* codes = whole_weights(f) + 2 * row * kKeys;
    const V shift = splat(13.0f - f.top[row] * kLog2e);
    V total = splat(0.0f);
    int64_t i = 0;
    for (; i < count; i += W) {
        const V weight = whole_weight(load(s + i), shift);
        store_shorts(codes + i, weight);
        total = total + weight;
    }
    for (; i < keys; i += W) store_shorts(codes + i, splat(0.0f));
    return total;
}

// The same for `rows` <= W rows from `row` on and the block of `keys` keys from `first` on. All their largest
// scores are found first, so that what they have so far is rescaled by one e^x and no row waits for another.
static inline void soften_whole(const Flash& f, int64_t row, int64_t rows, int64_t first, int64_t keys) {
    float before[W] = {}, now[W], factors[W], totals[W];
    int32_t counts[W];
    for (int64_t r = 0; r < rows; ++r) {
        before[r] = f.top[row + r];
        counts[r] = int32_t(seen(f, row + r, first, keys));
    }
    V lanes[W];
    for (int64_t r = rows; r < W; ++r) lanes[r] = splat(0.0f);  // nobody looks
    for (int64_t r = 0; r < rows; ++r) {
        float* s = f.scores + (row + r) * kKeys;
        const int64_t rest = counts[r] % W, whole = counts[r] - rest;
        if (rest) store(s + whole, first_of(load(s + whole), rest, kUnseen));
        lanes[r] = splat(before[r]);
        for (int64_t i = 0; i < counts[r]; i += W) lanes[r] = vmax(lanes[r], load(s + i));
    }
    transpose(lanes);
    V top = lanes[0];
    for (int64_t r = 1; r < W; ++r) top = vmax(top, lanes[r]);
    store(now, top);
    store(factors, vexp(load(before) - top));
    for (int64_t r = 0; r < rows; ++r) {
        if (now[r] != before[r] && f.total[row + r] != 0.0f) rescale(f, row + r, factors[r]);
        f.top[row + r] = now[r];
        lanes[r] = soften_row(f, row + r, counts[r], keys);
    }
    transpose(lanes);
    V total = lanes[0];
    for (int64_t r = 1; r < W; ++r) total = total + lanes[r];  // whole numbers, exact
    store(totals, total);
    for (int64_t r = 0; r < rows; ++r) f.total[row + r] += totals[r] / kMostWeight;
}

// Scores of rows [row, row + R) for B·W keys from `key` of the block on.
template <int R, int B>
static inline void score_pairs(const Flash& f, int64_t row, int64_t key) {
    const int16_t* q = reinterpret_cast<const int16_t*>(f.q) + row * f.padded;
    Products sums[R][B];
    multiply_pairs<R, B>(q, f.padded, whole_keys(f) + 2 * key, 2 * kKeys, pairs_of(f), sums);
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
        EDGEVL_UNROLL
        for (int c = 0; c < B; ++c) {
            const V scale = splat(f.q_scales[row + r]) * load(whole_key_scales(f) + key + c * W);
            store(f.scores + (row + r) * kKeys + key + c * W, to_float(sums[r][c]) * scale);
        }
    }
}

// Weighted values of rows [row, row + R) for B·W columns from d on.
template <int R, int B>
static inline void weigh_pairs(const Flash& f, int64_t row, int64_t keys, int64_t d) {
    Products sums[R][B];
    multiply_pairs<R, B>(whole_weights(f) + 2 * row * kKeys, 2 * kKeys, whole_values(f) + 2 * d, 2 * f.padded,
                         (keys + 1) / 2, sums);
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
        EDGEVL_UNROLL
        for (int c = 0; c < B; ++c) {
            float* out = f.out + (row + r) * f.padded + d + c * W;
            store(out, fma(to_float(sums[r][c]), load(whole_value_scales(f) + d + c * W), load(out)));
        }
    }
}

template <int R>
static inline void score_rows(const Flash& f, int64_t row, int64_t keys) {
    for (int64_t key = 0; key < keys; key += 2 * W) score_pairs<R, 2>(f, row, key);
}

template <int R>
static inline void weigh_rows(const Flash& f, int64_t row, int64_t keys) {
    int64_t d = 0;
    for (; d + W < f.size; d += 2 * W) weigh_pairs<R, 2>(f, row, keys, d);
    if (d < f.size) weigh_pairs<R, 1>(f, row, keys, d);
}

// Rows [0, count) in register tiles: kTile rows, then the rest one by one; each with the keys that it sees of
// the block of `keys` from `first` on.
template <void (*tile)(const Flash&, int64_t, int64_t), void (*single)(const Flash&, int64_t, int64_t)>
static inline void by_tiles(const Flash& f, int64_t count, int64_t first, int64_t keys) {
    int64_t row = 0;
    for (; row + kTile <= count; row += kTile) {
        int64_t most = 0;
        for (int64_t r = 0; r < kTile; ++r) most = larger(most, seen(f, row + r, first, keys));
        tile(f, row, most);
    }
    for (; row < count; ++row) single(f, row, seen(f, row, first, keys));
}

struct WholeBlocks {
    static void query(const Flash& f, int64_t row, const float* q) { round_query(f, row, q); }

    // `count` keys and values from row `first` of the source on, a multiple of kKeyLanes in the cache.
    static void load_keys(const Flash& f, const Source& keys, int64_t first, int64_t count) {
        round_keys(f, keys, first, count);
    }
    static void load_keys(const Flash& f, const CachedKeys& keys, int64_t first, int64_t count) {
        if (keys.kind == Kind::int8) return round_cached<Kind::int8>(f, keys, first, count);
        round_cached<Kind::f16>(f, keys, first, count);
    }
    static void load_values(const Flash& f, const Source& values, int64_t first, int64_t count) {
        if (values.kind == Kind::int8) return round_values<Kind::int8>(f, values, first, count);
        if (values.kind == Kind::f16) return round_values<Kind::f16>(f, values, first, count);
        round_values<Kind::f32>(f, values, first, count);
    }

    // Takes in the loaded block of `keys` keys from `first` on.
    static void absorb(const Flash& f, int64_t rows, int64_t first, int64_t keys) {
        by_tiles<score_rows<kTile>, score_rows<1>>(f, rows, first, keys);
        for (int64_t r = 0; r < rows; r += W) soften_whole(f, r, smaller(W, rows - r), first, keys);
        by_tiles<weigh_rows<kTile>, weigh_rows<1>>(f, rows, first, keys);
    }
};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
