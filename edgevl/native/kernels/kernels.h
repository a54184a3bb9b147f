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

// Rows of one item of the ops that treat rows alike: about eight items a thread, in whole register tiles of
// the linears that follow, so that no two threads write to one line of a cache; few rows go by fours.
static int64_t row_grain(int64_t rows, const Step& step) {
    const int64_t fair = rows / (8 * int64_t(step.threads));
    return fair <= 4 ? 4 : (fair + kTileRows - 1) / kTileRows * kTileRows;
}

// The items of such an op.
template <class Args>
static int64_t row_items(const Args& a, const Step& step, int) {
    const int64_t rows = rows_of(a.rows, step.counts), grain = row_grain(rows, step);
    return (rows + grain - 1) / grain;
}

// Runs `one_row(row)` for the rows of an item.
template <class OneRow>
static void run_item(Rows rows, const Step& step, int64_t item, const OneRow& one_row) {
    const int64_t count = rows_of(rows, step.counts), grain = row_grain(count, step),
                  end = (item + 1) * grain;
    for (int64_t row = item * grain; row < (end < count ? end : count); ++row) one_row(row);
}

template <class Args, void (*one_row)(const Args&, int64_t)>
static void run_rows(const Args& a, const Step& step, int, int64_t item, float*) {
    run_item(a.rows, step, item, [&](int64_t row) { one_row(a, row); });
}

}  // namespace EDGEVL_ISA
}  // namespace edgevl
