// What a kernel call is made of. Plain data, shared by the plan and the kernels of every instruction set.
// Functions here are `static inline`: a header that several instruction sets compile must not leave the
// linker a choice between their versions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgevl {

// Sizes that edgevl/memory.py knows too; Plan refuses less scratch than they ask for.
constexpr int64_t kGemvRows = 7;      // most rows of a linear that go the matrix-vector way
constexpr int64_t kPanelDepth = 256;  // in-features of a dequantized weight panel
constexpr int64_t kPanelWidth = 32;   // out-features of a dequantized weight panel
constexpr int64_t kTileRows = 12;     // most rows of a register tile, over all instruction sets
constexpr int64_t kInt8Group = 64;    // activations that are rounded by one scale for an int8 weight
constexpr int64_t kPanelRows = 16;    // out-features of a panel of codes, in every layout and instruction set
constexpr int64_t kQueryRows = 192;   // query rows of one attention block
constexpr int64_t kKeys = 64;         // keys of one attention block
constexpr int64_t kKeyLanes = 16;     // keys that lie together in the KV cache
constexpr int64_t kDecodeTokens = 8;  // steps up to this many tokens take the decode path of attention
constexpr int64_t kSplitItems = 32;   // most partial results of a token's split attention, per query head
constexpr int64_t kSplitKeys = 256;   // fewest keys of one split

enum class Kind : int { f32, f16, int8, int4 };

enum Symbol : int { kTokens, kLogits, kImages, kTiles, kSymbols };

// How many of each symbol this step has.
struct Counts {
    int64_t value[kSymbols];
};

struct Rows {
    int symbol;
    int64_t factor;
};

static inline int64_t rows_of(Rows rows, const Counts& counts) {
    return counts.value[rows.symbol] * rows.factor;
}

// A weight as edgevl/layouts.py stores it: layout "panels". R is kPanelRows.
struct Weight {
    Kind kind;
    int64_t n, k;          // out-features (rows), in-features
    int64_t group;         // in-features that a scale of int4 holds for; kInt8Group
    const void* values;    // f32, f16: (N, K); codes of int8: (N/R, K'/4, R, 4), of int4: (N/R, K/8, R, 4)
    const void* scales;    // int8: (N/R, R) f32; int4: (N/R, K/Q, R) f16
    const uint8_t* zeros;  // int4: (N/R, K/Q, R)
    const float* bias;     // (N,) or null
    int64_t groups;        // of int4 and int8; set by Plan. K' is groups · group
};

// Blocks of keys of one slot and KV head.
static inline int64_t key_blocks(int64_t context) { return (context + kKeyLanes - 1) / kKeyLanes; }

// Keys of each part of a split decode attention. The plan's context alone decides, so that a token's result
// does not depend on how many others are in the step.
static inline int64_t split_keys(int64_t context) {
    const int64_t fair = (context + kSplitItems * kKeys - 1) / (kSplitItems * kKeys) * kKeys;
    return fair > kSplitKeys ? fair : kSplitKeys;
}

// The most parts of a token.
static inline int64_t split_parts(int64_t context) {
    return (context + split_keys(context) - 1) / split_keys(context);
}

// Rows of activations: f32 where `group` is 0, else int8 with a scale for each group of columns, as linears
// of int8 and int4 weights read them (kernels/coded_rows.h).
struct Activations {
    uint8_t* data;
    int64_t width, group, groups;
};

// Bytes of a row in int8: codes of whole groups; for each group a scale, a sum and a whole sum. There is room
// for whole tiles of kTileRows of them.
static inline int64_t coded_row_bytes(const Activations& x) {
    return (x.groups * x.group + 12 * x.groups + 63) / 64 * 64;
}

// The keys and values of one layer, f32, f16 or int8. Values: (slots, groups, context, size). Keys lie by
// kKeyLanes, so that scores of neighbouring keys are neighbours in a vector: (slots, groups, key_blocks,
// size, kKeyLanes). An int8 code stands for code · scale, with one scale for each token and group: (slots,
// groups, key_blocks · kKeyLanes), behind the codes; null for other kinds.
struct CacheLayer {
    void* keys;
    void* values;
    float* key_scales;
    float* value_scales;
    Kind kind;
    int64_t slots, groups, context, size, heads;
};

