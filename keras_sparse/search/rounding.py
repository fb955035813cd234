"""Rounding is what a pattern makes of a sparsity: only whole groups of weights leave, and edges make some smaller."""

import functools
import json

import numpy as np

from keras_sparse import patterns

__all__ = ["Rounding", "rounding"]


class Rounding:
    """How many weights of one kernel are zero at each sparsity, in one pattern.

    Args:
        shape: The kernel's shape.
        output_axes: The axes that count its output units.
        pattern: A `Pattern`, its name or its config.

    Attributes:
        groups: How many groups the pattern makes of the kernel.
        step: How many weights leave with one group, on average.
        excess: By how much the zeros can exceed the sparsity times the size: what is rounded up, and larger groups.

    Example:

    >>> from keras_sparse.search.rounding import Rounding
    >>> kernel = Rounding((5, 4), (1,), "block_1x4")  # a block of 4 weights and one of 1 in each row of the matrix
    >>> kernel.groups, kernel.zeros(0.5), kernel.zeros(0.5, most=True)
    (8, 4.0, 16.0)
    """

    def __init__(self, shape, output_axes, pattern):
        self._pattern = patterns.get(pattern)
        layout = np.zeros(shape, "float32")
        pooled = self._pattern.pool(patterns.to_matrix(layout, output_axes) if self._pattern.matrix else layout)
        self._shape, self.groups, self.step = pooled.shape, pooled.size, layout.size / pooled.size
        self.excess, self._sums = self.step, None
        if pooled.size < layout.size:
            sizes = np.sort(np.bincount(self._pattern.groups(shape, output_axes).ravel()))
            self._sums = np.concatenate([[0], np.cumsum(sizes)])  # of the smallest groups
            largest = self._sums[-1] - self._sums[::-1]
            self.excess = float((largest - self.step * np.arange(len(largest))).max() + sizes[-1])

    def zeros(self, sparsity, most=False):
        """The least number of zeros at a sparsity, or the most: it depends on which groups leave."""
        count = self._pattern.count(sparsity, [self._shape])
        if self._sums is None:
            return count * self.step
        return float(self._sums[-1] - self._sums[self.groups - count] if most else self._sums[count])

    def snapped(self, sparsity):
        """The sparsity of exactly the groups that leave at `sparsity`; itself if it is not a share of groups."""
        exact = self._pattern.count(sparsity, [self._shape]) / self.groups
        return sparsity if self._pattern.sparsity is not None else exact


def rounding(part, pattern):
    """The `Rounding` of a `Part` of a space in the pattern of an option; it is made once.

    Example:

    >>> import keras_sparse as ks
    >>> from keras_sparse.search.rounding import rounding
    >>> rounding(ks.search.space.Part(0, "dense/kernel", (8, 5), (1,)), "channel").zeros(0.5)
    16.0
    """
    return _made(part.shape, part.output_axes, json.dumps(pattern))


@functools.lru_cache(1024)
def _made(shape, output_axes, pattern):
    return Rounding(shape, output_axes, json.loads(pattern))
