"""A pattern says where zeros may stand: `pattern.mask(scores, sparsity)` returns which weights stay.

A pattern is made of two primitives: `pool` gives one score to each group of weights that must leave together, `expand`
spreads the decision about the groups over the weights. The ranking between them is `keep_highest`.

Patterns with a shape (`Block`, `NM`, `Channel`) are defined on the weight as a runtime multiplies it: the *matrix view*
[outputs, inputs] of the kernel, whose columns run over the spatial axes first and the input channels fastest, as TFLite
stores them.
"""

import itertools
import math
import re

import numpy as np

from keras_sparse.registry import Configurable, Registry, check_whole, serializable

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Pattern",
    "Unstructured",
    "WithinOutputs",
    "from_matrix",
    "get",
    "keep_highest",
    "to_matrix",
]

PATTERNS = Registry("pattern")
_BLOCK = 2**20  # scores that are looked at at once: more would take the memory of several weights


def keep_highest(scores, count):
    """Mark all but the `count` lowest scores.

    Ties go to the lowest index in C order, which is dropped first; NaN scores are kept as long as anything else is
    left to drop. The cost is linear in the number of scores (a partition, not a sort).

    Args:
        scores: Array of any shape, floating point.
        count: How many to drop, an int in `[0, scores.size]`.

    Returns:
        Boolean array of the shape of `scores`, `True` where the weight is kept; exactly `count` are `False`.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.keep_highest(np.array([3.0, 1.0, 1.0, 2.0]), 1)
    array([ True, False,  True,  True])
    """
    scores = np.asarray(scores)
    flat = scores.reshape(-1)
    keep = np.ones(flat.size, bool)
    if count >= flat.size:
        keep[:] = False
    elif count > 0:
        threshold = _lowest(flat, count)
        if np.isnan(threshold):
            keep = np.isnan(flat)
            ties = keep.copy()
        else:
            keep = ~(flat < threshold)
            ties = flat == threshold
        surplus = count - (flat.size - int(np.count_nonzero(keep)))
        keep[np.flatnonzero(ties)[:surplus]] = False
    return keep.reshape(scores.shape)


def _lowest(flat, count):
    """The `count`-th lowest score, NaN being the highest."""
    # What is masked already is -inf and often most of the scores: to partition only the rest is up to ten times faster.
    infinite = int(np.count_nonzero(flat == -np.inf))
    if count <= infinite:
        return -np.inf
    ranked, end = np.empty(flat.size - infinite, flat.dtype), 0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        live = block[np.flatnonzero(block != -np.inf)]  # by index: a boolean mask takes several times as long
        ranked[end : end + live.size] = live
        end += live.size
    ranked.partition(count - infinite - 1)  # NumPy orders NaN after every number.
    return ranked[count - infinite - 1]


def to_matrix(array, output_axes=(-1,)):
    """Return the matrix view [outputs, inputs] of an array in the layout of a kernel.

    Args:
        array: Array of a kernel's shape, such as `(height, width, inputs, outputs)`.
        output_axes: The axes that count output units: `Weight.output_axes`.

    Returns:
        Array of rank 2. Rows are output units; columns run over the other axes in their order, the last one fastest.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.to_matrix(np.zeros((3, 3, 8, 16))).shape
    (16, 72)
    """
    order, outputs = _matrix_order(array.ndim, output_axes)
    return array.transpose(order).reshape(int(np.prod([array.shape[axis] for axis in outputs])), -1)


def from_matrix(matrix, shape, output_axes=(-1,)):
    """The inverse of `to_matrix`: lay a matrix [outputs, inputs] out as a kernel of `shape`.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.from_matrix(np.zeros((16, 72)), (3, 3, 8, 16)).shape
    (3, 3, 8, 16)
    """
    order, _ = _matrix_order(len(shape), output_axes)
    return matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _matrix_order(rank, output_axes):
    """The kernel's axes in the order of the matrix view, and those that count outputs."""
    outputs = sorted(axis % rank for axis in output_axes)
    return [*outputs, *(axis for axis in range(rank) if axis not in outputs)], outputs


