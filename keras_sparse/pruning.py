"""Pruning decides which weights become zero: a plan of how sparse each weight should be, and the masks it leads to."""

import math
import numbers
from dataclasses import dataclass, replace

import keras
import numpy as np

from keras_sparse import criteria, optimizers, patterns, reports, selection

__all__ = ["Goal", "Plan", "erk_counts", "final_target", "prune", "update_masks"]


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


class Plan:
    """Which weights of a model become how sparse.

    Args:
        model: A built Keras model.
        target_sparsity: A float in [0, 1), or a dict `{regex: sparsity}` or `{regex: (sparsity, pattern)}` that is
            searched in each weight's path: the first match wins, weights that no key matches stay dense.
        criterion: A `Criterion` or its name.
        pattern: A `Pattern`, its name, or `None`.
        allocation: `"uniform"`: every weight gets the target; `"global"`: one ranking over all weights, so that the
            whole gets it; `"erk"`: each weight gets its share of the target by its shape, see `erk_counts`.
        filters: As in `ks.selection.select`.
        frozen: Whether kernels that are not trainable take part.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(5, name="b")])
    >>> plan = ks.pruning.Plan(model, {"a/": 0.5})
    >>> [(goal.weight.path.split("/")[-2], goal.sparsity) for goal in plan.goals]
    [('a', 0.5)]
    """

    def __init__(
        self,
        model,
        target_sparsity,
        criterion="magnitude",
        pattern=None,
        allocation="uniform",
        filters=None,
        frozen=False,
    ):
        check_target(target_sparsity, allocation)
        self.criterion = criteria.get(criterion)
        self.allocation = allocation
        pattern = patterns.get(pattern)
        weights = selection.select(model, filters, frozen)
        targets = _targets(target_sparsity, [w for w in weights if w.kernel and not w.skipped])
        self.goals = [
            Goal(weight, sparsity, pattern if own is None else patterns.get(own)) for weight, sparsity, own in targets
        ]
        if allocation == "erk":
            self.goals = _erk_goals(self.goals)
        chosen = {id(goal.weight.variable) for goal in self.goals}
        self.skipped = {
            id(w.variable): w.skipped or "no key of `target_sparsity` matches"
            for w in weights
            if id(w.variable) not in chosen
        }

    def masks(self, masks, fraction=1.0, statistics=None):
        """Return the masks at `fraction` of the way to the goals.

        Weights that are masked stay so: the new masks are subsets of `masks`.

        Args:
            masks: The present masks, a boolean array for each goal.
            fraction: In [0, 1].
            statistics: What the criterion's `statistic` says, an array for each goal.

        Returns:
            List of boolean arrays. `round(fraction * sparsity * groups)` groups of each weight are masked (of all
            weights together for `"global"`), or what was masked before if that is more.
        """
        statistics = [None] * len(masks) if statistics is None else statistics
        scores = [self._scores(*arguments) for arguments in zip(self.goals, masks, statistics, strict=True)]
        new = _ALLOCATIONS[self.allocation](self.goals, scores, fraction)
        return [mask & old for mask, old in zip(new, masks, strict=True)]

    def reached(self, masks):
        """Whether `masks` are at the goals, by the counts that `masks` promises."""
        # A group is dropped if none of its weights is kept.
        groups = [goal.pool(mask.astype("float32")) for goal, mask in zip(self.goals, masks, strict=True)]
        dropped = [int(np.sum(group == 0)) for group in groups]
        if self.allocation == "global":
            return sum(dropped) >= self.goals[0].pattern.count(self.goals[0].sparsity, [g.shape for g in groups])
        wanted = [goal.pattern.count(goal.sparsity, [g.shape]) for goal, g in zip(self.goals, groups, strict=True)]
        return all(have >= want for have, want in zip(dropped, wanted, strict=True))

    def present_masks(self):
        """Masks that keep what is not zero now; a weight that is all zeros counts as zero-initialised."""
        return [_nonzero(goal.weight.numpy()) for goal in self.goals]

    def attach(self, optimizer):
        """Give each goal's weight a mask in `optimizer` that keeps the zeros it has, and the statistic it needs.

        Returns whether any of that was new.
        """
        new = [goal.weight for goal in self.goals if optimizer.mask_of(goal.weight.variable) is None]
        created = optimizer.add_masks([weight.variable for weight in new])
        for weight in new:
            optimizer.mask_of(weight.variable).assign(_nonzero(weight.numpy()))
        kind = self.criterion.statistic
        if kind is not None:
            created |= optimizer.add_statistics(kind, [goal.weight.variable for goal in self.goals])
        return created

    def update(self, optimizer, fraction=1.0):
        """Move the masks in `optimizer` to `fraction` of the way, zero what they mask, and return them as arrays."""
        variables = [optimizer.mask_of(goal.weight.variable) for goal in self.goals]
        masks = self.masks([selection.as_array(mask) for mask in variables], fraction, self._read(optimizer, fraction))
        for variable, mask in zip(variables, masks, strict=True):
            variable.assign(mask)
        optimizer.apply_masks()
        return masks

    def _read(self, optimizer, fraction):
        """The statistics that `optimizer` has kept for the criterion, as arrays."""
        kind = self.criterion.statistic
        if kind is None:
            return None
        if fraction * max(goal.sparsity for goal in self.goals) > 0 and not selection.as_array(
            optimizer.count_of(kind)
        ):
            raise ValueError(
                f"`{type(self.criterion).__name__}` ranks weights by gradients, and no training step has been taken "
                "yet. Let pruning begin later (`begin=1` is after the first step)."
            )
        return [selection.as_array(optimizer.statistic_of(goal.weight.variable, kind)) for goal in self.goals]

    def _scores(self, goal, mask, statistic):
        try:
            scores = self.criterion(goal.weight.numpy(), statistic)
        except ValueError as error:
            raise ValueError(f"{goal.weight.path}: {error}") from error
        # Below every live score, -inf included. (By index: a boolean mask takes three times as long.)
        scores = np.maximum(scores, np.finfo(scores.dtype).min)
        np.put(scores, np.flatnonzero(~mask), -np.inf)
        return scores


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
_ALLOCATIONS = {"uniform": _uniform, "global": _global, "erk": _uniform}


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


