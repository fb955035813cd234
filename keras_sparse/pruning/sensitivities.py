"""Sensitivity is what each weight's sparsity costs a model, measured on data, and how a budget is best shared then."""

import functools

import keras
import numpy as np

from keras_sparse import batches, criteria, graph, patterns, selection, states
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.allocation import ALLOCATIONS, Allocation
from keras_sparse.pruning.batch_norm import unchanged_on_failure
from keras_sparse.pruning.budget import as_target
from keras_sparse.pruning.calibration import Calibration, blocks
from keras_sparse.pruning.layerwise import alternatives
from keras_sparse.pruning.one_shot import gradient_statistics
from keras_sparse.pruning.plan import Plan
from keras_sparse.quiet import progress_bar
from keras_sparse.registry import is_real
from keras_sparse.reports import Report, figure_class

__all__ = ["LEVELS", "DynamicProgramming", "SensitivityReport", "sensitivity"]

LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
_STEPS = 20_000  # into which a budget is divided
_LARGE = 1e30  # what stands for a loss that is not finite
_INDEX = 1  # bytes that the place of a weight takes in a file that leaves zeros out


class SensitivityReport(Report):
    """What `ks.sensitivity` measured: a row for each weight, with a column for each sparsity.

    Attributes:
        levels: Tuple of the sparsities.
        loss: The model's own loss, as it came.
        losses: Array [weights, levels]: the loss with one weight that sparse and the others as they came.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)])
    >>> report = ks.sensitivity(model, np.random.default_rng(0).normal(size=(64, 8)), levels=(0.5, 0.9))
    >>> report.losses.shape, bool((report.losses[:, 1] > report.losses[:, 0]).all())
    ((2, 2), True)
    """

    def __init__(self, title, weights, levels, loss, losses, uses, unit):
        self.levels, self.loss, self.losses = levels, loss, losses
        self._weights, self._uses = weights, uses
        rows = [
            {"weight": weight.path, "size": weight.size, "macs": weight.size * used}
            | {f"{level:.4g}": float(value) for level, value in zip(levels, own, strict=True)}
            for weight, own, used in zip(weights, losses, uses, strict=True)
        ]
        formats = dict.fromkeys(("size", "macs"), ",d") | {f"{level:.4g}": ".4g" for level in levels}
        totals = {"loss": float(loss), "unit": unit, "weights": len(weights)}
        columns = ["weight", "size", *(f"{level:.4g}" for level in _spread(levels, 9))]
        super().__init__(title, rows, totals, formats=formats | {"loss": ".4g"}, columns=columns)

    def allocate(self, target):
        """Share a budget among the weights so that the sum of the measured losses is least, by dynamic programming.

        As if what weights cost each other came on top of nothing: the loss of a whole is taken for the sum of the
        increases that its parts cause alone (Frantar & Alistarh, "SPDY: accurate pruning with speedup guarantees"
        (2022), section 3.1). Between two levels a loss is interpolated; it never falls with the sparsity.

        Args:
            target: A float in [0, 1): the share of zeros over all weights of the report, which is met exactly. Or a
                `ks.Budget`: `parameters` (that are not zero), `macs` (multiplications by these) or `bytes` (that they
                take where zeros are left out, with their places), as a share of what the weights have, or an amount.

        Returns:
            Dict from a key for each weight to its sparsity: a target for `ks.prune`, `ks.callbacks.Pruning` and others.

        Raises:
            ValueError: If the levels do not reach the target.
            TypeError: If `target` is neither.

        Example:

        >>> import keras, numpy as np, keras_sparse as ks
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)])
        >>> target = ks.sensitivity(model, np.random.default_rng(0).normal(size=(64, 8))).allocate(0.75)
        >>> ks.prune(model, target).totals["zeros"]
        45
        """
        sizes = np.array([weight.size for weight in self._weights])
        budget = as_target(target).budget
        if budget is not None:
            costs = self._costs(sizes)
            limits = budget.limits({name: float(sum(s * u)) for name, (s, u) in costs.items()})
            [(name, limit), *others] = limits.items()
            if others or name not in costs:
                raise ValueError(
                    f"A budget is divided in one unit: give one of {', '.join(map(repr, costs))}. "
                    f"Received: {budget.get_config()}"
                )
            unit = costs[name][1]
        elif is_real(target):
            if not 0 <= target < 1:
                raise ValueError(f"A sparsity must be at least 0 and below 1. Received: {target!r}")
            unit, limit = np.ones(len(sizes)), float(sizes.sum() - round(target * sizes.sum()))
        else:
            raise TypeError(f"`target` must be a sparsity or a `ks.Budget`. Received: {target!r}")
        levels = (0.0, *self.levels)
        kept = np.array([[size - round(level * size) for level in levels] for size in sizes])
        losses = np.where(np.isfinite(self.losses), self.losses, _LARGE)  # A level that overflows is the last choice.
        rises = np.maximum.accumulate(np.column_stack([np.full(len(sizes), self.loss), losses]), axis=1)
        chosen = _divided(rises - rises[:, :1], kept * unit[:, None], limit)
        if chosen is None:
            least = float((kept[:, -1] * unit).sum())
            raise ValueError(
                f"Levels of up to {levels[-1]:g} leave {least:,.0f} at least, more than {limit:,.0f}: measure higher "
                f"ones, `ks.sensitivity(levels=...)`. Received: {target!r}"
            )
        counts = _filled(rises, kept, unit, chosen, limit)
        return {
            selection.only(weight.path): float(1 - count / weight.size)
            for weight, count in zip(self._weights, counts, strict=True)
        }

    def _costs(self, sizes):
        """`{name: (how many, what each costs)}` of the weights, in the units of a budget."""
        width = np.array([np.dtype(str(w.numpy().dtype)).itemsize for w in self._weights]) + _INDEX
        return {
            "parameters": (sizes, np.ones(len(sizes))),
            "macs": (sizes, np.array(self._uses, float)),
            "bytes": (sizes, width.astype(float)),
        }

    def plot(self):
        """Draw the loss of each weight over its sparsity. Returns a `matplotlib.figure.Figure`."""
        figure = figure_class()(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for weight, own in zip(self._weights, self.losses, strict=True):
            axes.plot(self.levels, own, marker=".", label=weight.path)
        axes.axhline(self.loss, color="gray", linestyle=":", label="as it came")
        axes.set(xlabel="sparsity of one weight", ylabel=self.totals["unit"], title=self.title, yscale="symlog")
        axes.legend(fontsize=7, loc="upper left")
        return figure


def sensitivity(
    model, data, levels=LEVELS, criterion="magnitude", pattern=None, filters=None, repair=None, batch_size=128
):
    """Measure what sparsity costs, weight by weight: each is pruned alone, to each level, and put back.

    Args:
        model: A built Keras model. It is as it was afterwards.
        data: Data as all functions take them, some hundred samples. Inputs without targets: the loss is the mean
            squared change of the outputs, as a share of their variance over the samples. With targets, `(x, y)`,
            `(x, y, sample_weight)` or batches of them: the loss that the model is compiled with.
        levels: Sparsities, rising, in (0, 1).
        criterion: A `Criterion` or its name, as in `ks.prune`; one that ranks by gradients needs `(x, y)`. `"obs"` also
            for what is to be trained: by magnitude, a kernel that has lost its outputs seems to have no more to lose.
        pattern: A `Pattern`, its name, or `None`; not `"channel"`, whose zeros concern several weights, nor one that
            has its own sparsity.
        filters: As in `ks.prune`.
        repair: Whether to solve for the weights that stay, as in `ks.prune`.
        batch_size: Samples in a batch, if `data` are arrays.

    Returns:
        A `SensitivityReport`: what each level costs, `plot()`, and `allocate(target)`.

    Raises:
        ValueError: If an argument is wrong, or nothing can be pruned.
        TypeError: If `model` is not a Keras 3 model, or `data` are of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(2)])
    >>> report = ks.sensitivity(model, np.random.default_rng(0).normal(size=(64, 8)), levels=(0.5, 0.75))
    >>> [row["size"] for row in report.rows], report.totals["loss"]
    ([48, 12], 0.0)
    """
    selection.check_model(model)
    levels = _checked(levels)
    pattern = patterns.get(pattern)
    if pattern.whole_units or pattern.sparsity is not None:
        raise ValueError(
            "Weights are pruned one by one, to any level: channels concern several weights (see `ks.channel_groups`), "
            f"and N:M has a sparsity of its own. Received: pattern={pattern!r}"
        )
    criterion = criteria.get(criterion)
    repair = criterion.repairs if repair is None else repair
    data = _read_once(data, batch_size)
    samples = blocks(data, batch_size)
    calibrated = Calibration(model, samples) if criterion.of_inputs or repair else None
    frozen, unknown = criterion.statistic is None, calibrated.unknown if calibrated else ()
    plan = Plan(model, 0.5, criterion, pattern, filters=filters, frozen=frozen, unknown=unknown)
    statistics = gradient_statistics(model, plan, data if criterion.statistic is not None else None)
    measure, unit = _loss(model, data, samples)
    losses = np.zeros((len(plan.goals), len(levels)))
    index = IdentityDict((goal.weight.variable, i) for i, goal in enumerate(plan.goals))
    with unchanged_on_failure(model), progress_bar("sensitivity", total=losses.size) as advance:
        loss = measure()
        if not np.isfinite(loss):
            raise ValueError(f"The loss of the model as it is must be finite on `data`. Received: {loss}")

        def visit(moments):
            for weight, moment in moments:
                i, before = index[weight.variable], weight.numpy()
                statistic = None if statistics is None else statistics[i]
                for j, value in enumerate(alternatives(plan, i, levels, moment, statistic, repair)):
                    weight.variable.assign(value)
                    losses[i, j] = measure()
                    weight.variable.assign(before)
                    advance()

        weights = [goal.weight for goal in plan.goals]
        if calibrated:
            calibrated.run(weights, visit)
        else:
            visit([(weight, None) for weight in weights])
    one = keras.tree.map_structure(lambda array: array[:1], samples[0])
    found = graph.uses(model, one)
    uses = [found.get(weight.variable, 0) for weight in weights]
    return SensitivityReport(f"Sensitivity of {model.name}", weights, levels, loss, losses, uses, unit)


@ALLOCATIONS.register("dynamic")
class DynamicProgramming(Allocation):
    """The division of the budget that costs least by what `ks.sensitivity` measures on the data of `ks.prune`.

    Args:
        levels: As in `ks.sensitivity`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)])
    >>> data = np.random.default_rng(0).normal(size=(64, 8))
    >>> ks.prune(model, 0.75, criterion="obs", allocation="dynamic", data=data).totals["zeros"]
    45
    """

    measures = True

    def __init__(self, levels=LEVELS):
        self.levels = _checked(levels)

    def measured(self, model, target, data, **arguments):
        """The target of each weight, a dict: `SensitivityReport.allocate` of what `ks.sensitivity` finds."""
        return sensitivity(model, data, self.levels, **arguments).allocate(target)


def _checked(levels):
    levels = tuple(levels) if isinstance(levels, (list, tuple, np.ndarray)) else (levels,)
    if not all(is_real(level) and 0 < level < 1 for level in levels) or list(levels) != sorted(set(levels)):
        raise ValueError(f"`levels` must be sparsities in (0, 1), rising. Received: levels={levels!r}")
    if not levels:
        raise ValueError("`levels` must have at least one sparsity. Received: levels=()")
    return tuple(float(level) for level in levels)


def _read_once(data, batch_size):
    """Data as what can be read again: a tuple of arrays if they have targets, else inputs."""
    given = batches.parts(data)
    if len(given) == 1 and not batches.are_arrays(given[0]):
        found = list(batches.labelled(given[0], batch_size=batch_size))
        if not found or found[0][1] is None:
            return iter([x for x, _, _ in found])
        given = [part for part in batches.whole(iter(found)) if part is not None]
    batches.check(tuple(given), batch_size)
    return tuple(given) if len(given) > 1 else given[0]


def _loss(model, data, samples):
    """A function that measures the model as it is, and what it measures."""
    if isinstance(data, tuple):
        if not getattr(model, "compiled", False):
            raise ValueError("With targets the loss is the model's own: compile it, or pass inputs alone as `data`.")
        x, y, *weight = map(batches.for_fit, data)
        return functools.partial(_compiled_loss, model, x, y, weight[0] if weight else None), "loss"
    outputs = _outputs(model, samples)
    power = [float(np.sum((out - out.mean(axis=0)) ** 2)) or float(np.sum(out**2)) or 1.0 for out in outputs]

    def change():
        now = _outputs(model, samples)
        return float(np.mean([np.sum((a - b) ** 2) / p for a, b, p in zip(now, outputs, power, strict=True)]))

    return change, "squared change of the outputs, as a share of their variance"


def _compiled_loss(model, x, y, weight):
    with states.rewound(model):
        return float(model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)["loss"])


