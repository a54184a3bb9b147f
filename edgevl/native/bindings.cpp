// The Python face of a plan: `edgevl._native`. Checks shapes and dtypes of arrays and keeps them alive;
// called by edgevl/backends/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "plan.h"

namespace nb = nanobind;

namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

bool is_bytes(const Array& array) {
    return array.dtype().code == uint8_t(nb::dlpack::dtype_code::UInt) && array.dtype().bits == 8;
}

bool is_float(const Array& array, int bits) {
    return array.dtype().code == uint8_t(nb::dlpack::dtype_code::Float) && array.dtype().bits == bits;
}

void require(bool holds, const std::string& sentence) {
    if (!holds) throw std::invalid_argument(sentence);
}

// A plan and the arrays that it points into.
class PyPlan {
  public:
    PyPlan(Bytes arena, std::array<int64_t, 4> limits, int threads, int64_t shared_offset,
           int64_t thread_offset, int64_t thread_bytes)
        : arena_(arena),
          plan_({arena.data(), int64_t(arena.size()), shared_offset, thread_offset, thread_bytes},
                counts(limits), threads) {}

    edgevl::Plan& plan() { return plan_; }

    static edgevl::Counts counts(const std::array<int64_t, 4>& values) {
        return {{values[0], values[1], values[2], values[3]}};
    }

    int float_weight(const Array& values, nb::object bias) {
        const bool half = is_float(values, 16);
        require(half || is_float(values, 32), "a float weight is f32 or f16");
        require(values.ndim() == 1 || values.ndim() == 2, "a weight has one or two dimensions");
        const int64_t n = int64_t(values.shape(0)), k = values.ndim() == 2 ? int64_t(values.shape(1)) : 1;
        keep(values);
        return add({half ? edgevl::Kind::f16 : edgevl::Kind::f32, n, k, 0, values.data(), nullptr, nullptr,
                    nullptr, 0},
                   bias);
    }

    int int8_weight(int64_t n, int64_t k, const Array& codes, const Array& scales, nb::object bias) {
        constexpr int64_t lanes = edgevl::kPanelRows, group = edgevl::kInt8Group;
        const int64_t panels = (n + lanes - 1) / lanes, deep = (k + group - 1) / group * group;
        require(codes.dtype().code == uint8_t(nb::dlpack::dtype_code::Int) && codes.dtype().bits == 8 &&
                    codes.ndim() == 4 && int64_t(codes.shape(0)) == panels &&
                    4 * int64_t(codes.shape(1)) == deep && int64_t(codes.shape(2)) == lanes &&
                    codes.shape(3) == 4,
                "the codes of an int8 weight are i8, (N/16, K/4, 16, 4), K in whole groups of 64");
        require(is_float(scales, 32) && scales.ndim() == 2 && int64_t(scales.shape(0)) == panels &&
                    int64_t(scales.shape(1)) == lanes,
                "the scales of an int8 weight are f32, (N/16, 16)");
        keep(codes);
        keep(scales);
        return add({edgevl::Kind::int8, n, k, group, codes.data(), scales.data(), nullptr, nullptr, 0}, bias);
    }

    int int4_weight(int64_t n, const Array& codes, const Array& scales, const Array& zeros, nb::object bias) {
        constexpr int64_t lanes = edgevl::kPanelRows;
        const int64_t panels = (n + lanes - 1) / lanes;
        require(is_bytes(codes) && codes.ndim() == 4 && int64_t(codes.shape(0)) == panels &&
                    int64_t(codes.shape(2)) == lanes && codes.shape(3) == 4,
                "the codes of an int4 weight are u8, (N/16, K/8, 16, 4)");
        const int64_t k = 8 * int64_t(codes.shape(1));
        require(is_float(scales, 16) && scales.ndim() == 3 && int64_t(scales.shape(0)) == panels &&
                    int64_t(scales.shape(2)) == lanes,
                "the scales of an int4 weight are f16, (N/16, K/Q, 16)");
        const int64_t groups = int64_t(scales.shape(1));
        require(groups > 0 && k % groups == 0 && k / groups % 32 == 0,
                "the groups of an int4 weight are multiples of 32 in-features");
        require(is_bytes(zeros) && zeros.ndim() == 3 && int64_t(zeros.shape(0)) == panels &&
                    int64_t(zeros.shape(1)) == groups && int64_t(zeros.shape(2)) == lanes,
                "the zeros of an int4 weight are u8, (N/16, K/Q, 16)");
        keep(codes);
        keep(scales);
        keep(zeros);
        return add({edgevl::Kind::int4, n, k, k / groups, codes.data(), scales.data(),
                    static_cast<const uint8_t*>(zeros.data()), nullptr, 0},
                   bias);
    }

  private:
    int add(edgevl::Weight weight, nb::object bias) {
        if (!bias.is_none()) {
            const Floats values = nb::cast<Floats>(bias, false);
            require(int64_t(values.shape(0)) == weight.n, "a bias has one value a row of its weight");
            weight.bias = values.data();
            keep(Array(values));
        }
        return plan_.weight(weight);
    }

    void keep(const Array& array) { kept_.push_back(array); }

    Bytes arena_;
    std::vector<Array> kept_;
    edgevl::Plan plan_;
};

edgevl::Dtype dtype(const std::string& name) {
    if (name == "f32") return edgevl::Dtype::f32;
    if (name == "i32") return edgevl::Dtype::i32;
    if (name == "coded") return edgevl::Dtype::coded;
    require(name == "u8", "the dtype " + name + " does not exist; a buffer is f32, i32, u8 or coded");
    return edgevl::Dtype::u8;
}

