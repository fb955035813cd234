"""An allocation says how a budget of zeros is shared among the weights of a model."""

import functools
import math
import numbers
from dataclasses import dataclass, replace

import numpy as np

from keras_sparse import patterns, selection
from keras_sparse.registry import Configurable, Registry, is_real

# All but `get` are names of `ks.pruning`.
__all__ = ["ERK", "Allocation", "Global", "Goal", "Isomorphic", "Uniform", "erk_counts"]

ALLOCATIONS = Registry("allocation")


@dataclass(frozen=True, eq=False)
class Goal:
    """How sparse one weight should become, in which pattern.

    `units` are the variables whose entries leave with output units, for whole channels: see `ks.graph.unit_variables`.

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
    units: tuple = ()

    def unit_mask(self, mask):
        """Which output units have a weight that stays, a boolean vector."""
        return patterns.to_matrix(mask, self.weight.output_axes).any(axis=1)

    @functools.cached_property
    def group_shape(self):
        """The shape of the scores that `pool` returns."""
        return self.pool(np.zeros(self.weight.variable.shape, "float32")).shape

    @property
    def groups(self):
        """How many groups of weights the pattern makes of the weight."""
        return math.prod(self.group_shape)

    def dropped(self, mask):
        """How many groups have no weight that stays."""
        return int(np.sum(self.pool(mask.astype("float32")) == 0))

    def pool(self, scores):
        """One score for each group of the pattern, from scores of the weight's shape."""
        return self.pattern.pool(patterns.to_matrix(scores, self.weight.output_axes) if self.pattern.matrix else scores)

    def expand(self, groups):
        """A boolean for each weight, from one for each group."""
        shape, axes = tuple(self.weight.variable.shape), self.weight.output_axes
        rows = int(np.prod([shape[axis] for axis in axes]))
        layout = (rows, self.weight.size // rows) if self.pattern.matrix else shape
        kept = np.asarray(self.pattern.expand(groups, layout))
        if kept.shape != layout or kept.dtype != bool:
            raise ValueError(
                f"`{type(self.pattern).__name__}.expand` must return booleans of the shape {layout} for "
                f"{self.weight.path}. Received: shape {kept.shape}, dtype {kept.dtype}"
            )
        return patterns.from_matrix(kept, shape, axes) if self.pattern.matrix else kept


class Allocation(Configurable):
    """Base class of allocations. Subclasses implement `keep(goals, scores, fraction) -> masks`.

    Attributes:
        live_paths: Whether weights that lead nowhere rank below all others: those into units that nothing reads any
            more, and out of units that read nothing.
        shared: Whether the target is one for all weights together, not one for each.
        redistributes: Whether `share` gives weights other targets than they came with.
        like_with_like: Whether channels are ranked among groups of the same structure only.
        measures: Whether it needs data: `measured(model, target, data, ...)` makes a dict of the target then.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.Global().shared, ks.pruning.Uniform().shared
    (True, False)
    """

    live_paths = False
    shared = False
    redistributes = False
    like_with_like = False
    measures = False

    def share(self, goals):
        """Return the goals with the sparsity that each weight should have by this allocation."""
        return goals

    def least(self, size):
        """How many of the `size` groups of a weight must stay."""
        return 0

    def keep(self, goals, scores, fraction):
        """Return which weights stay at `fraction` of the way, a boolean array for each goal."""
        raise TypeError(f"`{type(self).__name__}` must implement `keep(self, goals, scores, fraction)`.")


@ALLOCATIONS.register("uniform")
class Uniform(Allocation):
    """Every weight gets the target.

    Args:
        live_paths: Whether weights on dead paths are pruned first, see `ks.graph.Paths`, so that the same number of
            weights that stay are all of use. At high sparsity many lead nowhere else: into units without outputs, or
            out of units without inputs. `True` needs a model whose graph is seen (functional or Sequential). Weights
            on dead paths stay only where the target leaves more weights than there are places on live ones.

    Example:

    Of three units the last has no output. What it reads goes first, large as it is:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1, use_bias=False)])
    >>> weights = [np.array([[1.0, 2.0, 8.0], [3.0, 4.0, 9.0]]), np.zeros(3), np.array([[5.0], [6.0], [0.1]])]
    >>> model.set_weights(weights)
    >>> report = ks.prune(model, 0.34, allocation=ks.pruning.Uniform(live_paths=True))
    >>> model.get_weights()[0].tolist(), model.get_weights()[2][:, 0].tolist()
    ([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]], [5.0, 6.0, 0.0])
    """

    def __init__(self, live_paths=False):
        self.live_paths = _flag(live_paths)

    def keep(self, goals, scores, fraction):
        pooled = [goal.pool(s) for goal, s in zip(goals, scores, strict=True)]
        return [
            goal.expand(patterns.keep_highest(groups, goal.pattern.count(fraction * goal.sparsity, [groups.shape])))
            for goal, groups in zip(goals, pooled, strict=True)
        ]


@ALLOCATIONS.register("global")
class Global(Allocation):
    """One ranking over all weights, so that the whole gets the target, with an optional floor for each.

    Args:
        floor: What stays in each weight at least: a float is a share of its groups (of its single weights, for
            unstructured zeros; rounded up), an int counts groups. The budget that a floor protects moves on to the
            other weights, so that the total is met exactly.
        live_paths: As in `ks.pruning.Uniform`.

    Raises:
        ValueError: If `floor` is out of range.
        TypeError: If it is no number, or `live_paths` no boolean.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((50,)), keras.layers.Dense(20), keras.layers.Dense(5)])
    >>> model.layers[1].kernel.assign(model.layers[1].kernel * 1e-3) is None
    False
    >>> report = ks.prune(model, 0.9, allocation=ks.pruning.Global(floor=0.05))
    >>> [row["zeros"] for row in report.rows if row["size"] > 50]
    [895, 95]
    """

    shared = True

    def __init__(self, floor=0, live_paths=False):
        self.live_paths = _flag(live_paths)
        if not is_real(floor):
            raise TypeError(f"`floor` must be a number. Received: floor={floor!r} of type {type(floor).__name__}")
        if not 0 <= floor < (math.inf if isinstance(floor, numbers.Integral) else 1):
            raise ValueError(
                f"`floor` must be a share in [0, 1) or a whole number of at least 0. Received: floor={floor!r}"
            )
        self.floor = floor

    def share(self, goals):
        sizes = [goal.groups for goal in goals]
        stay = sum(self.least(size) for size in sizes)
        if stay > sum(sizes) - round(goals[0].sparsity * sum(sizes)):
            raise ValueError(
                f"A floor of {self.floor!r} keeps {stay} of {sum(sizes)} weights (groups of the pattern), more than a "
                f"sparsity of {goals[0].sparsity!r} leaves. Lower one of them. Received: floor={self.floor!r}"
            )
        return goals

    def least(self, size):
        return min(size, self.floor if isinstance(self.floor, numbers.Integral) else math.ceil(self.floor * size))

    def keep(self, goals, scores, fraction):
        pooled = [self._protect(goal.pool(s)) for goal, s in zip(goals, scores, strict=True)]
        ranked = np.concatenate([groups.reshape(-1) for groups in pooled])
        count = goals[0].pattern.count(fraction * goals[0].sparsity, [groups.shape for groups in pooled])
        kept = patterns.keep_highest(ranked, count)
        parts = np.split(kept, np.cumsum([groups.size for groups in pooled])[:-1])
        return [
            goal.expand(part.reshape(groups.shape)) for goal, part, groups in zip(goals, parts, pooled, strict=True)
        ]

    def _protect(self, groups):
        """The scores, with NaN, which is always kept, for the best live ones."""
        least = self.least(groups.size)
        if not least:
            return groups
        best = patterns.keep_highest(groups, groups.size - least) & (groups != -np.inf)
        return np.where(best, np.nan, groups)


@ALLOCATIONS.register("isomorphic")
class Isomorphic(Allocation):
    """One ranking over the channels of all groups of the same structure: like with like, `pattern="channel"` only.

    Groups have the same structure if their layers and weights are of the same kinds. Each structure gets the target.
    Fang et al., "Isomorphic pruning for vision models" (2024), section 3.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layers = [keras.layers.Dense(8), keras.layers.Dense(8), keras.layers.Dense(8), keras.layers.Dense(2)]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> report = ks.prune(model, 0.5, pattern="channel", allocation="isomorphic")
    >>> ks.channel_groups(model).totals["removable"]
    12
    """

    shared = True
    like_with_like = True

    def keep(self, goals, scores, fraction):
        raise ValueError(
            "allocation='isomorphic' ranks channels: it goes with pattern='channel' and a model whose graph is seen. "
            f"Received: pattern={goals[0].pattern!r}"
        )


@ALLOCATIONS.register("erk")
class ERK(Uniform):
    """Each weight gets its share of the target by its shape: the Erdos-Renyi-Kernel rule, see `erk_counts`.

    Args:
        live_paths: As in `ks.pruning.Uniform`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((50,)), keras.layers.Dense(20), keras.layers.Dense(5)])
    >>> report = ks.prune(model, 0.5, allocation="erk")
    >>> [row["zeros"] for row in report.rows if row["size"] > 50]
    [550, 0]
    """

    redistributes = True

    def share(self, goals):
        counts = erk_counts(
            [goal.weight.variable.shape for goal in goals], [goal.groups for goal in goals], goals[0].sparsity
        )
        return [replace(goal, sparsity=count / goal.groups) for goal, count in zip(goals, counts, strict=True)]


def get(identifier):
    """Return an `Allocation` from an instance, a config, or a name: `"uniform"`, `"global"`, `"erk"`, `"isomorphic"`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.allocation.get("global").get_config()
    {'floor': 0, 'live_paths': False}
    """
    return ALLOCATIONS.get(identifier, Allocation)


def _flag(live_paths):
    if not isinstance(live_paths, bool):
        raise TypeError(f"`live_paths` must be True or False. Received: live_paths={live_paths!r}")
    return live_paths


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
    if not is_real(sparsity) or not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be a number of at least 0 and below 1. Received: sparsity={sparsity!r}")
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
