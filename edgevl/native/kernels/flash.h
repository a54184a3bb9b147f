// Attention of a block of query rows over blocks of keys, with a running maximum and sum, so that the scratch
// does not grow with the number of keys (Dao et al. 2022, arXiv 2205.14135; Milakov and Gimelshein 2018,
// arXiv 1805.02867).
#pragma once

#include "../types.h"
#include "simd.h"

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
static inline void fetch(const Source& s, int64_t at) {
    __builtin_prefetch(static_cast<const char*>(s.data) + at * cache_item(s.kind));
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

// Fetches what `key_vector` gives kKeys keys further on.
static inline void fetch_keys(const CachedKeys& s, int64_t first, int64_t d) {
    const int64_t at = ((first + kKeys) / kKeyLanes * s.size + d) * kKeyLanes;
    __builtin_prefetch(static_cast<const char*>(s.data) + at * cache_item(s.kind));
}

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
    float* q_scales;       // (rows,), of whole_blocks.h
    int32_t* ends;         // (rows,), keys that a row sees, from the first of all on
    float* keys;           // (padded, kKeys), transposed
    float* values;         // (kKeys, padded)
};

static inline Flash make_flash(float* scratch, int64_t size, int64_t rows) {
    const int64_t padded = blocks(size, 32) * 32;
    Flash f = {size, padded, scratch, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    f.out = f.q + rows * padded;
    f.scores = f.out + rows * padded;
    f.top = f.scores + rows * kKeys;
    f.total = f.top + rows;
    f.q_scales = f.total + rows;
    f.ends = reinterpret_cast<int32_t*>(f.q_scales + rows);
    f.keys = f.q_scales + 2 * rows;
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

// Keys that a row sees of `count` from `first` on.
static inline int64_t seen(const Flash& f, int64_t row, int64_t first, int64_t count) {
    return larger(0, smaller(count, f.ends[row] - first));
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

// What a row has so far, times `factor`: its largest score has grown.
static inline void rescale(const Flash& f, int64_t row, float factor) {
    f.total[row] *= factor;
    float* out = f.out + row * f.padded;
    for (int64_t d = 0; d < f.padded; d += W) store(out + d, load(out + d) * splat(factor));
}

// Takes a new largest score of a row.
static inline void raise_top(const Flash& f, int64_t row, float top) {
    const float before = f.top[row];
    f.top[row] = top;
    if (top == before || f.total[row] == 0.0f) return;
    float lanes[W];
    store(lanes, vexp(splat(before - top)));
    rescale(f, row, lanes[0]);
}

// The largest of the first `count` > 0 scores of a row, and of those before.
static inline float largest(const Flash& f, int64_t row, int64_t count) {
    const float* s = f.scores + row * kKeys;
    const int64_t whole = count / W * W;
    float top = f.top[row];
    if (whole > 0) {
        V most = load(s);
        for (int64_t i = W; i < whole; i += W) most = vmax(most, load(s + i));
        top = highest(most) > top ? highest(most) : top;
    }
    for (int64_t i = whole; i < count; ++i) top = s[i] > top ? s[i] : top;
    return top;
}

// Turns the first `count` scores of a row into weights, zeros behind them up to `keys`.
static inline void soften(const Flash& f, int64_t row, int64_t count, int64_t keys) {
    float* s = f.scores + row * kKeys;
    for (int64_t i = larger(count, 0); i < keys; ++i) s[i] = 0.0f;
    if (count <= 0) return;
    const int64_t whole = count / W * W, rest = count - whole;
    raise_top(f, row, largest(f, row, count));
    const V top = splat(f.top[row]);
    V totals = splat(0.0f);
    for (int64_t i = 0; i < whole; i += W) {
        const V weight = vexp(load(s + i) - top);
        store(s + i, weight);
        totals = totals + weight;
    }
    float total = sum(totals);
    if (rest) {
        store_part(s + whole, vexp(load_part(s + whole, rest) - top), rest);
        for (int64_t i = whole; i < count; ++i) total += s[i];
    }
    f.total[row] += total;
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
