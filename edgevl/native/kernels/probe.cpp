// probe: what the processor can do at most with this instruction set, beside which kernels are measured.
#include "kernels.h"
#include "panels.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

constexpr int kChains = W == 16 ? 16 : W == 8 ? 4 : 2;  // sums that are worked on side by side

// Products of int8 in registers, none of them waiting for memory. Gives the operations done, two a product.
int64_t products(int64_t rounds, int32_t* sink) {
    const uint8_t bytes[64] = {1, 2, 3};
    const int8_t x[4] = {1, -1, 2, -2};
    Bytes codes = load_bytes(bytes);
    Sums sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = first_sums(i);
    for (int64_t r = 0; r < rounds; ++r) {
        asm volatile("" : "+m"(codes));  // nothing may be computed once for all rounds
        const Bytes now = codes;
        EDGEVL_UNROLL
        for (int u = 0; u < 8; ++u) {
            EDGEVL_UNROLL
            for (int i = 0; i < kChains; ++i) sums[i] = dot_bytes(sums[i], now, x);
        }
    }
    float total = 0.0f;
    for (int i = 0; i < kChains; ++i) total += sum(as_float(sums[i], 0));
    *sink = int32_t(total);
    return rounds * 8 * kChains * 64 * 2;
}

// Reads `count` floats, a multiple of 64, and adds them up.
float read(const float* p, int64_t count) {
    constexpr int kVectors = 64 / W < 8 ? 64 / W : 8;
    V sums[kVectors];
    for (int i = 0; i < kVectors; ++i) sums[i] = splat(0.0f);
    for (int64_t at = 0; at < count; at += kVectors * W) {
        EDGEVL_UNROLL
        for (int i = 0; i < kVectors; ++i) {
            __builtin_prefetch(p + at + i * W + 1024);
            sums[i] = sums[i] + load(p + at + i * W);
        }
    }
    float total = 0.0f;
    for (int i = 0; i < kVectors; ++i) total += sum(sums[i]);
    return total;
}

}  // namespace

const Probe probe = {products, read};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
