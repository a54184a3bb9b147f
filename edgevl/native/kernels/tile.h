// The register tile that all matrix products are made of: C (rows, 2W) = or += A (rows, k) · B (k, 2W).
#pragma once

#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {

constexpr int kTileWidth = 2 * W;

template <int R>
static inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                        int64_t k, bool add) {
    V low[R], high[R];
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
        low[r] = add ? load(c + r * ldc) : splat(0.0f);
        high[r] = add ? load(c + r * ldc + W) : splat(0.0f);
    }
    for (int64_t i = 0; i < k; ++i, b += ldb) {
        const V b0 = load(b), b1 = load(b + W);
        EDGEVL_UNROLL
        for (int r = 0; r < R; ++r) {
            const V x = splat(a[r * lda + i]);
            low[r] = fma(x, b0, low[r]);
            high[r] = fma(x, b1, high[r]);
        }
    }
    EDGEVL_UNROLL
    for (int r = 0; r < R; ++r) {
        store(c + r * ldc, low[r]);
        store(c + r * ldc + W, high[r]);
    }
}

template <int R>
static inline void tile_tail(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                             int64_t ldc, int64_t k, bool add) {
    if (rows == R) return tile<R>(a, lda, b, ldb, c, ldc, k, add);
    if constexpr (R > 1) tile_tail<R - 1>(rows, a, lda, b, ldb, c, ldc, k, add);
}

// Any number of rows.
static inline void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                            int64_t ldc, int64_t k, bool add) {
    for (; rows >= kTile; rows -= kTile, a += kTile * lda, c += kTile * ldc) {
        tile<kTile>(a, lda, b, ldb, c, ldc, k, add);
    }
    if (rows > 0) tile_tail<kTile - 1>(rows, a, lda, b, ldb, c, ldc, k, add);
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
