// Attention of a block of query rows over blocks of keys, with a running maximum and sum, so that the scratch
// does not grow with the number of keys (Dao et al. 2022, arXiv 2205.14135; Milakov and Gimelshein 2018,
// arXiv 1805.02867).
#pragma once

#include "../types.h"
#include "simd.h"
#include "tile.h"

namespace edgevl {
namespace EDGEVL_ISA {

// Keys or values, one row of D numbers each `stride` numbers; f32, f16, or int8 with a scale for each row.
struct Source {
    const void* data;
    Kind kind;
    int64_t stride;
    const float* scales;  // int8 only
};

// What is stored, int8 without its scale.
static inline V stored_vector(const void* data, Kind kind, int64_t at) {
    if (kind == Kind::f16) return load_half(static_cast<const uint16_t*>(data) + at);
    if (kind == Kind::int8) return load_codes(static_cast<const int8_t*>(data) + at);
    return load(static_cast<const float*>(data) + at);
}
static inline float stored_at(const void* data, Kind kind, int64_t at) {
    if (kind == Kind::f16) return half_to_float(static_cast<const uint16_t*>(data)[at]);
    if (kind == Kind::int8) return float(static_cast<const int8_t*>(data)[at]);
    return static_cast<const float*>(data)[at];
}
static inline float row_scale(const Source& s, int64_t row) {
    return s.kind == Kind::int8 ? s.scales[row] : 1.0f;
}

// Keys of the cache: for each block of kKeyLanes of them, D rows of one number of each.
struct CachedKeys {
    const void* data;
    Kind kind;
    int64_t size;         // D
    const float* scales;  // int8 only
};

// Number d of the W keys from `first` on, a multiple of W; int8 without its scale.
static inline V key_vector(const CachedKeys& s, int64_t first, int64_t d) {
    return stored_vector(s.data, s.kind, (first / kKeyLanes * s.size + d) * kKeyLanes + first % kKeyLanes);
}
static inline V key_scales(const CachedKeys& s, int64_t first) {
    return s.kind == Kind::int8 ? load(s.scales + first) : splat(1.0f);
}

struct Flash {
    int64_t size, padded;  // D, and D rounded up to whole panels of 32
    float* q;              // (rows, padded), scaled
    float* out;            // (rows, padded), weighted values so far
    float* scores;         // (rows, kKeys)
    float* top;            // (rows,), largest score so far
    float* total;          // (rows,), sum of weights so far
    float* keys;           // (padded, kKeys), transposed
    float* values;         // (kKeys, padded)
};

static inline Flash make_flash(float* scratch, int64_t size, int64_t rows) {
    const int64_t padded = blocks(size, 32) * 32;
    Flash f = {size, padded, scratch, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    f.out = f.q + rows * padded;
    f.scores = f.out + rows * padded;
    f.top = f.scores + rows * kKeys;
    f.total = f.top + rows;
    f.keys = f.total + rows;
    f.values = f.keys + kKeys * padded;
    return f;
}

static inline void start_rows(const Flash& f, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
        f.top[r] = -__builtin_inff();
        f.total[r] = 0.0f;
    }
    std::memset(f.out, 0, size_t(rows * f.padded) * sizeof(float));
}

static inline void set_query(const Flash& f, int64_t row, const float* q) {
    const float scale = 1.0f / __builtin_sqrtf(float(f.size));
    float* out = f.q + row * f.padded;
    for (int64_t d = 0; d < f.size; ++d) out[d] = q[d] * scale;
    for (int64_t d = f.size; d < f.padded; ++d) out[d] = 0.0f;
}

static inline void get_output(const Flash& f, int64_t row, float* out) {
    const float scale = 1.0f / f.total[row];
    for (int64_t d = 0; d < f.size; ++d) out[d] = f.out[row * f.padded + d] * scale;
}

// Turns the first `count` scores of a row into weights (zeros up to `keys`) and rescales what the row has so
// far.
static inline void soften(const Flash& f, int64_t row, int64_t count, int64_t keys) {
    float* s = f.scores + row * kKeys;
    for (int64_t i = larger(count, 0); i < keys; ++i) s[i] = 0.0f;
    if (count <= 0) return;
    const int64_t whole = count / W * W, rest = count - whole;
    float top = f.top[row];
    if (whole > 0) {
        V most = load(s);
        for (int64_t i = W; i < whole; i += W) most = vmax(most, load(s + i));
        top = highest(most) > top ? highest(most) : top;
    }
    for (int64_t i = whole; i < count; ++i) top = s[i] > top ? s[i] : top;
    V totals = splat(0.0f);
    for (int64_t i = 0; i < whole; i += W) {
        const V weight = vexp(load(s + i) - splat(top));
        store(s + i, weight);
        totals = totals + weight;
    }
    float total = sum(totals);
    if (rest) {
        store_part(s + whole, vexp(load_part(s + whole, rest) - splat(top)), rest);
        for (int64_t i = whole; i < count; ++i) total += s[i];
    }
    const float before = f.top[row];
    if (top != before && f.total[row] > 0.0f) {
        float lanes[W];
        store(lanes, vexp(splat(before - top)));
        f.total[row] *= lanes[0];
        float* out = f.out + row * f.padded;
        for (int64_t d = 0; d < f.padded; d += W) store(out + d, load(out + d) * splat(lanes[0]));
    }
    f.total[row] += total;
    f.top[row] = top;
}

// `count` keys, transposed, from row `first` of the source on; f32 and f16.
static inline void load_keys(const Flash& f, const Source& keys, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const int64_t n = smaller(W, count - i);
        int64_t d = 0;
        for (; d + W <= f.size; d += W) {
            V block[W];
            for (int j = 0; j < W; ++j)
                block[j] = j < n ? stored_vector(keys.data, keys.kind, (first + i + j) * keys.stride + d)
                                 : splat(0.0f);
            transpose(block);
            for (int j = 0; j < W; ++j) store(f.keys + (d + j) * kKeys + i, block[j]);
        }
        for (; d < f.size; ++d) {
            for (int64_t j = 0; j < W; ++j) {
                f.keys[d * kKeys + i + j] =
                    j < n ? stored_at(keys.data, keys.kind, (first + i + j) * keys.stride + d) : 0.0f;
            }
        }
    }
}

// The same from the cache; `first` is a multiple of kKeyLanes.
static inline void load_keys(const Flash& f, const CachedKeys& keys, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const V scales = key_scales(keys, first + i);
        for (int64_t d = 0; d < f.size; ++d) {
            store(f.keys + d * kKeys + i, key_vector(keys, first + i, d) * scales);
        }
    }
}

