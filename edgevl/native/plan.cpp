#include "plan.h"

#include <stdexcept>

#include "dispatch.h"

namespace edgevl {

namespace {

constexpr int kMostThreads = 1024;
const char* const kSymbolNames[kSymbols] = {"tokens", "rows of logits", "image rows", "tiles"};

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

void require(bool holds, const std::string& sentence) {
    if (!holds) refuse(sentence);
}

std::string text(int64_t number) { return std::to_string(number); }

bool same(Rows a, Rows b) { return a.symbol == b.symbol && a.factor == b.factor; }

Rows times(Rows rows, int64_t by, int64_t over) { return {rows.symbol, rows.factor / over * by}; }

int64_t item_bytes(Dtype dtype) { return dtype == Dtype::u8 ? 1 : 4; }

int64_t padded(int64_t size) { return (size + 31) / 32 * 32; }

int64_t flash_floats(int64_t size, int64_t rows) {
    return rows * (2 * padded(size) + kKeys + 4) + 2 * kKeys * padded(size);
}

template <class T>
T* as(const Buffer& buffer) {
    return reinterpret_cast<T*>(buffer.data);
}

Activations in_groups(uint8_t* data, int64_t width, int64_t group) {
    return {data, width, group, group > 0 ? (width + group - 1) / group : 0};
}

int64_t whole_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

}  // namespace

template <class Args>
struct Plan::NodeOf final : Plan::Node {
    NodeOf(const Kernel<Args>& kernel, const Args& args) : kernel_(kernel), args_(args) {}
    int phases() const override { return kernel_.phases; }
    int64_t items(const Step& step, int phase) const override { return kernel_.items(args_, step, phase); }
    void run(const Step& step, int phase, int64_t item, float* scratch) const override {
        kernel_.run(args_, step, phase, item, scratch);
    }

