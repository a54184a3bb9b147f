// The kernels of the instruction set this file is compiled for, one op a file.
#pragma once

#include "../types.h"

namespace edgevl {
namespace EDGEVL_ISA {

extern const Probe probe;
extern const Kernel<Embed> embed_kernel;
extern const Kernel<RmsNorm> rms_norm_kernel;
extern const Kernel<LayerNorm> layer_norm_kernel;
extern const Kernel<Linear> linear_kernel;
extern const Kernel<RopeWrite> rope_write_kernel;
extern const Kernel<Attention> attention_kernel;
extern const Kernel<SiluMul> silu_mul_kernel;
extern const Kernel<GatherRows> gather_rows_kernel;
extern const Kernel<Patches> patches_kernel;
extern const Kernel<VisionTokens> vision_tokens_kernel;
extern const Kernel<FullAttention> full_attention_kernel;
extern const Kernel<PixelShuffle> pixel_shuffle_kernel;

constexpr int64_t kRowGrain = 4;  // rows of one item of the ops that treat rows alike

// The items of such an op.
template <class Args>
static int64_t row_items(const Args& a, const Step& step, int) {
    return (rows_of(a.rows, step.counts) + kRowGrain - 1) / kRowGrain;
}

// Runs `one_row(args, row)` for the rows of an item.
template <class Args, void (*one_row)(const Args&, int64_t)>
static void run_rows(const Args& a, const Step& step, int, int64_t item, float*) {
    const int64_t rows = rows_of(a.rows, step.counts), end = (item + 1) * kRowGrain;
    for (int64_t row = item * kRowGrain; row < (end < rows ? end : rows); ++row) one_row(a, row);
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