// `count` values from row `first` of the source on.
static inline void load_values(const Flash& f, const Source& values, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        float* out = f.values + i * f.padded;
        const int64_t at = (first + i) * values.stride;
        const float scale = row_scale(values, first + i);
        int64_t d = 0;
        for (; d + W <= f.size; d += W) {
            store(out + d, stored_vector(values.data, values.kind, at + d) * splat(scale));
        }
        for (; d < f.size; ++d) out[d] = stored_at(values.data, values.kind, at + d) * scale;
        for (; d < f.padded; ++d) out[d] = 0.0f;
    }
}

// Takes in the loaded block of `keys` keys; row r sees the first visible(r) of them.
template <class Visible>
static inline void absorb(const Flash& f, int64_t rows, int64_t keys, Visible visible) {
    for (int64_t c = 0; c < keys; c += kTileWidth) {
        multiply(rows, f.q, f.padded, f.keys + c, kKeys, f.scores + c, kKeys, f.size, false);
    }
    for (int64_t r = 0; r < rows; ++r) soften(f, r, visible(r), keys);
    for (int64_t c = 0; c < f.padded; c += kTileWidth) {
        if (c >= f.size) break;
        multiply(rows, f.scores, kKeys, f.values + c, f.padded, f.out + c, f.padded, keys, true);
    }
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
