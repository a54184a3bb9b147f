// full_attention: every token of a tile attends to all tokens of that tile, in f32 or in whole numbers.
#include "coded_rows.h"
#include "exact_blocks.h"
#include "whole_blocks.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

// One item is up to kQueryRows queries of one head of one tile.
int64_t items(const FullAttention& a, const Step& step, int) {
    return rows_of(a.rows, step.counts) / a.tokens * a.heads * blocks(a.tokens, kQueryRows);
}

template <class Blocks>
void run_as(const FullAttention& a, int64_t tokens, int64_t item, float* scratch) {
    const int64_t cuts = blocks(a.tokens, kQueryRows), width = a.heads * a.size;
    const int64_t first = item % cuts * kQueryRows, rows = smaller(kQueryRows, a.tokens - first);
    const int64_t head = item / cuts % a.heads, tile = item / cuts / a.heads;
    const float* base = a.qkv + tile * a.tokens * 3 * width + head * a.size;
    const Source keys = {base + width, Kind::f32, 3 * width, nullptr},
                 values = {base + 2 * width, Kind::f32, 3 * width, nullptr};
    const Flash f = make_flash(scratch, a.size, kQueryRows);
    start_rows(f, rows);
    for (int64_t r = 0; r < rows; ++r) {
        Blocks::query(f, r, base + (first + r) * 3 * width);
        f.ends[r] = int32_t(a.tokens);
    }
    for (int64_t key = 0; key < a.tokens; key += kKeys) {
        const int64_t count = smaller(kKeys, a.tokens - key);
        Blocks::load_keys(f, keys, key, count);
        Blocks::load_values(f, values, key, count);
        Blocks::absorb(f, rows, key, count);
    }
    for (int64_t r = 0; r < rows; ++r) {
        put(a.out, tokens, tile * a.tokens + first + r, head * a.size, a.size, f.out + r * f.padded,
            [&](float* out) { get_output(f, r, out); });
    }
}

void run(const FullAttention& a, const Step& step, int, int64_t item, float* scratch) {
    const int64_t tokens = rows_of(a.rows, step.counts);
    if (a.whole) {
        run_as<WholeBlocks>(a, tokens, item, scratch);
    } else {
        run_as<ExactBlocks>(a, tokens, item, scratch);
    }
}

}  // namespace

const Kernel<FullAttention> full_attention_kernel = {1, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
