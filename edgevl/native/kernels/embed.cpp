// embed: rows of the embedding table, or of the step's image embeddings where the id is negative.
#include "kernels.h"
#include "weight.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

void one_row(const Embed& a, int64_t row) {
    const int64_t id = a.tokens[row], width = a.table.k;
    float* out = a.out + row * width;
    if (id >= 0) return read_row(a.table, id, out, nullptr);
    std::memcpy(out, a.images + (-1 - id) * width, size_t(width) * sizeof(float));
}

}  // namespace

const Kernel<Embed> embed_kernel = {1, row_items<Embed>, run_rows<Embed, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
