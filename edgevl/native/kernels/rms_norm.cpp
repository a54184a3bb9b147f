// rms_norm: x / sqrt(mean(x²) + eps) · weight.
#include "coded_rows.h"
#include "weight.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void one_row(const RmsNorm& a, int64_t row, float* out) {
    const int64_t width = a.weight.n;
    const float* x = a.x + row * width;
    V squares = splat(0.0f);
    int64_t i = 0;
    for (; i + W <= width; i += W) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < width; ++i) total += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf(total / float(width) + a.eps);
    for (i = 0; i + W <= width; i += W)
        store(out + i, load(x + i) * splat(scale) * weight_vector(a.weight, 0, i));
    for (; i < width; ++i) out[i] = x[i] * scale * weight_at(a.weight, 0, i);
}

}  // namespace

const Kernel<RmsNorm> rms_norm_kernel = {1, row_items<RmsNorm>, put_rows<RmsNorm, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
