// embed: rows of the embedding table, or of the step's image embeddings where the id is negative.
#include "kernels.h"
#include "weight.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

// Row n of an int8 table, whose codes lie four in-features of each row of a panel together.
void read_codes(const Weight& w, int64_t n, float* out) {
    const int64_t panel = n / kPanelRows, lane = n % kPanelRows;
    const int8_t* codes =
        static_cast<const int8_t*>(w.values) + (panel * w.groups * w.group * kPanelRows + lane * 4);
    const float scale = static_cast<const float*>(w.scales)[n];
    for (int64_t k = 0; k < w.k; ++k) out[k] = scale * float(codes[k / 4 * kPanelRows * 4 + k % 4]);
}

void one_row(const Embed& a, int64_t row) {
    const int64_t id = a.tokens[row], width = a.table.k;
    float* out = a.out + row * width;
    if (id >= 0 && a.table.kind == Kind::int8) return read_codes(a.table, id, out);
    if (id >= 0) return read_row(a.table, id, out, nullptr);
    std::memcpy(out, a.images + (-1 - id) * width, size_t(width) * sizeof(float));
}

}  // namespace

const Kernel<Embed> embed_kernel = {1, row_items<Embed>, run_rows<Embed, one_row>};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