    const Kernel<Args> kernel_;
    const Args args_;
};

static int checked_threads(int threads) {
    require(threads >= 1 && threads <= kMostThreads,
            "a pool of " + text(threads) + " threads is not possible; choose 1 to " + text(kMostThreads));
    return threads;
}

Plan::Plan(Arena arena, Counts limits, int threads)
    : arena_(arena), limits_(limits), kernels_(choose_kernels()), pool_(checked_threads(threads)) {
    for (int s = 0; s < kSymbols; ++s) {
        require(limits.value[s] >= 0 && limits.value[s] < (int64_t(1) << 31),
                "a limit of " + text(limits.value[s]) + " " + kSymbolNames[s] + " is not possible");
    }
    require(arena.shared_offset >= 0 && arena.thread_offset >= arena.shared_offset &&
                arena.thread_bytes >= 0 &&
                arena.thread_offset + int64_t(threads) * arena.thread_bytes <= arena.bytes,
            "the scratch of " + text(threads) + " threads lies outside the arena of " + text(arena.bytes) +
                " bytes");
    require(reinterpret_cast<uintptr_t>(arena.data) % 64 == 0 && arena.shared_offset % 64 == 0 &&
                arena.thread_offset % 64 == 0 && arena.thread_bytes % 64 == 0,
            "the arena and its parts must be aligned to 64 bytes");
}

// -- what nodes refer to
// ----------------------------------------------------------------------------------------------

int Plan::graph() {
    graphs_.push_back(std::make_unique<Graph>());
    return int(graphs_.size()) - 1;
}

int Plan::buffer(int64_t offset, int symbol, int64_t factor, int64_t cols, Dtype dtype, int64_t group) {
    require(symbol >= 0 && symbol < kSymbols, "row symbol " + text(symbol) + " does not exist");
    require(factor > 0 && factor < (int64_t(1) << 31) && cols > 0 && cols < (int64_t(1) << 31),
            "a buffer needs rows and columns");
    require((dtype == Dtype::coded) == (group > 0) && group % 32 == 0 && group < (int64_t(1) << 31),
            "activations in int8 have groups of a multiple of 32 columns, other buffers none");
    const int64_t rows = limits_.value[symbol] * factor;
    require(offset >= 0 && offset % 64 == 0 && offset <= arena_.bytes &&
                (group > 0 ? whole_tiles(rows) <=
                                 (arena_.bytes - offset) / coded_row_bytes(in_groups(nullptr, cols, group))
                           : rows <= (arena_.bytes - offset) / (cols * item_bytes(dtype))),
            "a buffer of " + text(rows) + " rows of " + text(cols) + " at byte " + text(offset) +
                " does not fit the arena of " + text(arena_.bytes) + " bytes");
    buffers_.push_back({arena_.data + offset, {symbol, factor}, cols, dtype, group});
    return int(buffers_.size()) - 1;
}

int Plan::weight(const Weight& weight) {
    require(weight.n > 0 && weight.k > 0, "a weight needs rows and columns");
    weights_.push_back(weight);
    weights_.back().groups = weight.group > 0 ? (weight.k + weight.group - 1) / weight.group : 0;
    return int(weights_.size()) - 1;
}

void Plan::cache(const CacheShape& c, const double* frequencies, int64_t count) {
    require(cache_.layers == 0, "a plan has one KV cache");
    require(c.layers > 0 && c.slots > 0 && c.groups > 0 && c.context > 0 && c.size > 0 && c.heads > 0,
            "a KV cache needs layers, slots, groups, context, head size and heads above zero");
    require(c.size % 2 == 0 && c.heads % c.groups == 0,
            "heads must share KV heads evenly and have an even size");
    require(count == c.size / 2,
            "a head of " + text(c.size) + " needs " + text(c.size / 2) + " frequencies, not " + text(count));
    require(c.kind != Kind::int4, "a KV cache is f32, f16 or int8");
    const int64_t rows = c.slots * c.groups * key_blocks(c.context) * kKeyLanes;
    const int64_t bytes = rows * (c.size * cache_item(c.kind) + (c.kind == Kind::int8 ? 4 : 0));
    require(c.layer_bytes >= bytes && c.layer_bytes % 64 == 0 && c.offset % 64 == 0 && c.offset >= 0 &&
                c.offset + 2 * c.layers * c.layer_bytes <= arena_.bytes,
            "the KV cache does not fit its place in the arena");
    cache_ = c;
    frequencies_.assign(frequencies, frequencies + count);
    written_.assign(size_t(c.slots * c.context), 0);
}

Plan::Graph& Plan::graph_at(int index) {
    require(index >= 0 && size_t(index) < graphs_.size(), "graph " + text(index) + " does not exist");
    return *graphs_[size_t(index)];
}

const Buffer& Plan::buffer_at(int index, Dtype dtype, const char* what, bool may_be_coded) const {
    require(index >= 0 && size_t(index) < buffers_.size(), std::string(what) + " is no buffer of this plan");
    const Dtype found = buffers_[size_t(index)].dtype;
    require(found == dtype || (may_be_coded && found == Dtype::coded),
            std::string(what) + " has another dtype than the op takes");
    return buffers_[size_t(index)];
}

const Weight& Plan::weight_at(int index) const {
    require(index >= 0 && size_t(index) < weights_.size(), "weight " + text(index) + " does not exist");
    return weights_[size_t(index)];
}

const Buffer& Plan::output(int index, Rows rows, int64_t cols, bool may_be_coded) const {
    const Buffer& out = buffer_at(index, Dtype::f32, "the output", may_be_coded);
    require(same(out.rows, rows) && out.cols == cols, "an output of " + text(out.cols) +
                                                          " columns should have " + text(cols) +
                                                          ", or its rows differ from the op's");
    return out;
}

Activations Plan::activations(int index, Rows rows, int64_t cols, int64_t piece) const {
    const Buffer& out = output(index, rows, cols, true);
    require(out.group == 0 || piece == 0 || piece % out.group == 0,
            "an op that finishes " + text(piece) + " columns at a time cannot round groups of " +
                text(out.group));
    return in_groups(out.data, cols, out.group);
}

const Buffer& Plan::indices(int index, Rows rows, const char* what) const {
    const Buffer& buffer = buffer_at(index, Dtype::i32, what);
    require(buffer.cols == 1 && same(buffer.rows, rows),
            std::string(what) + " must be one number for each row");
    return buffer;
}

CacheLayer Plan::layer_at(int layer) const {
    require(layer >= 0 && layer < cache_.layers,
            "layer " + text(layer) + " has no KV cache; there are " + text(cache_.layers) + " layers");
    uint8_t* keys = arena_.data + cache_.offset + 2 * layer * cache_.layer_bytes;
    uint8_t* values = keys + cache_.layer_bytes;
    const int64_t codes = cache_.slots * cache_.groups * key_blocks(cache_.context) * kKeyLanes * cache_.size;
    float* key_scales = nullptr;
    float* value_scales = nullptr;
    if (cache_.kind == Kind::int8) {
        key_scales = reinterpret_cast<float*>(keys + codes);
        value_scales = reinterpret_cast<float*>(values + codes);
    }
    return {keys,         values,        key_scales,     value_scales, cache_.kind,
            cache_.slots, cache_.groups, cache_.context, cache_.size,  cache_.heads};
}

void Plan::need_thread_scratch(int64_t floats, const char* op) const {
    require(floats * 4 <= arena_.thread_bytes, std::string(op) + " needs " + text(floats * 4) +
                                                   " bytes of scratch a thread; the arena has " +
                                                   text(arena_.thread_bytes));
}

int64_t Plan::turns_bytes() const {
    return cache_.layers == 0 ? 0 : (limits_.value[kTokens] * cache_.size * 8 + 63) / 64 * 64;
}

uint8_t* Plan::shared_scratch(int64_t bytes, const char* op) const {
    const int64_t start = arena_.shared_offset + turns_bytes();
    require(start + bytes <= arena_.thread_offset, std::string(op) + " needs more shared scratch");
    return arena_.data + start;
}

template <class Args>
void Plan::add(int graph, const Kernel<Args>& kernel, const Args& args) {
    graph_at(graph).nodes.push_back(std::make_unique<NodeOf<Args>>(kernel, args));
}

// -- nodes
// ------------------------------------------------------------------------------------------------------------

void Plan::embed(int graph, int tokens, int images, int table, int out) {
    const Weight& w = weight_at(table);
    require(w.kind != Kind::int4, "an embedding table is f32, f16 or int8");
    const Rows rows = buffer_at(tokens, Dtype::i32, "tokens").rows;
    const int32_t* ids = as<int32_t>(indices(tokens, rows, "tokens"));
    const float* pictures = nullptr;
    Check check = {ids, rows, 0, w.n, -1, -1, "token id", "the vocabulary of " + text(w.n) + " rows"};
    if (images >= 0) {
        const Buffer& b = buffer_at(images, Dtype::f32, "images");
        require(b.cols == w.k && b.rows.factor == 1, "images must have the columns of the embedding table");
        pictures = as<float>(b);
        check.low_symbol = b.rows.symbol;
        check.rule += " and the step's image rows";
    }
    add(graph, kernels_.embed, Embed{rows, ids, pictures, w, as<float>(output(out, rows, w.k))});
    add_check(graph_at(graph), check);
}

void Plan::rms_norm(int graph, int x, int weight, double eps, int out) {
    const Buffer& in = buffer_at(x, Dtype::f32, "x");
    const Weight& w = weight_at(weight);
    require(w.k == 1 && w.n == in.cols && (w.kind == Kind::f32 || w.kind == Kind::f16),
            "a norm over " + text(in.cols) + " columns needs as many f32 or f16 weights");
    need_thread_scratch(in.cols, "rms_norm");
    const Activations y = activations(out, in.rows, in.cols, 0);
    add(graph, kernels_.rms_norm, RmsNorm{in.rows, as<float>(in), w, float(eps), y});
}

void Plan::layer_norm(int graph, int x, int weight, double eps, int out) {
    const Buffer& in = buffer_at(x, Dtype::f32, "x");
    const Weight& w = weight_at(weight);
    require(w.k == 1 && w.n == in.cols && (w.kind == Kind::f32 || w.kind == Kind::f16),
            "a norm over " + text(in.cols) + " columns needs as many f32 or f16 weights");
    require(w.bias != nullptr, "a layer norm needs a bias");
    need_thread_scratch(in.cols, "layer_norm");
    const Activations y = activations(out, in.rows, in.cols, 0);
    add(graph, kernels_.layer_norm, LayerNorm{in.rows, as<float>(in), w, float(eps), y});
}

void Plan::linear(int graph, int x, int weight, bool gelu, int residual, int out) {
    const Buffer& in = buffer_at(x, Dtype::f32, "x", true);
    const Weight& w = weight_at(weight);
    require(in.group == 0 || in.group == w.group,
            "a linear cannot take activations in int8 in other groups than its weight's");
    require(w.k == in.cols,
            "a linear of " + text(w.k) + " in-features cannot take " + text(in.cols) + " columns");
    const Buffer& y = output(out, in.rows, w.n);
    const float* added = nullptr;
    if (residual >= 0) {
        const Buffer& r = buffer_at(residual, Dtype::f32, "the residual");
        require(same(r.rows, y.rows) && r.cols == y.cols, "a residual has the shape of the output");
        added = as<float>(r);
    }
    require(y.data != in.data && as<float>(y) != added, "the output of a linear cannot lie on its input");
    need_thread_scratch(kPanelDepth * kPanelWidth + kTileRows * kPanelWidth, "linear");
    Activations coded = in_groups(in.data, w.k, w.group);
    if (w.group > 0 && in.group == 0) {
        const int64_t row = coded_row_bytes(coded), rows = limits_.value[in.rows.symbol] * in.rows.factor;
        need_thread_scratch(whole_tiles(kGemvRows) * row / 4, "linear");
        coded.data = shared_scratch(whole_tiles(rows) * row, "linear");
    }
    const float* plain = in.group == 0 ? as<float>(in) : nullptr;
    add(graph, kernels_.linear, Linear{in.rows, plain, w, gelu, added, coded, as<float>(y)});
}

void Plan::rope_write(int graph, int qkv, int positions, int slots, int layer, int out) {
    const CacheLayer c = layer_at(layer);
    const Buffer& in = buffer_at(qkv, Dtype::f32, "qkv");
    require(in.cols == (c.heads + 2 * c.groups) * c.size, "qkv must have (H + 2G)·D columns");
    const int32_t* p = as<int32_t>(indices(positions, in.rows, "positions"));
    const int32_t* s = as<int32_t>(indices(slots, in.rows, "slots"));
    require(limits_.value[in.rows.symbol] * in.rows.factor * c.size * 8 <= turns_bytes(),
            "rope_write works on the step's tokens");
    shared_scratch(0, "rope_write");
    need_thread_scratch(c.size, "rope_write");
    Graph& g = graph_at(graph);
    // the first layer computes the turns of the step; another set of positions computes its own
    const bool fill = g.places.empty() || g.places.back().positions != p;
    add(graph, kernels_.rope_write,
        RopeWrite{in.rows, as<float>(in), p, s, c, frequencies_.data(),
                  reinterpret_cast<double*>(arena_.data + arena_.shared_offset), fill,
                  as<float>(output(out, in.rows, c.heads * c.size))});
    if (fill) g.places.push_back({in.rows, p, s});
    add_places(g, in.rows, p, s);
}

void Plan::attention(int graph, int q, int positions, int slots, int layer, int out) {
    const CacheLayer c = layer_at(layer);
    const Buffer& in = buffer_at(q, Dtype::f32, "q");
    require(in.cols == c.heads * c.size, "q must have H·D columns");
    const int32_t* p = as<int32_t>(indices(positions, in.rows, "positions"));
    const int32_t* s = as<int32_t>(indices(slots, in.rows, "slots"));
    const int64_t partials = kDecodeTokens * split_parts(c.context);
    uint8_t* partial = shared_scratch(partials * c.heads * (c.size + 2) * 4, "attention");
    const int64_t share = c.heads / c.groups;
    need_thread_scratch(flash_floats(c.size, share > kQueryRows ? share : kQueryRows), "attention");
    add(graph, kernels_.attention,
        Attention{in.rows, as<float>(in), p, s, c, reinterpret_cast<float*>(partial),
                  activations(out, in.rows, in.cols, c.size)});
    add_places(graph_at(graph), in.rows, p, s);
}

void Plan::silu_mul(int graph, int gate_up, int out) {
    const Buffer& in = buffer_at(gate_up, Dtype::f32, "gate_up");
    require(in.cols % 2 == 0, "gate_up needs an even number of columns");
    need_thread_scratch(in.cols / 2, "silu_mul");
    const Activations y = activations(out, in.rows, in.cols / 2, 0);
    add(graph, kernels_.silu_mul, SiluMul{in.rows, as<float>(in), y});
}

void Plan::gather_rows(int graph, int x, int picked, int out) {
    const Buffer& in = buffer_at(x, Dtype::f32, "x");
    const Rows rows = buffer_at(picked, Dtype::i32, "rows").rows;
    const int32_t* from = as<int32_t>(indices(picked, rows, "rows"));
    require(in.rows.factor == 1, "rows can be gathered only where a symbol counts single rows");
    add(graph, kernels_.gather_rows,
        GatherRows{rows, as<float>(in), from, in.cols, as<float>(output(out, rows, in.cols))});
    add_check(graph_at(graph), {from, rows, 0, 0, -1, in.rows.symbol, "row", "the tokens of the step"});
}

void Plan::patches(int graph, int pixels, int64_t side, int64_t patch, const float* mean, const float* std,
                   int out) {
    const Buffer& in = buffer_at(pixels, Dtype::u8, "pixels");
    require(side > 0 && patch > 0 && side % patch == 0 && in.cols == 3 * side * side,
            "pixels of side " + text(side) + " cannot be cut into patches of " + text(patch));
    const Rows rows = times(in.rows, (side / patch) * (side / patch), 1);
    Patches args = {in.rows, in.data, side, patch, {}, {}, as<float>(output(out, rows, 3 * patch * patch))};
    for (int i = 0; i < 3; ++i) {
        require(std[i] != 0.0f, "a standard deviation of zero cannot normalise pixels");
        args.mean[i] = mean[i];
        args.std[i] = std[i];
    }
    add(graph, kernels_.patches, args);
}

void Plan::vision_tokens(int graph, int x, int positions, int prefix, int out) {
    const Buffer& in = buffer_at(x, Dtype::f32, "x");
    const Weight &p = weight_at(positions), &r = weight_at(prefix);
    require(p.group == 0 && r.group == 0, "the tables of vision tokens are f32 or f16");
    require(p.k == in.cols && r.k == in.cols && in.rows.factor % p.n == 0,
            "tables and patches differ in shape");
    const Rows rows = times(in.rows, p.n + r.n, p.n);
    add(graph, kernels_.vision_tokens,
        VisionTokens{rows, as<float>(in), p, r, as<float>(output(out, rows, in.cols))});
}

void Plan::full_attention(int graph, int qkv, int64_t heads, int64_t tokens, bool whole, int out) {
    const Buffer& in = buffer_at(qkv, Dtype::f32, "qkv");
    require(heads > 0 && tokens > 0 && in.cols % (3 * heads) == 0 && in.rows.factor % tokens == 0,
            "qkv of " + text(in.cols) + " columns cannot be split into 3 times " + text(heads) +
                " heads, or its rows into tiles of " + text(tokens) + " tokens");
    const int64_t size = in.cols / (3 * heads);
    need_thread_scratch(flash_floats(size, kQueryRows), "full_attention");
    add(graph, kernels_.full_attention,
        FullAttention{in.rows, as<float>(in), heads, tokens, size, whole,
                      activations(out, in.rows, heads * size, size)});
}

void Plan::pixel_shuffle(int graph, int x, int64_t grid, int64_t prefix, int out) {
    const Buffer& in = buffer_at(x, Dtype::f32, "x");
    require(grid > 0 && grid % 2 == 0 && prefix >= 0 && in.rows.factor % (prefix + grid * grid) == 0,
            "a grid of " + text(grid) + " cannot be shuffled, or the rows are no whole tiles");
    const Rows rows = times(in.rows, grid * grid / 4, prefix + grid * grid);
    add(graph, kernels_.pixel_shuffle,
        PixelShuffle{rows, as<float>(in), grid, prefix, in.cols, as<float>(output(out, rows, 4 * in.cols))});
}

// -- replay
// -----------------------------------------------------------------------------------------------------------

void Plan::add_check(Graph& graph, Check check) {
    for (const Check& known : graph.checks) {
        if (known.data == check.data && known.what == check.what && known.low == check.low &&
            known.high == check.high) {
            return;
        }
    }
    graph.checks.push_back(std::move(check));
}

void Plan::add_places(Graph& graph, Rows rows, const int32_t* positions, const int32_t* slots) {
    add_check(graph, {positions, rows, 0, cache_.context, -1, -1, "position",
                      "the context of " + text(cache_.context) + " tokens"});
    add_check(graph, {slots, rows, 0, cache_.slots, -1, -1, "slot",
                      "the " + text(cache_.slots) + " slots of the plan"});
}

void Plan::check(Graph& graph, const Counts& counts) {
    for (int s = 0; s < kSymbols; ++s) {
        require(counts.value[s] >= 0 && counts.value[s] <= limits_.value[s],
                "a step of " + text(counts.value[s]) + " " + kSymbolNames[s] +
                    " is over the plan's limit of " + text(limits_.value[s]));
    }
    for (const Check& c : graph.checks) {
        const int64_t low = c.low_symbol < 0 ? c.low : -counts.value[c.low_symbol];
        const int64_t high = c.high_symbol < 0 ? c.high : counts.value[c.high_symbol];
        const int64_t count = rows_of(c.rows, counts);
        for (int64_t i = 0; i < count; ++i) {
            if (c.data[i] >= low && c.data[i] < high) continue;
            refuse(c.what + " " + text(c.data[i]) + " at place " + text(i) + " of the step is outside " +
                   c.rule + "; it must be " + text(low) + " to " + text(high - 1));
        }
    }
    for (const Place& place : graph.places) check_places(place, counts);
}

// Two tokens of a step that write the same place of the cache would race.
void Plan::check_places(const Place& place, const Counts& counts) {
    if (++replay_ == 0) {
        written_.assign(written_.size(), 0);
        replay_ = 1;
    }
    const int64_t count = rows_of(place.rows, counts);
    for (int64_t i = 0; i < count; ++i) {
        uint32_t& mark = written_[size_t(place.slots[i] * cache_.context + place.positions[i])];
        require(mark != replay_, "two tokens of the step have position " + text(place.positions[i]) +
                                     " of slot " + text(place.slots[i]) +
                                     "; each token needs a place of its own");
        mark = replay_;
    }
}

bool Plan::work(const Graph& graph, const Step& step, int thread) {
    uint8_t* place = arena_.data + arena_.thread_offset + thread * arena_.thread_bytes;
    float* scratch = reinterpret_cast<float*>(place);
    uint32_t number = 0;
    for (const std::unique_ptr<Node>& node : graph.nodes) {
        for (int phase = 0; phase < node->phases(); ++phase) {
            const int64_t items = node->items(step, phase);
            if (items == 0) continue;
            const auto run = [&](int64_t item) { node->run(step, phase, item, scratch); };
            if (!pool_.phase(thread, number++, items, run)) return false;
        }
    }
    return true;
}

void Plan::run(int index, const Counts& counts) {
    Graph& graph = graph_at(index);
    if (busy_.exchange(true)) throw std::runtime_error("this plan is being replayed by another thread");
    struct Release {
        std::atomic<bool>& busy;
        ~Release() { busy = false; }
    } release{busy_};
    check(graph, counts);
    struct Context {
        Plan* plan;
        const Graph* graph;
        Step step;
    } context{this, &graph, {counts, pool_.threads()}};
    pool_.run(
        [](void* opaque, int thread) {
            const Context& c = *static_cast<Context*>(opaque);
            return c.plan->work(*c.graph, c.step, thread);
        },
        &context);
}

}  // namespace edgevl
