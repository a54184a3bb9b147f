// rope_write: q and k turned by their positions, q handed on, k and v written to the KV cache.
//
// Pairs are (d, d + D/2). Angles, cosines, sines and the turn itself are f64, as in the definition: the f32
// and f16 that are stored then differ from it in no bit. Cosines and sines are computed once a step, by the
// first layer, and read by the others. An int8 cache has one scale for each token and KV head.
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void fill_turns(const RopeWrite& a, int64_t row) {
    const int64_t half = a.cache.size / 2;
    double* turns = a.turns + row * a.cache.size;
    for (int64_t d = 0; d < half; ++d) {
        const double angle = double(a.positions[row]) * a.frequencies[d];
        turns[d] = cos(angle);
        turns[half + d] = sin(angle);
    }
}

void turn(const float* x, const double* turns, int64_t half, float* out) {
    for (int64_t d = 0; d < half; ++d) {
        const double first = x[d], second = x[half + d], c = turns[d], s = turns[half + d];
        out[d] = float(first * c - second * s);
        out[half + d] = float(second * c + first * s);
    }
}

// One head in int8, numbers `stride` apart, by one scale: its largest |number| is 127. Gives the scale.
float write_codes(int8_t* out, int64_t stride, const float* x, int64_t size) {
    float top = 0.0f;
    for (int64_t d = 0; d < size; ++d) top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
    for (int64_t d = 0; d < size; ++d) out[d * stride] = int8_t(nearbyintf(x[d] * inverse));
    return top / 127.0f;
}

// One head of values into the cache at number `at`, its scale to `scale`.
void write_value(const CacheLayer& c, int64_t at, const float* x, float* scale) {
    if (c.kind == Kind::f32) {
        std::memcpy(static_cast<float*>(c.values) + at, x, size_t(c.size) * sizeof(float));
    } else if (c.kind == Kind::int8) {
        *scale = write_codes(static_cast<int8_t*>(c.values) + at, 1, x, c.size);
    } else {
        uint16_t* out = static_cast<uint16_t*>(c.values) + at;
        int64_t d = 0;
        for (; d + W <= c.size; d += W) store_half(out + d, load(x + d));
        for (; d < c.size; ++d) out[d] = float_to_half(x[d]);
    }
}

// One head of keys, whose numbers lie kKeyLanes apart.
void write_key(const CacheLayer& c, int64_t at, const float* x, float* scale) {
    if (c.kind == Kind::int8) {
        *scale = write_codes(static_cast<int8_t*>(c.keys) + at, kKeyLanes, x, c.size);
        return;
    }
    for (int64_t d = 0; d < c.size; ++d, at += kKeyLanes) {
        if (c.kind == Kind::f16) {
            static_cast<uint16_t*>(c.keys)[at] = float_to_half(x[d]);
        } else {
            static_cast<float*>(c.keys)[at] = x[d];
        }
    }
}

void one_row(const RopeWrite& a, int64_t row, float* scratch) {
    const CacheLayer& c = a.cache;
    const int64_t size = c.size, half = size / 2;
    const float* q = a.qkv + row * (c.heads + 2 * c.groups) * size;
    const float* k = q + c.heads * size;
    const float* v = k + c.groups * size;
    const double* turns = a.turns + row * size;
    for (int64_t h = 0; h < c.heads; ++h) turn(q + h * size, turns, half, a.out + (row * c.heads + h) * size);
    for (int64_t g = 0; g < c.groups; ++g) {
        const int64_t head = a.slots[row] * c.groups + g, place = a.positions[row];
        const int64_t block = head * key_blocks(c.context) + place / kKeyLanes;
        turn(k + g * size, turns, half, scratch);
        const int64_t scale = head * key_blocks(c.context) * kKeyLanes + place;
        write_key(c, block * size * kKeyLanes + place % kKeyLanes, scratch, scales_from(c.key_scales, scale));
        write_value(c, (head * c.context + place) * size, v + g * size, scales_from(c.value_scales, scale));
    }
}

int64_t items(const RopeWrite& a, const Step& step, int phase) {
    return phase == 0 && !a.fill ? 0 : row_items(a, step, phase);
}

void run(const RopeWrite& a, const Step& step, int phase, int64_t item, float* scratch) {
    run_item(a.rows, step, item, [&](int64_t row) {
        if (phase == 0) {
            fill_turns(a, row);
        } else {
            one_row(a, row, scratch);
        }
    });
}

}  // namespace

const Kernel<RopeWrite> rope_write_kernel = {2, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
