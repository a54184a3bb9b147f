// attention: each token attends to positions 0..its own of its slot, grouped queries sharing a KV head.
//
// Many tokens: blocks of queries of one KV head go over blocks of keys as matrix products.
// Few tokens: keys and values are read where they lie; a long context is split between threads and merged in
// a second phase. How it is split depends on the step alone, never on the number of threads, so results do
// not either.
#include "flash.h"
#include "kernels.h"

namespace edgevl {
namespace EDGEVL_ISA {
namespace {

int64_t share_of(const Attention& a) { return a.cache.heads / a.cache.groups; }

Source source(const Attention& a, const void* data, int64_t slot, int64_t group) {
    const CacheLayer& c = a.cache;
    const int64_t at = (slot * c.groups + group) * c.context * c.size;
    const void* first = c.half ? static_cast<const void*>(static_cast<const uint16_t*>(data) + at)
                               : static_cast<const void*>(static_cast<const float*>(data) + at);
    return {first, c.half, c.size};
}

const float* query(const Attention& a, int64_t token, int64_t head) {
    return a.q + (token * a.cache.heads + head) * a.cache.size;
}

float* result(const Attention& a, int64_t token, int64_t head) {
    return a.out + (token * a.cache.heads + head) * a.cache.size;
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
    const int64_t fair = blocks(longest, kSplitItems / tokens);
    const int64_t keys = larger(kSplitKeys, blocks(fair, kKeys) * kKeys);
    return {keys, blocks(longest, keys)};
}

// Scores and weighted values of R heads from row `row` of f on, over `count` keys from `first` on.
template <int R>
void direct_block(const Flash& f, int64_t row, const Source& keys, const Source& values, int64_t first,
                  int64_t count) {
    const float* q = f.q + row * f.padded;
    float* scores = f.scores + row * kKeys;
    const int64_t whole = f.size / W * W;
    for (int64_t i = 0; i < count; ++i) {
        V acc[R];
        for (int r = 0; r < R; ++r) acc[r] = splat(0.0f);
        for (int64_t d = 0; d < whole; d += W) {
            const V k = source_vector(keys, first + i, d);
            EDGEVL_UNROLL
            for (int r = 0; r < R; ++r) acc[r] = fma(k, load(q + r * f.padded + d), acc[r]);
        }
        for (int r = 0; r < R; ++r) {
            float score = sum(acc[r]);
            for (int64_t d = whole; d < f.size; ++d)
                score += source_at(keys, first + i, d) * q[r * f.padded + d];
            scores[r * kKeys + i] = score;
        }
    }
    for (int r = 0; r < R; ++r) soften(f, row + r, count, count);
    float* out = f.out + row * f.padded;
    for (int64_t d = 0; d < whole; d += W) {
        V acc[R];
        for (int r = 0; r < R; ++r) acc[r] = load(out + r * f.padded + d);
        for (int64_t i = 0; i < count; ++i) {
            const V v = source_vector(values, first + i, d);
            EDGEVL_UNROLL
            for (int r = 0; r < R; ++r) acc[r] = fma(v, splat(scores[r * kKeys + i]), acc[r]);
        }
        for (int r = 0; r < R; ++r) store(out + r * f.padded + d, acc[r]);
    }
    for (int64_t d = whole; d < f.size; ++d) {
        for (int64_t i = 0; i < count; ++i) {
            const float v = source_at(values, first + i, d);
            for (int r = 0; r < R; ++r) out[r * f.padded + d] += v * scores[r * kKeys + i];
        }
    }
}

void run_few(const Attention& a, int64_t tokens, int64_t item, float* scratch) {
    const Split split = split_of(a, tokens);
    const int64_t part = item % split.parts, group = item / split.parts % a.cache.groups;
    const int64_t token = item / split.parts / a.cache.groups, share = share_of(a), size = a.cache.size;
    const int64_t begin = part * split.keys,
                  end = smaller(begin + split.keys, int64_t(a.positions[token]) + 1);
    const Source keys = source(a, a.cache.keys, a.slots[token], group);
    const Source values = source(a, a.cache.values, a.slots[token], group);
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
            get_output(f, h, result(a, token, head));
            continue;
        }
        float* partial = a.partial + ((token * a.cache.heads + head) * split.parts + part) * (size + 2);
        partial[0] = f.top[h];
        partial[1] = f.total[h];
        std::memcpy(partial + 2, f.out + h * f.padded, size_t(size) * sizeof(float));
    }
}

// Merges the parts of all heads of one token and KV head.
void merge(const Attention& a, int64_t tokens, int64_t item) {
    const int64_t parts = split_of(a, tokens).parts, size = a.cache.size, share = share_of(a);
    for (int64_t h = 0; h < share; ++h) {
        const int64_t row = item * share + h;  // token · H + head
        const float* partial = a.partial + row * parts * (size + 2);
        float top = -__builtin_inff(), total = 0.0f;
        for (int64_t p = 0; p < parts; ++p) {
            const float* x = partial + p * (size + 2);
            if (x[1] > 0.0f && x[0] > top) top = x[0];
        }
        float* out = a.out + row * size;
        for (int64_t d = 0; d < size; ++d) out[d] = 0.0f;
        for (int64_t p = 0; p < parts; ++p) {
            const float* x = partial + p * (size + 2);
            if (!(x[1] > 0.0f)) continue;  // the token is shorter than the others
            float lanes[W];
            store(lanes, vexp(splat(x[0] - top)));
            total += x[1] * lanes[0];
            for (int64_t d = 0; d < size; ++d) out[d] += x[2 + d] * lanes[0];
        }
        for (int64_t d = 0; d < size; ++d) out[d] /= total;
    }
}

// -- many tokens
// ------------------------------------------------------------------------------------------------------

int64_t block_tokens(const Attention& a) { return larger(1, kQueryRows / share_of(a)); }

// Tokens first..last, all of one slot, of one KV head.
void run_same_slot(const Attention& a, int64_t first, int64_t last, int64_t group, const Flash& f) {
    const int64_t share = share_of(a), rows = (last - first) * share;
    const Source keys = source(a, a.cache.keys, a.slots[first], group);
    const Source values = source(a, a.cache.values, a.slots[first], group);
    int64_t longest = 0;
    start_rows(f, rows);
    for (int64_t r = 0; r < rows; ++r) {
        set_query(f, r, query(a, first + r / share, group * share + r % share));
        longest = larger(longest, int64_t(a.positions[first + r / share]) + 1);
    }
    for (int64_t key = 0; key < longest; key += kKeys) {
        const int64_t count = smaller(kKeys, longest - key);
        load_block(f, keys, values, key, count);
        absorb(f, rows, count,
               [&](int64_t r) { return smaller(count, int64_t(a.positions[first + r / share]) + 1 - key); });
    }
    for (int64_t r = 0; r < rows; ++r)
        get_output(f, r, result(a, first + r / share, group * share + r % share));
}

void run_many(const Attention& a, int64_t tokens, int64_t item, float* scratch) {
    const int64_t group = item % a.cache.groups, block = item / a.cache.groups * block_tokens(a);
    const int64_t end = smaller(tokens, block + block_tokens(a));
    const Flash f = make_flash(scratch, a.cache.size, larger(kQueryRows, share_of(a)));
    for (int64_t first = block; first < end;) {
        int64_t last = first + 1;
        while (last < end && a.slots[last] == a.slots[first]) ++last;
        run_same_slot(a, first, last, group, f);
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
    merge(a, tokens, item);
}

}  // namespace

const Kernel<Attention> attention_kernel = {2, items, run};

}  // namespace EDGEVL_ISA
}  // namespace edgevl
