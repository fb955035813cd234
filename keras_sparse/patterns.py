"""A pattern says where zeros may stand: `pattern.mask(scores, sparsity)` returns which weights stay.

A pattern is made of two primitives: `pool` gives one score to each group of weights that must leave together, `expand`
spreads the decision about the groups over the weights. The ranking between them is `keep_highest`.
"""

import numpy as np

from keras_sparse.registry import Configurable, Registry

__all__ = ["Pattern", "Unstructured", "get", "keep_highest"]

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


class Pattern(Configurable):
    """Base class of patterns.

    Subclasses implement `pool(scores) -> group scores` and `expand(kept groups, shape) -> kept weights`.

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

    def pool(self, scores):
        """Return one score for each group of weights that must leave together, as an array of any shape."""
        raise TypeError(f"`{type(self).__name__}` must implement `pool(self, scores)`.")

    def expand(self, groups, shape):
        """Spread a boolean for each group, shaped as `pool` returned it, over the weights of `shape`."""
        raise TypeError(f"`{type(self).__name__}` must implement `expand(self, groups, shape)`.")

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


def get(identifier):
    """Return a `Pattern` from an instance, a config, `"unstructured"`, or `None`, which stands for `Unstructured()`.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.patterns.get("unstructured")).__name__
    'Unstructured'
    """
    return _REGISTRY.get("unstructured" if identifier is None else identifier, Pattern)
