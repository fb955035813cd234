"""A recognition names the pattern in which the zeros of a weight stand.

Every pattern is a way to write a mask down: which of so many blocks are zero, which n of each m inputs are not. A
pattern is recognised where it describes the mask in fewer bits than a list of single zeros would (Rissanen, "Modeling
by shortest data description", 1978): of all masks with as many zeros, at most one in 2^k is described in k bits less,
so that what chance puts in a row is not taken for a pattern.
"""

import itertools
import math

import numpy as np

__all__ = ["recognize"]

# So many bits must a pattern save: fewer than one random mask in a hundred does.
_EVIDENCE = 7.0
# Zeros beside channels and blocks, as a share of the weights that these keep: quantisation to int8 rounds about 1 % of
# normally distributed weights to zero.
_STRAY = 0.02
# Share of the changes between neighbours that must be at the edges of blocks; the others are made by stray zeros.
_AT_EDGES = 0.6
_LARGEST_BLOCK = 1024
_BLOCK_SIZES = 4  # that are tried along an axis: the largest that the changes allow
_LARGEST_GROUP = 32
# Groups of N:M are looked for in so many weights first: what does not hold there does not hold in the whole.
_SAMPLE = 1 << 16


def recognize(kept):
    """Name the pattern in which the zeros of a matrix stand.

    Where several names are true, it is the one that says most: blocks over whole rows are `"channel"`, blocks that come
    in pairs are blocks of twice the size, a 2:4 mask of which every two inputs keep one is `"1:2"`, and 2:4 of three
    inputs is `"2:3"`. A mask on its way to N:M does not keep to it yet: it is `"unstructured"`. So is one that is too
    small to tell its pattern from chance: at least 1 of 100 random masks would be as regular. The time is linear in the
    size.

    Args:
        kept: Boolean matrix [outputs, inputs], `True` where a weight is not zero.

    Returns:
        * `""`: there are no zeros or nothing else;
        * `"channel"`: the zeros are whole rows, or rows and columns;
        * such as `"block_1x4"`: they are blocks of that size (up to 1024, or a whole column), smaller ones at the edge;
        * such as `"2:4"`: no group of 4 inputs, or fewer at the end of a row, has more than 2 non-zeros, and most
          have 2 (for groups of up to 32);
        * else `"unstructured"`.

        Beside channels and blocks, 2 % of the weights that they keep may be zero: quantisation makes such zeros.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> scores = np.random.default_rng(0).random((8, 16))
    >>> [ks.patterns.recognize(ks.patterns.get(name).mask(scores, 0.5, [0])) for name in ("2:4", "block_1x4", None)]
    ['2:4', 'block_1x4', 'unstructured']
    """
    kept = np.asarray(kept, bool)
    live = int(np.count_nonzero(kept))
    if live in (0, kept.size):
        return ""
    rows, cols = kept.any(axis=1), kept.any(axis=0)
    alive = int(np.sum(rows))
    if live == alive * len(cols):
        return "channel"
    bits = {"unstructured": _choices(kept.size, live) - _EVIDENCE} | _blocks(kept, live)
    which_rows, inside = _choices(len(rows), alive), alive * int(np.sum(cols))
    if alive < len(rows):
        if inside - live <= _STRAY * inside:
            bits["channel"] = which_rows + _choices(len(cols), int(np.sum(cols))) + _choices(inside, live)
        kept = kept[rows]
    bits |= {name: which_rows + found for name, found in _groups(kept, live).items()}
    return min(bits, key=bits.get)


def _choices(n, k):
    """Bits that say which k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _number(n):
    """Bits that say a whole number, of which small ones are likelier: 1 / (n (n + 1))."""
    return math.log2(n * (n + 1))


def _blocks(kept, live):
    """The sizes of blocks that the zeros could be made of: `{name: bits}`."""
    changes = np.count_nonzero(kept[1:] != kept[:-1], axis=1), np.count_nonzero(kept[:, 1:] != kept[:, :-1], axis=0)
    found = {}
    for r, c in sorted(itertools.product(*map(_sizes, changes)), key=math.prod, reverse=True):
        if r * c == 1:
            break
        starts = [np.arange(0, n, size) for n, size in zip(kept.shape, (r, c), strict=True)]
        groups = kept
        for axis, start in enumerate(starts):
            if len(start) < kept.shape[axis]:
                groups = np.logical_or.reduceat(groups, start, axis=axis)
        sizes = [np.diff(start, append=n) for start, n in zip(starts, kept.shape, strict=True)]
        inside = int(sizes[0] @ groups.astype("float64") @ sizes[1])
        if inside - live <= _STRAY * inside:
            which = _choices(groups.size, int(np.count_nonzero(groups)))
            found[f"block_{r}x{c}"] = _number(r) + _number(c) + which + _choices(inside, live)
            if inside == live:  # Smaller ones say less.
                break
    return found


def _sizes(changes):
    """The sizes of blocks along an axis, largest first, from how often its neighbours 0 and 1, 1 and 2, ... differ."""
    total, whole = int(changes.sum()), len(changes) + 1
    if not total:
        return [whole]
    fits = (
        size
        for size in range(min(whole - 1, _LARGEST_BLOCK), 1, -1)
        if changes[size - 1 :: size].sum() >= _AT_EDGES * total
    )
    return [*itertools.islice(fits, _BLOCK_SIZES), 1]


def _groups(kept, live):
    """The groups of inputs that the zeros keep to, `{name: bits}`: one or none."""
    sample = kept[:: max(1, kept.size // _SAMPLE), :_SAMPLE]
    chance = _choices(sample.size, int(np.count_nonzero(sample)))
    sizes = range(2, min(_LARGEST_GROUP, kept.shape[1]) + 1)
    likely = {m: bits for m in sizes if (bits := _fit(sample, m)[1]) < chance}
    for m in sorted(likely, key=likely.get):
        n, bits = _fit(kept, m)
        if bits < math.inf:
            return {f"{n}:{m}": bits}
    return {}


def _fit(kept, m):
    """The most non-zeros in m inputs, and the bits of a mask that allows so many; infinite if that is no pattern."""
    # Fewer than m at the end are a group as well.
    counts = np.add.reduceat(kept.view("uint8"), np.arange(0, kept.shape[1], m), axis=1)
    n, (groups, rest) = int(counts.max()), divmod(kept.shape[1], m)
    # Few groups with so many: a mask on its way to a smaller n.
    if n == m or np.count_nonzero(counts[:, :groups] == n) <= kept.shape[0] * groups // 2:
        return n, math.inf
    last = min(n, rest)
    room = kept.shape[0] * (groups * n + last)
    which = kept.shape[0] * (groups * _choices(m, n) + _choices(rest, last))
    return n, _number(m) + math.log2(m) + which + _choices(room, int(np.count_nonzero(kept)))