// Scales from number `at` on; null for kinds without.
static inline float* scales_from(float* scales, int64_t at) { return scales ? scales + at : nullptr; }

// Bytes of one number of the cache.
static inline int64_t cache_item(Kind kind) { return kind == Kind::int8 ? 1 : kind == Kind::f16 ? 2 : 4; }

// What is known only when a plan is replayed.
struct Step {
    Counts counts;
    int threads;
};

struct Embed {
    Rows rows;
    const int32_t* tokens;
    const float* images;  // null in a text-only model
    Weight table;
    float* out;
};

struct RmsNorm {
    Rows rows;
    const float* x;
    Weight weight;
    float eps;
    Activations out;
};

struct LayerNorm {
    Rows rows;
    const float* x;
    Weight weight;
    float eps;
    Activations out;
};

struct Linear {
    Rows rows;
    const float* x;  // null where the rows come in int8
    Weight weight;
    bool gelu;
    const float* residual;  // null without
    Activations
        coded;  // int8 and int4: all rows of x in int8; where x is in f32, room for them: shared scratch
    float* out;
};

struct RopeWrite {
    Rows rows;
    const float* qkv;
    const int32_t* positions;
    const int32_t* slots;
    CacheLayer cache;
    const double* frequencies;  // (D/2,)
    double* turns;              // (T, D): cos then sin of each pair; shared scratch
    bool fill;                  // the first layer of a step fills `turns`, the others read it
    float* out;
};

struct Attention {
    Rows rows;
    const float* q;
    const int32_t* positions;
    const int32_t* slots;
    CacheLayer cache;
    float* partial;  // (T·H·splits, 2 + D): maximum, sum, weighted values; shared scratch
    Activations out;
};

struct SiluMul {
    Rows rows;
    const float* gate_up;
    Activations out;  // its width is F
};

struct GatherRows {
    Rows rows;
    const float* x;
    const int32_t* picked;
    int64_t width;
    float* out;
};

struct Patches {
    Rows rows;  // tiles
    const uint8_t* pixels;
    int64_t side, patch;
    float mean[3], std[3];
    float* out;
};

struct VisionTokens {
    Rows rows;  // of the output
    const float* x;
    Weight positions, prefix;
    float* out;
};

struct FullAttention {
    Rows rows;
    const float* qkv;
    int64_t heads, tokens, size;
    bool whole;  // in whole numbers, as the tower's linears then are too
    Activations out;
};

struct PixelShuffle {
    Rows rows;  // of the output
    const float* x;
    int64_t grid, prefix, width;
    float* out;
};

// One op of one instruction set. A phase is a set of items that any thread may take in any order; the next
// phase sees all of them done. `items` depends on the call and the step alone, `run` writes only what its
// item owns.
template <class Args>
struct Kernel {
    int phases;
    int64_t (*items)(const Args&, const Step&, int phase);
    void (*run)(const Args&, const Step&, int phase, int64_t item, float* scratch);
};

// What an instruction set can do at most.
struct Probe {
    // `rounds` of int8 products in registers; gives the operations done. *sink only keeps them from being
    // left out.
    int64_t (*products)(int64_t rounds, int32_t* sink);
    // Reads `count` floats, a multiple of 64; gives their sum.
    float (*read)(const float* p, int64_t count);
};

struct KernelTable {
    const char* name;
    Probe probe;
    Kernel<Embed> embed;
    Kernel<RmsNorm> rms_norm;
    Kernel<LayerNorm> layer_norm;
    Kernel<Linear> linear;
    Kernel<RopeWrite> rope_write;
    Kernel<Attention> attention;
    Kernel<SiluMul> silu_mul;
    Kernel<GatherRows> gather_rows;
    Kernel<Patches> patches;
    Kernel<VisionTokens> vision_tokens;
    Kernel<FullAttention> full_attention;
    Kernel<PixelShuffle> pixel_shuffle;
};

}  // namespace edgevl