def _erk_goals(goals):
    sizes = [goal.pool(np.zeros(goal.weight.variable.shape, "float32")).size for goal in goals]
    counts = erk_counts([goal.weight.variable.shape for goal in goals], sizes, goals[0].sparsity)
    return [replace(goal, sparsity=count / size) for goal, count, size in zip(goals, counts, sizes, strict=True)]


def prune(model, sparsity, criterion="magnitude", pattern=None, allocation="uniform", filters=None):
    """Prune a model's weights in one shot, in place.

    Args:
        model: A built Keras model, compiled or not.
        sparsity: The target: a float in [0, 1), or a dict as in `ks.callbacks.Pruning`. `None` is the pattern's own, if
            it has one: 1 - n/m.
        criterion: `"magnitude"`, `"random"` or a `Criterion`.
        pattern: `None`, a name, or a `Pattern`.
        allocation: `"uniform"`, `"global"` or `"erk"`.
        filters: A regex, a list of them, or a callable on the variable; see `ks.selection.select`.

    Returns:
        The `Report` of `ks.report(model)`. Weights that are sparser than asked stay so, and its notes say it.

    Raises:
        ValueError: If the model is not built, a number is out of range, a string names nothing, or a filter or key
            matches nothing.
        TypeError: If the model is not a Keras 3 model, or an argument is of the wrong type.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    >>> ks.prune(model, 0.9).totals["zeros"]
    90
    """
    selection.check_model(model)
    sparsity = final_target(sparsity, allocation, pattern)
    plan = Plan(model, sparsity, criterion, pattern, allocation, filters, frozen=True)
    if plan.criterion.statistic is not None:
        raise ValueError(
            f"`{type(plan.criterion).__name__}` ranks weights by gradients, which only training has: use "
            "`ks.callbacks.Pruning` or, in a loop of your own, `ks.update_masks`. "
            f"Received: criterion={criterion!r}"
        )
    optimizer = optimizers.find(model)
    present = plan.present_masks()
    for goal, mask in zip(plan.goals, plan.masks(present), strict=True):
        variable = goal.weight.variable
        variable.assign(optimizers.masked_value(variable, mask))
        state = optimizer.mask_of(variable) if optimizer is not None else None
        if state is not None:
            state.assign(mask)
    reports.remember(model, plan.skipped)
    return reports.report(model, _kept_notes(plan, present))


def update_masks(
    model, sparsity=None, criterion="magnitude", pattern=None, allocation="uniform", filters=None, optimizer=None
):
    """Recompute the masks of a model that trains with a `SparseOptimizer`: the call of a custom training loop.

    Call it before the loop, so that compiled steps see the masks, and whenever the sparsity should move:
    `ks.update_masks(model, 0.9 * schedule(step / steps))`. Masked weights stay masked.

    Args:
        model: A built Keras model.
        sparsity: The sparsity to have now, as in `ks.prune`. `None` keeps the zeros that are there.
        criterion: As in `ks.prune`.
        pattern: As in `ks.prune`.
        allocation: As in `ks.prune`.
        filters: As in `ks.prune`.
        optimizer: The `SparseOptimizer`, if it is not `model.optimizer`.

    Returns:
        The `Report` of `ks.report(model)`.

    Raises:
        ValueError: If there is no `SparseOptimizer`, and as in `ks.prune`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1)), "mse")
    >>> ks.update_masks(model, 0.5).totals["zeros"]
    16
    """
    selection.check_model(model)
    sparse = optimizers.find(model) if optimizer is None else optimizer
    if isinstance(sparse, keras.optimizers.LossScaleOptimizer):
        sparse = sparse.inner_optimizer
    if not isinstance(sparse, optimizers.SparseOptimizer):
        received = getattr(model, "optimizer", None) if optimizer is None else optimizer
        raise ValueError(
            "`update_masks` needs a `SparseOptimizer`: compile the model with "
            "`ks.optimizers.SparseOptimizer(optimizer)` or pass it as `optimizer`. "
            f"Received: {type(received).__name__}"
        )
    if not sparse.built:
        sparse.build(model.trainable_variables)
    plan = Plan(model, 0.0 if sparsity is None else sparsity, criterion, pattern, allocation, filters)
    if plan.attach(sparse):
        optimizers.drop_functions(model)
    plan.update(sparse)
    reports.remember(model, plan.skipped)
    return reports.report(model)


