// attention: each token attends to positions 0..its own of its slot, grouped queries sharing a KV head.
//
// Many tokens: blocks of queries of one KV head go over blocks of keys as matrix products, in whole numbers
// (whole_blocks.h) unless the cache is f32.
// Few tokens: keys and values are read where they lie; a long context is split between threads and merged in
// a second phase. How it is split depends on the plan alone, neither on the number of threads nor on the
// other tokens of the step, so results do not either.
#include "coded_rows.h"
#include "exact_blocks.h"
#include "whole_blocks.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

int64_t share_of(const Attention& a) { return a.cache.heads / a.cache.groups; }

CachedKeys keys_of(const Attention& a, int64_t slot, int64_t group) {
    const CacheLayer& c = a.cache;
    const int64_t at = (slot * c.groups + group) * key_blocks(c.context) * kKeyLanes;
    const char* first = static_cast<const char*>(c.keys) + at * c.size * cache_item(c.kind);
    return {first, c.kind, c.size, scales_from(c.key_scales, at)};
}

Source values_of(const Attention& a, int64_t slot, int64_t group) {
    const CacheLayer& c = a.cache;
    const int64_t head = slot * c.groups + group;
    const char* first = static_cast<const char*>(c.values) + head * c.context * c.size * cache_item(c.kind);
    return {first, c.kind, c.size, scales_from(c.value_scales, head * key_blocks(c.context) * kKeyLanes)};
}

const float* query(const Attention& a, int64_t token, int64_t head) {
    return a.q + (token * a.cache.heads + head) * a.cache.size;
}

// Has write(p) leave the result of a head; `room` for it may be what write reads.
template <class Write>
void put_head(const Attention& a, int64_t tokens, int64_t token, int64_t head, float* room,
              const Write& write) {
    put(a.out, tokens, token, head * a.cache.size, a.cache.size, room, write);
}

// The same, from row `row` of f.
void put_result(const Attention& a, int64_t tokens, int64_t token, int64_t head, const Flash& f,
                int64_t row) {
    put_head(a, tokens, token, head, f.out + row * f.padded, [&](float* out) { get_output(f, row, out); });
}

// -- few tokens
// -------------------------------------------------------------------------------------------------------

struct Split {
    int64_t keys;   // of each part, but the last
    int64_t parts;  // of every token
};

Split split_of(const Attention& a, int64_t tokens) {
    int64_t longest = 1;
    for (int64_t t = 0; t < tokens; ++t) longest = larger(longest, int64_t(a.positions[t]) + 1);
    const int64_t keys = split_keys(a.cache.context);
    return {keys, blocks(longest, keys)};
}

constexpr int kAbreast = W == 16 ? 2 : 1;  // vectors of keys, or of values, that are worked on side by side

// Scores of R heads for B·W keys from `key` of the block on.
template <int R, int B>
void score(const Flash& f, int64_t row, const CachedKeys& keys, int64_t first, int64_t key) {
    const float* q = f.q + row * f.padded;
    V acc[R][B];
    for (int r = 0; r < R; ++r) {
        for (int b = 0; b < B; ++b) acc[r][b] = splat(0.0f);
    }
    for (int64_t d = 0; d < f.size; ++d) {
        EDGEVL_UNROLL
        for (int b = 0; b < B; ++b) {
            const V k = key_vector(keys, first + key + b * W, d);
            fetch_keys(keys, first + key + b * W, d);
            EDGEVL_UNROLL
            for (int r = 0; r < R; ++r) acc[r][b] = fma(k, splat(q[r * f.padded + d]), acc[r][b]);
        }
    }
    for (int b = 0; b < B; ++b) {
        const V scales = key_scales(keys, first + key + b * W);
        for (int r = 0; r < R; ++r) store(f.scores + (row + r) * kKeys + key + b * W, acc[r][b] * scales);
    }
}

