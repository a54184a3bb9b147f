"""One token of each row of logits, drawn with temperature and top-p, as `edgevl.sampling.choose` draws it.

Nothing is sorted. Of the logits' bits, read as numbers of the same order, the smallest that is kept is found digit by
digit: a launch of `sample_narrow` for each, in which every part of a row sums the weights above sixteen candidates, and
the next launch reads all parts' sums. Then `sample_tally` and `sample_pick` draw among what is kept, by id. Weights and
sums are f32, and summed in another order than the twin's f64: the token is the same for the same random number unless
top-p or that number lies within that rounding (about 1e-6 of all) of where the choice changes.
"""

import triton
import triton.language as tl


@triton.jit
def keys_of(x):
    """f32 -> i32 of the same order; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def part_of(logits, draws, tops, row, part, V, COUNT, PARTS, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, keys and weights of a part of a row; 2 to the power of (logit - largest) · factor, 0 beyond the row."""
    c = part * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, WHOLE)
    top = tl.max(tl.load(tops + row * PARTS + p, mask=p < PARTS, other=float("-inf")), axis=0)
    x = tl.load(logits + row * V + c, mask=c < COUNT, other=float("-inf"))
    return c, keys_of(x), tl.exp2((x - top) * tl.load(draws + row * 3))


@triton.jit
def narrowed(draws, totals, sums, state, row, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """The digit that sums speak of, chosen. Returns the smallest key that may be kept, its level, and the goal.

    Level 0 knows nothing, level 8 all digits but the last. The goal is the weight that what is kept must reach.
    """
    p, digit = tl.arange(0, WHOLE), tl.arange(0, 16)
    place = (row * PARTS + p[:, None]) * 16 + digit[None, :]
    there = (p[:, None] < PARTS) & (digit[None, :] >= 0)
    reached = tl.sum(tl.load(sums + place, mask=there, other=0.0), axis=0)
    total = tl.sum(tl.load(totals + (row * PARTS + p) * 16, mask=p < PARTS, other=0.0), axis=0)
    goal = total * tl.load(draws + row * 3 + 1)
    key, level = tl.load(state + row * 2), tl.load(state + row * 2 + 1)
    enough = (reached >= goal) & (digit > 0) & (level > 0)
    chosen = tl.sum(enough.to(tl.int32), axis=0)
    first = tl.where(level > 0, key, -2147483648)
    return first + (chosen << tl.minimum(32 - 4 * level, 28)), level, goal


@triton.jit
def sample_top(logits, tops, V: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """(L, V) -> (L, PARTS): the largest of each part of the first COUNT; grid (L, PARTS)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + c, mask=c < COUNT, other=float("-inf"))
    tl.store(tops + row * PARTS + part, tl.max(x, axis=0))


@triton.jit
def sample_narrow(
    logits,  # (L, V)
    draws,  # (L, 3) f32: factor of a logit, share of all weight that is kept (2: everything), random number
    tops,  # (L, PARTS)
    totals,  # (L, PARTS, 16) of level 1, whose first column is the weight of all
    sums,  # (L, PARTS, 16) of this level: weight from each candidate on
    state,  # (L, 2) i32 of this level: smallest key that may be kept, level
    next_sums,
    next_state,
    V: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,  # at least PARTS, a power of two
    BLOCK: tl.constexpr,
):
    """One digit more is known; grid (L, PARTS)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, level, _ = narrowed(draws, totals, sums, state, row, PARTS, WHOLE)
    _, keys, weights = part_of(logits, draws, tops, row, part, V, COUNT, PARTS, WHOLE, BLOCK)
    digit = tl.arange(0, 16)
    candidates = key + (digit << (28 - 4 * level))
    above = tl.where(keys[:, None] >= candidates[None, :], weights[:, None], 0.0)
    tl.store(next_sums + (row * PARTS + part) * 16 + digit, tl.sum(above, axis=0))
    if part == 0:
        tl.store(next_state + row * 2, key)
        tl.store(next_state + row * 2 + 1, level + 1)


@triton.jit
def sample_tally(
    logits,
    draws,
    tops,
    totals,
    sums,  # of the last level
    state,
    shares,  # (L, PARTS, 3): weight above the smallest key that is kept, weight and number of those that have it
    V: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each part has to draw from; grid (L, PARTS)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, _, _ = narrowed(draws, totals, sums, state, row, PARTS, WHOLE)
    c, keys, weights = part_of(logits, draws, tops, row, part, V, COUNT, PARTS, WHOLE, BLOCK)
    tied = (keys == key) & (c < COUNT)
    place = shares + (row * PARTS + part) * 3
    tl.store(place, tl.sum(tl.where(keys > key, weights, 0.0), axis=0))
    tl.store(place + 1, tl.sum(tl.where(tied, weights, 0.0), axis=0))
    tl.store(place + 2, tl.sum(tied.to(tl.float32), axis=0))


@triton.jit
def sample_pick(
    logits,
    draws,
    tops,
    totals,
    sums,
    state,
    shares,
    out,  # (L,) i32
    V: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first id at which the weight of those kept, up to it, exceeds number · all of it; grid (L,).

    Of equal logits at the end of what is kept, the first ones are: as many as reach the goal, one at least.
    """
    row = tl.program_id(0).to(tl.int64)
    key, _, goal = narrowed(draws, totals, sums, state, row, PARTS, WHOLE)
    p = tl.arange(0, WHOLE)
    place = shares + (row * PARTS + p) * 3
    above = tl.load(place, mask=p < PARTS, other=0.0)
    equal = tl.load(place + 1, mask=p < PARTS, other=0.0)
    count = tl.load(place + 2, mask=p < PARTS, other=0.0)
    one = tl.sum(equal, axis=0) / tl.maximum(tl.sum(count, axis=0), 1.0)
    wanted = tl.ceil((goal - tl.sum(above, axis=0)) / tl.maximum(one, 1e-30))
    wanted = tl.minimum(tl.maximum(wanted, 1.0), 16777216.0)
    kept = tl.minimum(tl.maximum(wanted - (tl.cumsum(count, axis=0) - count), 0.0), count)
    weight = above + kept * one
    reached = tl.cumsum(weight, axis=0)
    mark = tl.load(draws + row * 3 + 2) * tl.sum(weight, axis=0)
    part = tl.min(tl.where((reached > mark) & (weight > 0.0), p, WHOLE), axis=0)
    last = tl.max(tl.where(weight > 0.0, p, 0), axis=0)  # when rounding leaves none
    part = tl.minimum(part, last)
    mark -= tl.sum(tl.where(p < part, weight, 0.0), axis=0)
    ties = tl.sum(tl.where(p == part, kept, 0.0), axis=0)
    c, keys, weights = part_of(logits, draws, tops, row, part, V, COUNT, PARTS, WHOLE, BLOCK)
    tied = (keys == key) & (c < COUNT)
    rank = tl.cumsum(tied.to(tl.float32), axis=0)
    weights = tl.where((keys > key) | (tied & (rank <= ties)), weights, 0.0)
    found = tl.min(tl.where((tl.cumsum(weights, axis=0) > mark) & (weights > 0.0), c, COUNT), axis=0)
    last = tl.max(tl.where(weights > 0.0, c, 0), axis=0)
    tl.store(out + row, tl.minimum(found, last))
