"""An allocation says how a budget of zeros is shared among the weights of a model."""

import math
from dataclasses import dataclass, replace

import numpy as np

from keras_sparse import patterns, selection

__all__ = ["Goal", "erk_counts"]


@dataclass(frozen=True, eq=False)
class Goal:
    """How sparse one weight should become, in which pattern.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> goal = ks.pruning.Plan(model, 0.5).goals[0]
    >>> goal.weight.size, goal.sparsity
    (20, 0.5)
    """

    weight: selection.Weight
    sparsity: float
    pattern: patterns.Pattern

    def pool(self, scores):
        """One score for each group of the pattern, from scores of the weight's shape."""
        return self.pattern.pool(patterns.to_matrix(scores, self.weight.output_axes) if self.pattern.matrix else scores)

    def expand(self, groups):
        """A boolean for each weight, from one for each group."""
        shape, axes = tuple(self.weight.variable.shape), self.weight.output_axes
        if not self.pattern.matrix:
            return self.pattern.expand(groups, shape)
        rows = int(np.prod([shape[axis] for axis in axes]))
        return patterns.from_matrix(self.pattern.expand(groups, (rows, self.weight.size // rows)), shape, axes)


def _uniform(goals, scores, fraction):
    pooled = [goal.pool(s) for goal, s in zip(goals, scores, strict=True)]
    return [
        goal.expand(patterns.keep_highest(groups, goal.pattern.count(fraction * goal.sparsity, [groups.shape])))
        for goal, groups in zip(goals, pooled, strict=True)
    ]


def _global(goals, scores, fraction):
    pooled = [goal.pool(s) for goal, s in zip(goals, scores, strict=True)]
    ranked = np.concatenate([groups.reshape(-1) for groups in pooled])
    count = goals[0].pattern.count(fraction * goals[0].sparsity, [groups.shape for groups in pooled])
    kept = patterns.keep_highest(ranked, count)
    parts = np.split(kept, np.cumsum([groups.size for groups in pooled])[:-1])
    return [goal.expand(part.reshape(groups.shape)) for goal, part, groups in zip(goals, parts, pooled, strict=True)]


# ERK differs from uniform in the goals that a plan sets for each weight, not in how they are met.
ALLOCATIONS = {"uniform": _uniform, "global": _global, "erk": _uniform}


def erk_counts(shapes, sizes, sparsity):
    """Share a budget of zeros among weights by their shapes: the Erdos-Renyi-Kernel rule.

    The density (share of weights that stay) of a kernel is proportional to the sum of its dimensions over their
    product. Kernels whose density would exceed 1 stay dense, and the others share the rest. For dense layers this is
    the random graph of Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity" (2018), equation 3; with the spatial dimensions it is the rule of Evci et al., "Rigging the lottery"
    (2020), section 3.

    Args:
        shapes: The kernels' shapes.
        sizes: How many groups of weights leave together in each: the kernels' sizes, for unstructured zeros.
        sparsity: Float in [0, 1).

    Returns:
        List of ints: how many groups leave each kernel, `round(sparsity * sum(sizes))` in all. Fractions are rounded
        down and what is left goes to the largest fractions, the first of equal ones first.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.erk_counts([(784, 300), (300, 100), (100, 10)], [235200, 30000, 1000], 0.98)
    [231579, 28664, 633]
    """
    kept = sum(sizes) - round(sparsity * sum(sizes))
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense]
        scale = (kept - sum(sizes[i] for i in dense)) / max(sum(raw[i] * sizes[i] for i in rest), 1e-30)
        above = {i for i in rest if scale * raw[i] > 1}
        if not above:
            break
        dense |= above
    live = [float(size) if i in dense else scale * raw[i] * size for i, size in enumerate(sizes)]
    counts = [math.floor(value) for value in live]
    by_fraction = sorted(range(len(sizes)), key=lambda i: counts[i] - live[i])
    for i in by_fraction[: kept - sum(counts)]:
        counts[i] += 1
    return [size - count for size, count in zip(sizes, counts, strict=True)]


def erk_goals(goals):
    sizes = [goal.pool(np.zeros(goal.weight.variable.shape, "float32")).size for goal in goals]
    counts = erk_counts([goal.weight.variable.shape for goal in goals], sizes, goals[0].sparsity)
    return [replace(goal, sparsity=count / size) for goal, count, size in zip(goals, counts, sizes, strict=True)]
