// Reading weights of every kind, a value or a row at a time.
#pragma once

#include "../types.h"
#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {

// The value of (n, k): slow, for tails.
static inline float weight_at(const Weight& w, int64_t n, int64_t k) {
    const int64_t at = n * w.k + k;
    switch (w.kind) {
        case Kind::f32:
            return static_cast<const float*>(w.values)[at];
        case Kind::f16:
            return half_to_float(static_cast<const uint16_t*>(w.values)[at]);
        case Kind::int8:
            return float(static_cast<const int8_t*>(w.values)[at]) * static_cast<const float*>(w.scales)[n];
        case Kind::int4:
            break;
    }
    // layout "panels": 16 rows, eight in-features, of which j and j + 4 share a byte
    const int64_t panel = n / kPanelRows, lane = n % kPanelRows;
    const uint8_t byte =
        static_cast<const uint8_t*>(w.values)[((panel * (w.k / 8) + k / 8) * kPanelRows + lane) * 4 + k % 4];
    const int64_t group = (panel * w.groups + k / w.group) * kPanelRows + lane;
    const float scale = half_to_float(static_cast<const uint16_t*>(w.scales)[group]);
    return (float(k % 8 >= 4 ? byte >> 4 : byte & 15) - float(w.zeros[group])) * scale;
}

// W values of row n from k on; not for int4.
static inline V weight_vector(const Weight& w, int64_t n, int64_t k) {
    const int64_t at = n * w.k + k;
    if (w.kind == Kind::f32) return load(static_cast<const float*>(w.values) + at);
    if (w.kind == Kind::f16) return load_half(static_cast<const uint16_t*>(w.values) + at);
    return load_int8(static_cast<const int8_t*>(w.values) + at) *
           splat(static_cast<const float*>(w.scales)[n]);
}

// Row n as f32; with `add`, row n added to what is there.
static inline void read_row(const Weight& w, int64_t n, float* out, const float* add) {
    int64_t k = 0;
    if (w.kind != Kind::int4) {
        for (; k + W <= w.k; k += W) {
            const V v = weight_vector(w, n, k);
            store(out + k, add ? v + load(add + k) : v);
        }
    }
    for (; k < w.k; ++k) out[k] = weight_at(w, n, k) + (add ? add[k] : 0.0f);
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