class Pattern(Configurable):
    """Base class of patterns.

    Subclasses implement `pool(scores) -> group scores` and `expand(kept groups, shape) -> kept weights`. The scores
    come in the kernel's own layout, or as the matrix [outputs, inputs] if the class says `matrix = True`. Weights that
    are masked already have the score -inf.

    Attributes:
        matrix: Whether the pattern is defined on the matrix view.
        sparsity: The sparsity that the pattern stands for, or `None` if it goes with any.
        whole_units: Whether a group is all that an output unit has, so that biases and the like go with it.
        single_weights: Whether each weight is a group, wherever it stands: the same in any layout.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> class Rows(ks.patterns.Pattern):
    ...     def pool(self, scores):
    ...         return scores.mean(axis=1)
    ...     def expand(self, groups, shape):
    ...         return np.broadcast_to(groups[:, None], shape)
    >>> Rows().mask(np.array([[1.0, 2.0], [3.0, 4.0]]), 0.5)
    array([[False, False],
           [ True,  True]])
    """

    matrix = False
    sparsity = None
    whole_units = False
    single_weights = False

    def pool(self, scores):
        """Return one score for each group of weights that must leave together, as an array of any shape."""
        raise TypeError(f"`{type(self).__name__}` must implement `pool(self, scores)`.")

    def expand(self, groups, shape):
        """Spread a boolean for each group, shaped as `pool` returned it, over the weights of `shape`."""
        raise TypeError(f"`{type(self).__name__}` must implement `expand(self, groups, shape)`.")

    def groups(self, shape, output_axes=(-1,)):
        """Return which group each weight of a kernel belongs to.

        Args:
            shape: The kernel's shape.
            output_axes: The axes that count output units.

        Returns:
            Array of int32 of that shape: indices of groups, counted from 0.

        Example:

        >>> import keras_sparse as ks
        >>> ks.patterns.Channel().groups((2, 3))
        array([[0, 1, 2],
               [0, 1, 2]], dtype=int32)
        """
        layout = np.zeros(shape, "float32")
        if self.matrix:
            layout = to_matrix(layout, output_axes)
        pooled = np.asarray(self.pool(layout))
        index = self.expand(np.arange(pooled.size, dtype="int32").reshape(pooled.shape), layout.shape)
        return from_matrix(index, shape, output_axes) if self.matrix else index

    def count(self, sparsity, shapes):
        """How many groups leave at `sparsity`: Python's `round`.

        Args:
            sparsity: In [0, 1].
            shapes: The shapes of arrays of group scores, as `pool` returns them, that share one budget.
        """
        return round(sparsity * sum(math.prod(shape) for shape in shapes))

    def mask(self, scores, sparsity, output_axes=(-1,)):
        """Return which weights stay.

        Args:
            scores: Array of the weight's own shape, such as `(height, width, inputs, outputs)`; higher matters more.
            sparsity: The share of groups to remove, in [0, 1].
            output_axes: The axes that count output units; `(0,)` for a matrix [outputs, inputs].

        Returns:
            Boolean array of the same shape, `True` for weights that stay; `round(sparsity * groups)` groups leave.

        Example: of three filters, the one with the smallest weights leaves.

        >>> import numpy as np, keras_sparse as ks
        >>> kernel = np.ones((3, 3, 8, 3)) * [2.0, 0.1, 1.0]
        >>> ks.patterns.Channel().mask(kernel, 0.33).any(axis=(0, 1, 2))
        array([ True, False,  True])
        """
        scores = np.asarray(scores)
        layout = to_matrix(scores, output_axes) if self.matrix else scores
        pooled = self.pool(layout)
        kept = self.expand(keep_highest(pooled, self.count(sparsity, [pooled.shape])), layout.shape)
        return from_matrix(kept, scores.shape, output_axes) if self.matrix else kept


@PATTERNS.register("unstructured")
class Unstructured(Pattern):
    """Zeros anywhere: every weight is its own group.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.Unstructured().mask(np.array([0.1, -5.0, 2.0, 0.3]), sparsity=0.5)
    array([False, False,  True,  True])
    """

    single_weights = True

    def pool(self, scores):
        return scores

    def expand(self, groups, shape):
        return groups


def _means(scores, rows, cols):
    """Means over rectangles, smaller ones at the edges; masked weights count as 0, and alone make -inf."""
    masked = scores == -np.inf
    sizes = _sums(np.ones(scores.shape, bool), rows, cols)
    if masked.any():
        sums = _sums(np.where(masked, 0, scores), rows, cols)
        sums[_sums(masked, rows, cols) == sizes] = -np.inf
    else:
        sums = _sums(scores, rows, cols)
    return (sums / sizes).astype(scores.dtype)


