// silu_mul: gate / (1 + e^-gate) · up.
#include "coded_rows.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

V silu(V gate, V up) { return gate / (splat(1.0f) + vexp(splat(0.0f) - gate)) * up; }

void one_row(const SiluMul& a, int64_t row, float* out) {
    const int64_t width = a.out.width;
    const float* gate = a.gate_up + row * 2 * width;
    const float* up = gate + width;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(out + i, silu(load(gate + i), load(up + i)));
    const int64_t rest = width - i;
    if (rest) store_part(out + i, silu(load_part(gate + i, rest), load_part(up + i, rest)), rest);
}

}  // namespace

const Kernel<SiluMul> silu_mul_kernel = {1, row_items<SiluMul>, put_rows<SiluMul, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
