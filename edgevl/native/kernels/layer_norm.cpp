// layer_norm: (x - mean) / sqrt(var + eps) · weight + bias.
#include "coded_rows.h"
#include "weight.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void one_row(const LayerNorm& a, int64_t row, float* out) {
    const int64_t width = a.weight.n;
    const float* x = a.x + row * width;
    const float* bias = a.weight.bias;
    V sums = splat(0.0f);
    int64_t i = 0;
    for (; i + W <= width; i += W) sums = sums + load(x + i);
    float total = sum(sums);
    for (; i < width; ++i) total += x[i];
    const float mean = total / float(width);
    V squares = splat(0.0f);
    for (i = 0; i + W <= width; i += W) {
        const V centred = load(x + i) - splat(mean);
        squares = fma(centred, centred, squares);
    }
    total = sum(squares);
    for (; i < width; ++i) total += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / __builtin_sqrtf(total / float(width) + a.eps);
    for (i = 0; i + W <= width; i += W) {
        const V turned = (load(x + i) - splat(mean)) * splat(scale);
        store(out + i, fma(turned, weight_vector(a.weight, 0, i), load(bias + i)));
    }
    for (; i < width; ++i) out[i] = (x[i] - mean) * scale * weight_at(a.weight, 0, i) + bias[i];
}

}  // namespace

const Kernel<LayerNorm> layer_norm_kernel = {1, row_items<LayerNorm>, put_rows<LayerNorm, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