def _sums(matrix, rows, cols):
    height, width = matrix.shape
    # In double precision, which holds the sum of the largest floats.
    padded = np.zeros((height + -height % rows, width + -width % cols))
    padded[:height, :width] = matrix
    with np.errstate(invalid="ignore"):  # NaN and inf are scores as well
        # A product with ones is several times faster than a sum over an axis as short as most blocks are.
        sums = padded.reshape(len(padded), -1, cols) @ np.ones(cols)
    return sums.reshape(-1, rows, sums.shape[1]).sum(axis=1)


def _ranks(columns):
    """Each score's place in a stable sort along the first axis: ties go by index, and NaN is the highest.

    Args:
        columns: A list of arrays of the same shape, or one array.
    """
    if len(columns) > 16:
        return np.argsort(np.argsort(np.asarray(columns), axis=0, kind="stable"), axis=0)
    # To compare each pair is several times faster than to sort many groups of few.
    missing = [np.isnan(column) for column in columns]
    ranks = [np.zeros_like(column, "uint8") for column in columns]
    for i, j in itertools.combinations(range(len(columns)), 2):
        above = (columns[i] > columns[j]) | (missing[i] & ~missing[j])
        ranks[i] += above
        ranks[j] += ~above
    return ranks


class WithinOutputs:
    """A pattern in which the groups of an output unit compete only with each other: scores become places in a ranking.

    Each unit loses the same number of groups, or one more. A pattern of whole units, or one that is not defined on the
    matrix view, stays as it is.

    Args:
        pattern: The `Pattern`.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> pattern = ks.patterns.WithinOutputs(ks.patterns.Unstructured())
    >>> pattern.pool(np.array([[1.0, 9.0], [30.0, 20.0]]))
    array([[0., 1.],
           [1., 0.]])
    """

    def __init__(self, pattern):
        self._pattern = pattern
        self.matrix = pattern.matrix or pattern.single_weights
        self.count, self.expand = pattern.count, pattern.expand

    def pool(self, scores):
        groups = self._pattern.pool(scores)
        if not self.matrix or groups.ndim < 2:
            return groups
        # What cannot leave, and what has left, is not ranked.
        return np.where(np.isinf(groups), groups, np.transpose(_ranks(groups.T))).astype(groups.dtype)


@PATTERNS.register("channel")
class Channel(Pattern):
    """Whole output units: a row of the matrix view, which is a unit of a dense layer or a filter of a convolution.

    A unit's score is the mean of its weights' scores (with the magnitude: the L1 norm over the number of weights).
    Weights that are masked already count as 0.

    `Pruning`, `prune` and `update_masks` choose by groups, see `ks.channel_groups`: what can only be removed together
    is ranked and masked as one, bias, scale and shift of the batch normalization behind it included, so that its output
    is exactly zero and `ks.shrink` removes it. Where that is not possible a kernel is skipped, with the reason in the
    report. Of models whose graph cannot be seen each kernel is ranked alone: see `ks.graph.unit_variables`.

    Li et al., "Pruning filters for efficient ConvNets" (2017), section 3.1.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.Channel().mask(np.array([[0.1, 3.0], [0.2, 4.0]]), sparsity=0.5)
    array([[False,  True],
           [False,  True]])
    """

    matrix = True
    whole_units = True

    def pool(self, scores):
        return _means(scores, 1, scores.shape[1])[:, 0]

    def expand(self, groups, shape):
        return np.broadcast_to(groups[:, None], shape)


@PATTERNS.register("block")
class Block(Pattern):
    """Blocks of `rows` output units by `cols` consecutive inputs, in the matrix view.

    Blocks at the end that would stand over the edge are smaller. A block's score is the mean of its weights' scores;
    weights that are masked already count as 0.

    Args:
        rows: Output units of a block, at least 1.
        cols: Inputs of a block, at least 1. `Block(1, 4)` is what TFLite's sparse kernels of dense layers run.

    Raises:
        ValueError: If a size is not a whole number of at least 1.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.Block(1, 2).mask(np.array([[0.1], [0.2], [3.0], [4.0]]), sparsity=0.5).ravel()
    array([False, False,  True,  True])
    """

    matrix = True

    def __init__(self, rows=1, cols=4):
        for name, value in (("rows", rows), ("cols", cols)):
            check_whole(name, value)
        self.rows, self.cols = int(rows), int(cols)

    def pool(self, scores):
        return _means(scores, self.rows, self.cols)

    def expand(self, groups, shape):
        return groups.repeat(self.rows, axis=0)[: shape[0]].repeat(self.cols, axis=1)[:, : shape[1]]