def check_target(target_sparsity, allocation="uniform"):
    """Raise unless `target_sparsity` and `allocation` are as `Plan` takes them."""
    if not isinstance(allocation, str) or allocation not in _ALLOCATIONS:
        raise ValueError(f"`allocation` must be one of {sorted(_ALLOCATIONS)}. Received: allocation={allocation!r}")
    if not isinstance(target_sparsity, dict):
        _check_sparsity(target_sparsity)
        return
    if not target_sparsity:
        raise ValueError("A dict of target sparsities must have at least one key. Received: {}")
    if allocation != "uniform":
        raise ValueError(
            "A dict of target sparsities says itself how the budget is shared: it goes with allocation='uniform'. "
            f"Received: allocation={allocation!r}, target={target_sparsity!r}"
        )
    for value in target_sparsity.values():
        sparsity, pattern = _sparsity_and_pattern(value)
        _check_sparsity(sparsity)
        patterns.get(pattern)


def final_target(target_sparsity, allocation, pattern):
    """Return the sparsity to end at, checked: `None` stands for the pattern's own, where it has one.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.final_target(None, "uniform", ks.patterns.NM(2, 4))
    0.5
    """
    pattern = patterns.get(pattern)
    if target_sparsity is None:
        target_sparsity = pattern.sparsity
    check_target(target_sparsity, allocation)
    values = target_sparsity.values() if isinstance(target_sparsity, dict) else [target_sparsity]
    for sparsity, own in map(_sparsity_and_pattern, values):
        own = pattern if own is None else patterns.get(own)
        if own.sparsity is None:
            continue
        if allocation == "erk" or not math.isclose(sparsity, own.sparsity, abs_tol=1e-6):
            raise ValueError(
                f"The pattern {own.get_config()} is a sparsity of {own.sparsity:g} in each weight: leave the target "
                f"out, or give this one, with allocation='uniform'. Received: {sparsity!r}, allocation={allocation!r}"
            )
    return target_sparsity


def _check_sparsity(value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            "A sparsity is a number in [0, 1), the share of weights to set to zero, or a dict of such numbers. "
            f"Received: {value!r} of type {type(value).__name__}"
        )
    if math.isnan(value) or not 0 <= value < 1:
        hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
        raise ValueError(
            "A sparsity must be at least 0 and below 1: the share of weights to set to zero. "
            f"Received: {value!r}.{hint}"
        )


def _sparsity_and_pattern(value):
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"Expected a sparsity or a pair (sparsity, pattern). Received: {value!r}")
        return value
    return value, None


def _targets(target_sparsity, weights):
    """List `(weight, sparsity, own pattern or None)` for the weights that have a target."""
    if not isinstance(target_sparsity, dict):
        return [(weight, float(target_sparsity), None) for weight in weights]
    found = {}
    for regex, value in target_sparsity.items():
        for weight in selection.matching(regex, weights):
            found.setdefault(id(weight.variable), _sparsity_and_pattern(value))
    return [(w, float(found[id(w.variable)][0]), found[id(w.variable)][1]) for w in weights if id(w.variable) in found]


def _nonzero(value):
    mask = value != 0
    return mask if mask.any() else np.ones_like(mask)


def _kept_notes(plan, masks):
    """Sentences about weights that are sparser than their goal."""
    if plan.allocation == "global":
        zeros, size = sum(int(np.sum(~mask)) for mask in masks), sum(mask.size for mask in masks)
        pairs = [("The whole", plan.goals[0].sparsity, zeros, size)]
    else:
        pairs = [
            (goal.weight.path, goal.sparsity, int(np.sum(~mask)), mask.size)
            for goal, mask in zip(plan.goals, masks, strict=True)
        ]
    return [
        f"{name} was already {zeros / size:.1%} sparse, more than the {sparsity:.1%} asked for: kept."
        for name, sparsity, zeros, size in pairs
        if zeros > round(sparsity * size)
    ]
