// A plan: graphs of kernel calls over one arena, built once and replayed without allocation.
//
// Knows no Python and no instruction set. Whoever builds it owns the arena and the weights, and keeps them
// alive. Everything that a kernel relies on is checked here: sizes when a node is added, counts and indices
// before a replay.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pool.h"
#include "types.h"

namespace edgevl {

enum class Dtype { f32, i32, u8, coded };

struct Buffer {
    uint8_t* data;
    Rows rows;
    int64_t cols;
    Dtype dtype;
    int64_t group;  // coded: columns that share a scale; else 0
};

// Where the arena's parts are, in bytes.
struct Arena {
    uint8_t* data;
    int64_t bytes;
    int64_t shared_offset;  // scratch of all threads, up to thread_offset
    int64_t thread_offset;
    int64_t thread_bytes;
};

// The KV cache: layer i's keys at offset + 2·i·layer_bytes, its values layer_bytes later.
struct CacheShape {
    int64_t offset, layer_bytes, layers;
    int64_t slots, groups, context, size, heads;
    Kind kind;  // f32, f16 or int8
};

class Plan {
  public:
    // `limits`: the largest count of each symbol. Throws std::invalid_argument, like all of the building
    // below.
    Plan(Arena arena, Counts limits, int threads);

    const char* isa() const { return kernels_.name; }
    int threads() const { return pool_.threads(); }

    int graph();
    // A buffer of dtype `coded` holds activations in int8, in groups of `group` columns; other dtypes have
    // none.
    int buffer(int64_t offset, int symbol, int64_t factor, int64_t cols, Dtype dtype, int64_t group);
    int weight(const Weight& weight);
    void cache(const CacheShape& shape, const double* frequencies, int64_t count);

    // One node each, appended to `graph`. -1 for a buffer or weight stands for none.
    void embed(int graph, int tokens, int images, int table, int out);
    void rms_norm(int graph, int x, int weight, double eps, int out);
    void layer_norm(int graph, int x, int weight, double eps, int out);
    void linear(int graph, int x, int weight, bool gelu, int residual, int out);
    void rope_write(int graph, int qkv, int positions, int slots, int layer, int out);
    void attention(int graph, int q, int positions, int slots, int layer, int out);
    void silu_mul(int graph, int gate_up, int out);
    void gather_rows(int graph, int x, int picked, int out);
    void patches(int graph, int pixels, int64_t side, int64_t patch, const float* mean, const float* std,
                 int out);
    void vision_tokens(int graph, int x, int positions, int prefix, int out);
    void full_attention(int graph, int qkv, int64_t heads, int64_t tokens, bool whole, int out);
    void pixel_shuffle(int graph, int x, int64_t grid, int64_t prefix, int out);

    // Replays a graph. Throws std::invalid_argument for counts or indices out of range, std::runtime_error
    // when another thread is replaying this plan.
    void run(int graph, const Counts& counts);

  private:
    struct Node {
        virtual ~Node() = default;
        virtual int phases() const = 0;
        virtual int64_t items(const Step& step, int phase) const = 0;
        virtual void run(const Step& step, int phase, int64_t item, float* scratch) const = 0;
    };
    template <class Args>
    struct NodeOf;

    // The values that an input of indices may have: low..high-1, each bound a number or a count of the step.
    struct Check {
        const int32_t* data;
        Rows rows;
        int64_t low, high;
        int low_symbol,
            high_symbol;  // -1: the number counts; else low is minus the count and high is the count
        std::string what, rule;
    };
    struct Place {  // positions and slots that rope_write goes to
        Rows rows;
        const int32_t* positions;
        const int32_t* slots;
    };
    struct Graph {
        std::vector<std::unique_ptr<Node>> nodes;
        std::vector<Check> checks;
        std::vector<Place> places;
    };

    template <class Args>
    void add(int graph, const Kernel<Args>& kernel, const Args& args);
    Graph& graph_at(int index);
    const Buffer& buffer_at(int index, Dtype dtype, const char* what, bool may_be_coded = false) const;
    const Weight& weight_at(int index) const;
    const Buffer& output(int index, Rows rows, int64_t cols, bool may_be_coded = false) const;
    // The output of an op that may round it. It finishes `piece` columns at a time, or whole rows (0), and
    // groups must not lie across pieces.
    Activations activations(int index, Rows rows, int64_t cols, int64_t piece) const;
    const Buffer& indices(int index, Rows rows, const char* what) const;
    CacheLayer layer_at(int layer) const;
    void need_thread_scratch(int64_t floats, const char* op) const;
    // Cosines and sines of the step's positions, at the beginning of the shared scratch through a whole
    // replay.
    int64_t turns_bytes() const;
    // What lies behind them belongs to one node at a time.
    uint8_t* shared_scratch(int64_t bytes, const char* op) const;
    void add_check(Graph& graph, Check check);
    void add_places(Graph& graph, Rows rows, const int32_t* positions, const int32_t* slots);
    void check(Graph& graph, const Counts& counts);
    void check_places(const Place& place, const Counts& counts);
    bool work(const Graph& graph, const Step& step, int thread);

    const Arena arena_;
    const Counts limits_;
    const KernelTable kernels_;
    std::vector<Buffer> buffers_;
    std::vector<Weight> weights_;
    CacheShape cache_ = {};
    std::vector<double> frequencies_;
    std::vector<uint32_t> written_;  // by slot and position: the replay that last wrote there
    uint32_t replay_ = 0;
    std::vector<std::unique_ptr<Graph>> graphs_;
    std::atomic<bool> busy_{false};
    Pool pool_;
};

}  // namespace edgevl
