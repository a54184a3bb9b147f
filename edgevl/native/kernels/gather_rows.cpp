// gather_rows: the rows whose logits are wanted.
#include <cstring>

#include "kernels.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void one_row(const GatherRows& a, int64_t row) {
    std::memcpy(a.out + row * a.width, a.x + a.picked[row] * a.width, size_t(a.width) * sizeof(float));
}

}  // namespace

const Kernel<GatherRows> gather_rows_kernel = {1, row_items<GatherRows>, run_rows<GatherRows, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
