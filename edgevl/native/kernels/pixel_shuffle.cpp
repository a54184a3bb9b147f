// pixel_shuffle: the prefix dropped, each 2x2 block of patches joined into one row.
#include <cstring>

#include "kernels.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void one_row(const PixelShuffle& a, int64_t row) {
    const int64_t half = a.grid / 2, tile = row / (half * half), place = row % (half * half);
    const float* first = a.x + (tile * (a.prefix + a.grid * a.grid) + a.prefix) * a.width;
    float* out = a.out + row * 4 * a.width;
    for (int64_t i = 0; i < 4; ++i) {
        const int64_t y = place / half * 2 + i / 2, x = place % half * 2 + i % 2;
        std::memcpy(out + i * a.width, first + (y * a.grid + x) * a.width, size_t(a.width) * sizeof(float));
    }
}

}  // namespace

const Kernel<PixelShuffle> pixel_shuffle_kernel = {1, row_items<PixelShuffle>,
                                                   run_rows<PixelShuffle, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
