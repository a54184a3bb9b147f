// vision_tokens: positions added to the patches, the prefix put before each tile.
#include "kernels.h"
#include "weight.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void one_row(const VisionTokens& a, int64_t row) {
    const int64_t width = a.positions.k, patches = a.positions.n, prefix = a.prefix.n;
    const int64_t tile = row / (prefix + patches), place = row % (prefix + patches);
    float* out = a.out + row * width;
    if (place < prefix) return read_row(a.prefix, place, out, nullptr);
    read_row(a.positions, place - prefix, out, a.x + (tile * patches + place - prefix) * width);
}

}  // namespace

const Kernel<VisionTokens> vision_tokens_kernel = {1, row_items<VisionTokens>,
                                                   run_rows<VisionTokens, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