@serializable
class NM(Pattern):
    """At most `n` non-zeros in each `m` consecutive inputs of an output unit, in the matrix view: 2:4 is `NM(2, 4)`.

    Its sparsity is 1 - n/m. On the way there, the weights that the pattern will drop (the m - n lowest of each group)
    leave in the order of their scores, so that a mask is refined as the schedule goes and never stands in the way of
    the pattern. Fewer than m inputs at the end of a row are a group that keeps at most n.

    Mishra et al., "Accelerating sparse deep neural networks" (2021); Zhou et al., "Learning N:M fine-grained structured
    sparse neural networks from scratch" (2021).

    Args:
        n: Non-zeros in a group, at least 1.
        m: Consecutive inputs of a group, more than `n`.

    Raises:
        ValueError: If the numbers are not whole or `n` is not below `m`.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> pattern = ks.patterns.NM(2, 4)
    >>> scores = np.array([[4.0, 1.0, 3.0, 2.0, 0.1, 0.2, 0.3, 0.4]])  # of one unit's inputs
    >>> pattern.mask(scores, sparsity=0.5, output_axes=(0,)).astype(int)
    array([[1, 0, 1, 0, 0, 0, 1, 1]])
    >>> pattern.mask(scores, sparsity=0.25, output_axes=(0,)).astype(int)
    array([[1, 1, 1, 1, 0, 0, 1, 1]])
    """

    matrix = True

    def __init__(self, n, m):
        for name, value in (("n", n), ("m", m)):
            check_whole(name, value)
        if n >= m:
            raise ValueError(f"`n` must be below `m`: n non-zeros in m inputs. Received: n={n}, m={m}")
        self.n, self.m = int(n), int(m)

    @property
    def sparsity(self):
        return 1 - self.n / self.m

    def count(self, sparsity, shapes):
        if sparsity > self.sparsity + 1e-6:
            raise ValueError(
                f"{self.n}:{self.m} is a sparsity of {self.sparsity:g}: leave the sparsity out. "
                f"Received: sparsity={sparsity!r}"
            )
        # The same as for other patterns, if m divides the inputs.
        return round(min(1.0, sparsity / self.sparsity) * sum(rows * self._dropped(inputs) for rows, inputs in shapes))

    def _dropped(self, inputs):
        """How many of a unit's inputs leave."""
        groups, rest = divmod(inputs, self.m)
        return groups * (self.m - self.n) + max(0, rest - self.n)

    def pool(self, scores):
        # What stays in its group cannot leave: +inf. The others compete with their own scores, NaN and inf below that.
        highest = np.finfo(scores.dtype).max
        pooled = np.full_like(scores, np.inf)
        inputs = scores.shape[1]
        whole = inputs - inputs % self.m
        for first, end, size in ((0, whole, self.m), (whole, inputs, inputs - whole)):
            if size <= self.n or first == end:
                continue
            # The first of every group, the second of every group, and so on: views, and no copy.
            places = [(slice(None), slice(first + place, end, size)) for place in range(size)]
            for place, rank in zip(places, _ranks([scores[place] for place in places]), strict=True):
                pooled[place] = np.where(rank < size - self.n, np.fmin(scores[place], highest), np.inf)
        return pooled

    def expand(self, groups, shape):
        return groups


def get(identifier):
    """Return a `Pattern` from an instance, a config, a name, or `None`, which stands for `Unstructured()`.

    The names are `"unstructured"`, `"channel"`, `"block"`, which is `Block(1, 4)`, and those that say a size:
    `"block_1x4"`, `"2:4"`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.patterns.get("2:4").get_config()
    {'n': 2, 'm': 4}
    """
    if isinstance(identifier, str):
        for cls, form in ((Block, r"block_(\d+)x(\d+)"), (NM, r"(\d+):(\d+)")):
            sizes = re.fullmatch(form, identifier)
            if sizes:
                return cls(*map(int, sizes.groups()))
    return PATTERNS.get("unstructured" if identifier is None else identifier, Pattern)
