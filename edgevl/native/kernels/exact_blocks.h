// Attention of many query rows in f32, over keys and values that are f32.
#pragma once

#include "flash.h"
#include "tile.h"

namespace edgevl {
namespace EDGEVL_ISA {

struct ExactBlocks {
    static void query(const Flash& f, int64_t row, const float* q) { set_query(f, row, q); }

    // `count` keys, transposed, from row `first` of the source on.
    static void load_keys(const Flash& f, const Source& keys, int64_t first, int64_t count) {
        const float* data = static_cast<const float*>(keys.data) + first * keys.stride;
        for (int64_t i = 0; i < count; i += W) {
            const int64_t n = smaller(W, count - i);
            int64_t d = 0;
            for (; d + W <= f.size; d += W) {
                V block[W];
                for (int j = 0; j < W; ++j)
                    block[j] = j < n ? load(data + (i + j) * keys.stride + d) : splat(0.0f);
                transpose(block);
                for (int j = 0; j < W; ++j) store(f.keys + (d + j) * kKeys + i, block[j]);
            }
            for (; d < f.size; ++d) {
                for (int64_t j = 0; j < W; ++j)
                    f.keys[d * kKeys + i + j] = j < n ? data[(i + j) * keys.stride + d] : 0.0f;
            }
        }
    }

    // The same from the cache; `first` is a multiple of kKeyLanes.
    static void load_keys(const Flash& f, const CachedKeys& keys, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; i += W) {
            for (int64_t d = 0; d < f.size; ++d)
                store(f.keys + d * kKeys + i, key_vector(keys, first + i, d));
        }
    }

    // `count` values from row `first` of the source on.
    static void load_values(const Flash& f, const Source& values, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const float* from = static_cast<const float*>(values.data) + (first + i) * values.stride;
            float* out = f.values + i * f.padded;
            std::memcpy(out, from, size_t(f.size) * sizeof(float));
            for (int64_t d = f.size; d < f.padded; ++d) out[d] = 0.0f;
        }
    }

    // Takes in the loaded block of `keys` keys from `first` on.
    static void absorb(const Flash& f, int64_t rows, int64_t first, int64_t keys) {
        for (int64_t c = 0; c < keys; c += kTileWidth) {
            multiply(rows, f.q, f.padded, f.keys + c, kKeys, f.scores + c, kKeys, f.size, false);
        }
        for (int64_t r = 0; r < rows; ++r) soften(f, r, seen(f, r, first, keys), keys);
        for (int64_t c = 0; c < f.size; c += kTileWidth) {
            multiply(rows, f.scores, kKeys, f.values + c, f.padded, f.out + c, f.padded, keys, true);
        }
    }
};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