edgevl::Kind cache_kind(const std::string& name) {
    if (name == "f32") return edgevl::Kind::f32;
    if (name == "f16") return edgevl::Kind::f16;
    require(name == "int8", "a KV cache of " + name + " does not exist; it is f32, f16 or int8");
    return edgevl::Kind::int8;
}

}  // namespace

NB_MODULE(_native, m) {
    using namespace nb::literals;
    m.doc() = "The C++ CPU backend of edgevl.";
    m.def("isa", [] { return std::string(edgevl::choose_kernels().name); });
    m.def(
        "int8_products",
        [](int64_t rounds) {
            const edgevl::Probe probe = edgevl::choose_kernels().probe;
            nb::gil_scoped_release release;
            int32_t sink = 0;
            return probe.products(rounds, &sink);
        },
        "rounds"_a);
    m.def(
        "read_memory",
        [](const Floats& values) {
            require(values.shape(0) % 64 == 0, "memory is read in pieces of 64 floats");
            const edgevl::Probe probe = edgevl::choose_kernels().probe;
            nb::gil_scoped_release release;
            return probe.read(values.data(), int64_t(values.shape(0)));
        },
        "values"_a.noconvert());
    nb::class_<PyPlan>(m, "Plan")
        .def(nb::init<Bytes, std::array<int64_t, 4>, int, int64_t, int64_t, int64_t>(), "arena"_a.noconvert(),
             "limits"_a, "threads"_a, "shared_offset"_a, "thread_offset"_a, "thread_bytes"_a)
        .def_prop_ro("isa", [](PyPlan& p) { return p.plan().isa(); })
        .def_prop_ro("threads", [](PyPlan& p) { return p.plan().threads(); })
        .def("graph", [](PyPlan& p) { return p.plan().graph(); })
        .def(
            "buffer",
            [](PyPlan& p, int64_t offset, int symbol, int64_t factor, int64_t cols, const std::string& type,
               int64_t group) { return p.plan().buffer(offset, symbol, factor, cols, dtype(type), group); },
            "offset"_a, "symbol"_a, "factor"_a, "cols"_a, "dtype"_a, "group"_a)
        .def("float_weight", &PyPlan::float_weight, "values"_a.noconvert(), "bias"_a.none())
        .def("int8_weight", &PyPlan::int8_weight, "n"_a, "k"_a, "codes"_a.noconvert(), "scales"_a.noconvert(),
             "bias"_a.none())
        .def("int4_weight", &PyPlan::int4_weight, "n"_a, "codes"_a.noconvert(), "scales"_a.noconvert(),
             "zeros"_a.noconvert(), "bias"_a.none())
        .def(
            "cache",
            [](PyPlan& p, int64_t offset, int64_t layer_bytes, int64_t layers, int64_t slots, int64_t groups,
               int64_t context, int64_t size, int64_t heads, const std::string& kind,
               const Doubles& frequencies) {
                p.plan().cache(
                    {offset, layer_bytes, layers, slots, groups, context, size, heads, cache_kind(kind)},
                    frequencies.data(), int64_t(frequencies.shape(0)));
            },
            "offset"_a, "layer_bytes"_a, "layers"_a, "slots"_a, "groups"_a, "context"_a, "size"_a, "heads"_a,
            "kind"_a, "frequencies"_a.noconvert())
        .def("embed", [](PyPlan& p, int g, int tokens, int images, int table,
                         int out) { p.plan().embed(g, tokens, images, table, out); })
        .def("rms_norm", [](PyPlan& p, int g, int x, int w, double eps,
                            int out) { p.plan().rms_norm(g, x, w, eps, out); })
        .def("layer_norm", [](PyPlan& p, int g, int x, int w, double eps,
                              int out) { p.plan().layer_norm(g, x, w, eps, out); })
        .def("linear", [](PyPlan& p, int g, int x, int w, bool gelu, int residual,
                          int out) { p.plan().linear(g, x, w, gelu, residual, out); })
        .def("rope_write", [](PyPlan& p, int g, int qkv, int positions, int slots, int layer,
                              int out) { p.plan().rope_write(g, qkv, positions, slots, layer, out); })
        .def("attention", [](PyPlan& p, int g, int q, int positions, int slots, int layer,
                             int out) { p.plan().attention(g, q, positions, slots, layer, out); })
        .def("silu_mul", [](PyPlan& p, int g, int x, int out) { p.plan().silu_mul(g, x, out); })
        .def("gather_rows",
             [](PyPlan& p, int g, int x, int picked, int out) { p.plan().gather_rows(g, x, picked, out); })
        .def("patches",
             [](PyPlan& p, int g, int pixels, int64_t side, int64_t patch, std::array<float, 3> mean,
                std::array<float, 3> std,
                int out) { p.plan().patches(g, pixels, side, patch, mean.data(), std.data(), out); })
        .def("vision_tokens", [](PyPlan& p, int g, int x, int positions, int prefix,
                                 int out) { p.plan().vision_tokens(g, x, positions, prefix, out); })
        .def("full_attention", [](PyPlan& p, int g, int qkv, int64_t heads, int64_t tokens, bool whole,
                                  int out) { p.plan().full_attention(g, qkv, heads, tokens, whole, out); })
        .def("pixel_shuffle", [](PyPlan& p, int g, int x, int64_t grid, int64_t prefix,
                                 int out) { p.plan().pixel_shuffle(g, x, grid, prefix, out); })
        .def(
            "run",
            [](PyPlan& p, int graph, std::array<int64_t, 4> counts) {
                const edgevl::Counts values = PyPlan::counts(counts);
                nb::gil_scoped_release release;
                p.plan().run(graph, values);
            },
            "graph"_a, "counts"_a);
}