def _outputs(model, samples):
    with states.rewound(model):
        found = [keras.tree.flatten(model.predict_on_batch(batch)) for batch in samples]
    return [np.concatenate([np.asarray(part, np.float64) for part in parts]) for parts in zip(*found, strict=True)]


def _spread(levels, count):
    """At most so many of the levels, the last one among them."""
    if len(levels) <= count:
        return levels
    return [levels[round(i)] for i in np.linspace(0, len(levels) - 1, count)]


def _divided(rises, costs, limit):
    """The level of each weight with the least sum of rises and a sum of costs within the limit; `None` if none is.

    By dynamic programming over the weights: the least sum for each amount that is spent. Costs are rounded up to
    `_STEPS` steps of the limit, so that the limit holds.
    """
    if costs[:, -1].sum() > limit:
        return None
    # What even the sparsest levels cost is spent in any case: steps divide the rest.
    free = max(limit - costs[:, -1].sum(), 0.0)
    extra = costs - costs[:, -1:]
    steps = np.ceil(extra / free * _STEPS - 1e-9).astype(int) if free else np.where(extra > 0, _STEPS + 1, 0)
    best = np.zeros(_STEPS + 1)
    taken = np.zeros((len(costs), _STEPS + 1), np.int32)
    for i, (rise, cost) in enumerate(zip(rises, steps, strict=True)):
        options = np.full((len(rise), _STEPS + 1), np.inf)
        for level, spent in enumerate(cost):
            if spent <= _STEPS:
                options[level, spent:] = best[: _STEPS + 1 - spent] + rise[level]
        taken[i] = options.argmin(axis=0)
        best = options.min(axis=0)
    place, chosen = _STEPS, [0] * len(costs)
    for i in reversed(range(len(costs))):
        chosen[i] = int(taken[i, place])
        place -= steps[i, chosen[i]]
    return chosen


def _filled(rises, kept, unit, chosen, limit):
    """How many weights stay of each: the rest of the limit goes where it lowers the losses most."""
    levels, counts = list(chosen), [int(kept[i, level]) for i, level in enumerate(chosen)]
    rest = limit - sum(count * each for count, each in zip(counts, unit, strict=True))
    while True:
        gains = {}
        for i, level in enumerate(levels):
            room = kept[i, level - 1] - counts[i] if level else 0
            if room and unit[i] <= rest + 1e-9:
                span = (kept[i, level - 1] - kept[i, level]) * max(unit[i], 1e-12)
                gains[i] = (rises[i, level] - rises[i, level - 1]) / span
        if not gains:
            return counts
        i = max(gains, key=gains.get)
        room = int(kept[i, levels[i] - 1] - counts[i])
        more = room if not unit[i] else min(room, int((rest + 1e-9) // unit[i]))
        counts[i] += more
        rest -= more * unit[i]
        if more == room:
            levels[i] -= 1