// Weighted sums of B vectors of values from number d on, for R heads; the weights hold the scales of int8.
template <int R, int B>
void weigh(const Flash& f, int64_t row, const Source& values, int64_t first, int64_t count, int64_t d) {
    const float* weights = f.scores + row * kKeys;
    float* out = f.out + row * f.padded + d;
    V acc[R][B];
    for (int r = 0; r < R; ++r) {
        for (int b = 0; b < B; ++b) acc[r][b] = load(out + r * f.padded + b * W);
    }
    for (int64_t i = 0; i < count; ++i) {
        EDGEVL_UNROLL
        for (int b = 0; b < B; ++b) {
            const V v = stored_vector(values.data, values.kind, (first + i) * values.stride + d + b * W);
            fetch(values, (first + i + kKeys) * values.stride + d + b * W);
            EDGEVL_UNROLL
            for (int r = 0; r < R; ++r) acc[r][b] = fma(v, splat(weights[r * kKeys + i]), acc[r][b]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int b = 0; b < B; ++b) store(out + r * f.padded + b * W, acc[r][b]);
    }
}

// Scores and weighted values of R heads from row `row` of f on, over `count` keys from `first` on.
template <int R>
void direct_block(const Flash& f, int64_t row, const CachedKeys& keys, const Source& values, int64_t first,
                  int64_t count) {
    int64_t key = 0;
    for (; key + kAbreast * W <= count; key += kAbreast * W) score<R, kAbreast>(f, row, keys, first, key);
    for (; key < count; key += W) score<R, 1>(f, row, keys, first, key);  // past the count: never looked at
    for (int r = 0; r < R; ++r) soften(f, row + r, count, count);
    if (values.kind == Kind::int8) {
        for (int r = 0; r < R; ++r) {
            float* weights = f.scores + (row + r) * kKeys;
            for (int64_t i = 0; i < count; ++i) weights[i] *= values.scales[first + i];
        }
    }
    int64_t d = 0;
    for (; d + kAbreast * W <= f.size; d += kAbreast * W) weigh<R, kAbreast>(f, row, values, first, count, d);
    for (; d + W <= f.size; d += W) weigh<R, 1>(f, row, values, first, count, d);
    float* out = f.out + row * f.padded;
    for (; d < f.size; ++d) {
        for (int64_t i = 0; i < count; ++i) {
            const float v = stored_at(values.data, values.kind, (first + i) * values.stride + d);
            for (int r = 0; r < R; ++r) out[r * f.padded + d] += v * f.scores[(row + r) * kKeys + i];
        }
    }
}

void run_few(const Attention& a, int64_t tokens, int64_t item, float* scratch) {
    const Split split = split_of(a, tokens);
    const int64_t part = item % split.parts, group = item / split.parts % a.cache.groups;
    const int64_t token = item / split.parts / a.cache.groups, share = share_of(a), size = a.cache.size;
    const int64_t begin = part * split.keys,
                  end = smaller(begin + split.keys, int64_t(a.positions[token]) + 1);
    const CachedKeys keys = keys_of(a, a.slots[token], group);
    const Source values = values_of(a, a.slots[token], group);
    const Flash f = make_flash(scratch, size, larger(kQueryRows, share));
    start_rows(f, share);
    for (int64_t h = 0; h < share; ++h) set_query(f, h, query(a, token, group * share + h));
    for (int64_t key = begin; key < end; key += kKeys) {
        const int64_t count = smaller(kKeys, end - key);
        int64_t h = 0;
        for (; h + 4 <= share; h += 4) direct_block<4>(f, h, keys, values, key, count);
        if (share - h == 3) direct_block<3>(f, h, keys, values, key, count);
        if (share - h == 2) direct_block<2>(f, h, keys, values, key, count);
        if (share - h == 1) direct_block<1>(f, h, keys, values, key, count);
    }
    for (int64_t h = 0; h < share; ++h) {
        const int64_t head = group * share + h;
        if (split.parts == 1) {
            put_result(a, tokens, token, head, f, h);
            continue;
        }
        float* partial = a.partial + ((token * a.cache.heads + head) * split.parts + part) * (size + 2);
        partial[0] = f.top[h];
        partial[1] = f.total[h];
        std::memcpy(partial + 2, f.out + h * f.padded, size_t(size) * sizeof(float));
    }
}

// Merges the parts of all heads of one token and KV head.
void merge(const Attention& a, int64_t tokens, int64_t item, float* room) {
    const int64_t parts = split_of(a, tokens).parts, size = a.cache.size, share = share_of(a);
    for (int64_t h = 0; h < share; ++h) {
        const int64_t row = item * share + h;  // token · H + head
        const float* partial = a.partial + row * parts * (size + 2);
        float top = -__builtin_inff(), total = 0.0f;
        for (int64_t p = 0; p < parts; ++p) {
            const float* x = partial + p * (size + 2);
            if (x[1] > 0.0f && x[0] > top) top = x[0];
        }
        put_head(a, tokens, row / a.cache.heads, row % a.cache.heads, room, [&](float* out) {
            for (int64_t d = 0; d < size; ++d) out[d] = 0.0f;
            for (int64_t p = 0; p < parts; ++p) {
                const float* x = partial + p * (size + 2);
                if (!(x[1] > 0.0f)) continue;  // the token is shorter than the others
                float lanes[W];
                store(lanes, vexp(splat(x[0] - top)));
                total += x[1] * lanes[0];
                for (int64_t d = 0; d < size; ++d) out[d] += x[2 + d] * lanes[0];
            }
            const float scale = 1.0f / total;  // as get_output does, for a token that fits into one part
            for (int64_t d = 0; d < size; ++d) out[d] *= scale;
        });
    }
}

// -- many tokens
// ------------------------------------------------------------------------------------------------------

int64_t block_tokens(const Attention& a) { return larger(1, kQueryRows / share_of(a)); }

// Tokens first..last, all of one slot, of one KV head.
template <class Blocks>
void run_same_slot(const Attention& a, int64_t tokens, int64_t first, int64_t last, int64_t group,
                   const Flash& f) {
    const int64_t share = share_of(a), rows = (last - first) * share;
    const CachedKeys keys = keys_of(a, a.slots[first], group);
    const Source values = values_of(a, a.slots[first], group);
    int64_t longest = 0;
    start_rows(f, rows);
    for (int64_t r = 0; r < rows; ++r) {
        Blocks::query(f, r, query(a, first + r / share, group * share + r % share));
        f.ends[r] = a.positions[first + r / share] + 1;
        longest = larger(longest, f.ends[r]);
    }
    for (int64_t key = 0; key < longest; key += kKeys) {
        const int64_t count = smaller(kKeys, longest - key);
        Blocks::load_keys(f, keys, key, count);
        Blocks::load_values(f, values, key, count);
        Blocks::absorb(f, rows, key, count);
    }
    for (int64_t r = 0; r < rows; ++r)
        put_result(a, tokens, first + r / share, group * share + r % share, f, r);
}

void run_many(const Attention& a, int64_t tokens, int64_t item, float* scratch) {
    // the last tokens first: they see the most keys, and what is left for the end is short
    const int64_t cuts = blocks(tokens, block_tokens(a)), group = item % a.cache.groups;
    const int64_t block = (cuts - 1 - item / a.cache.groups) * block_tokens(a);
    const int64_t end = smaller(tokens, block + block_tokens(a));
    const Flash f = make_flash(scratch, a.cache.size, larger(kQueryRows, share_of(a)));
    for (int64_t first = block; first < end;) {
        int64_t last = first + 1;
        while (last < end && a.slots[last] == a.slots[first]) ++last;
        if (a.cache.kind == Kind::f32) {
            run_same_slot<ExactBlocks>(a, tokens, first, last, group, f);
        } else {
            run_same_slot<WholeBlocks>(a, tokens, first, last, group, f);
        }
        first = last;
    }
}

int64_t items(const Attention& a, const Step& step, int phase) {
    const int64_t tokens = rows_of(a.rows, step.counts);
    if (tokens == 0) return 0;
    if (tokens > kDecodeTokens) return phase == 0 ? blocks(tokens, block_tokens(a)) * a.cache.groups : 0;
    const int64_t parts = split_of(a, tokens).parts;
    if (phase == 0) return tokens * a.cache.groups * parts;
    return parts > 1 ? tokens * a.cache.groups : 0;
}

void run(const Attention& a, const Step& step, int phase, int64_t item, float* scratch) {
    const int64_t tokens = rows_of(a.rows, step.counts);
    if (tokens > kDecodeTokens) return run_many(a, tokens, item, scratch);
    if (phase == 0) return run_few(a, tokens, item, scratch);
    merge(a, tokens, item, scratch);
}

}  // namespace

const Kernel<Attention> attention_kernel = {2, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
