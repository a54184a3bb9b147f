// Reading float weights, a value or a row at a time.
#pragma once

#include "../types.h"
#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {

// The value of (n, k): slow, for tails. f32 and f16 only, like everything here: int8 and int4 are in
// panels.h.
static inline float weight_at(const Weight& w, int64_t n, int64_t k) {
    const int64_t at = n * w.k + k;
    return w.kind == Kind::f32 ? static_cast<const float*>(w.values)[at]
                               : half_to_float(static_cast<const uint16_t*>(w.values)[at]);
}

// W values of row n from k on.
static inline V weight_vector(const Weight& w, int64_t n, int64_t k) {
    const int64_t at = n * w.k + k;
    return w.kind == Kind::f32 ? load(static_cast<const float*>(w.values) + at)
                               : load_half(static_cast<const uint16_t*>(w.values) + at);
}

// Row n as f32; with `add`, row n added to what is there.
static inline void read_row(const Weight& w, int64_t n, float* out, const float* add) {
    int64_t k = 0;
    for (; k + W <= w.k; k += W) {
        const V v = weight_vector(w, n, k);
        store(out + k, add ? v + load(add + k) : v);
    }
    for (; k < w.k; ++k) out[k] = weight_at(w, n, k) + (add ? add[k] : 0.0f);
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
