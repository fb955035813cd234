"""A pattern says where zeros may stand: `pattern.mask(scores, sparsity)` returns which weights stay.

A pattern is made of two primitives: `pool` gives one score to each group of weights that must leave together, `expand`
spreads the decision about the groups over the weights. The ranking between them is `keep_highest`.

Patterns with a shape (`Block`, `Channel`) are defined on the weight as a runtime multiplies it: the *matrix view*
[outputs, inputs] of the kernel, whose columns run over the spatial axes first and the input channels fastest, as TFLite
stores them.
"""

import numbers
import re

import numpy as np

from keras_sparse.registry import Configurable, Registry

__all__ = ["Block", "Channel", "Pattern", "Unstructured", "from_matrix", "get", "keep_highest", "to_matrix"]

_REGISTRY = Registry("pattern")


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
    ranked = flat[np.flatnonzero(flat != -np.inf)]
    infinite = flat.size - ranked.size
    # NumPy orders NaN after every number.
    return np.partition(ranked, count - infinite - 1)[count - infinite - 1] if count > infinite else -np.inf


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
    come in the kernel's own layout, or as the matrix [outputs, inputs] if the class says `matrix = True`.

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

    def count(self, sparsity, groups):
        """How many of `groups` groups leave at `sparsity`: Python's `round`."""
        return round(sparsity * groups)

    def mask(self, scores, sparsity):
        """Return which weights stay.

        Args:
            scores: Array of the weight's shape; higher matters more.
            sparsity: The share of groups to remove, in [0, 1].

        Returns:
            Boolean array of the same shape, `True` for weights that stay; `round(sparsity * groups)` groups leave.
        """
        pooled = self.pool(scores)
        return self.expand(keep_highest(pooled, self.count(sparsity, pooled.size)), scores.shape)


@_REGISTRY.register("unstructured")
class Unstructured(Pattern):
    """Zeros anywhere: every weight is its own group.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.Unstructured().mask(np.array([0.1, -5.0, 2.0, 0.3]), sparsity=0.5)
    array([False, False,  True,  True])
    """

    def pool(self, scores):
        return scores

    def expand(self, groups, shape):
        return groups


@_REGISTRY.register("channel")
class Channel(Pattern):
    """Whole output units: a row of the matrix view, which is a unit of a dense layer or a filter of a convolution.

    A unit's score is the mean of its weights' scores.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.Channel().mask(np.array([[0.1, 0.2], [3.0, 4.0]]), sparsity=0.5)
    array([[False, False],
           [ True,  True]])
    """

    matrix = True

    def pool(self, scores):
        return scores.mean(axis=1)

    def expand(self, groups, shape):
        return np.broadcast_to(groups[:, None], shape)


@_REGISTRY.register("block")
class Block(Pattern):
    """Blocks of `rows` output units by `cols` consecutive inputs, in the matrix view.

    Blocks at the end that would stand over the edge are smaller. A block's score is the mean of its weights' scores.

    Args:
        rows: Output units of a block, at least 1.
        cols: Inputs of a block, at least 1. `Block(1, 4)` is what TFLite's sparse kernels of dense layers run.

    Raises:
        ValueError: If a size is not a whole number of at least 1.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.patterns.Block(1, 2).mask(np.array([[0.1, 0.2, 3.0, 4.0]]), sparsity=0.5)
    array([[False, False,  True,  True]])
    """

    matrix = True

    def __init__(self, rows=1, cols=4):
        for name, value in (("rows", rows), ("cols", cols)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1. Received: {name}={value!r}")
        self.rows, self.cols = int(rows), int(cols)

    def pool(self, scores):
        starts = [np.arange(0, n, size) for n, size in zip(scores.shape, (self.rows, self.cols), strict=True)]
        sums = np.add.reduceat(np.add.reduceat(scores, starts[0], axis=0), starts[1], axis=1)
        rows, cols = (np.diff(start, append=n) for start, n in zip(starts, scores.shape, strict=True))
        return sums / np.outer(rows, cols).astype(sums.dtype)

    def expand(self, groups, shape):
        return groups.repeat(self.rows, axis=0)[: shape[0]].repeat(self.cols, axis=1)[:, : shape[1]]

    def get_config(self):
        return {"rows": self.rows, "cols": self.cols}


def get(identifier):
    """Return a `Pattern` from an instance, a config, a name, or `None`, which stands for `Unstructured()`.

    The names are `"unstructured"`, `"channel"` and `"block"`, which is `Block(1, 4)`; `"block_1x4"` and the like say
    the size.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.patterns.get("unstructured")).__name__
    'Unstructured'
    """
    sizes = re.fullmatch(r"block_(\d+)x(\d+)", identifier) if isinstance(identifier, str) else None
    if sizes:
        return Block(int(sizes[1]), int(sizes[2]))
    return _REGISTRY.get("unstructured" if identifier is None else identifier, Pattern)
