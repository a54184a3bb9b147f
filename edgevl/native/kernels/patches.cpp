// patches: uint8 pixels to normalised patches; inside a patch channel slowest, then row, then column.
#include "kernels.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

// One item is one row of patches of one tile.
int64_t items(const Patches& a, const Step& step, int) {
    return rows_of(a.rows, step.counts) * (a.side / a.patch);
}

void run(const Patches& a, const Step&, int, int64_t item, float*) {
    const int64_t grid = a.side / a.patch;
    const uint8_t* strip = a.pixels + item * a.patch * a.side * 3;
    float* out = a.out + item * grid * 3 * a.patch * a.patch;
    for (int64_t column = 0; column < grid; ++column) {
        for (int c = 0; c < 3; ++c) {
            for (int64_t y = 0; y < a.patch; ++y) {
                const uint8_t* line = strip + (y * a.side + column * a.patch) * 3 + c;
                for (int64_t x = 0; x < a.patch; ++x) {
                    *out++ = (float(line[3 * x]) / 255.0f - a.mean[c]) / a.std[c];
                }
            }
        }
    }
}

}  // namespace

const Kernel<Patches> patches_kernel = {1, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
