"""Layerwise pruning goes through a model in the order in which it computes: each layer meets what the pruned ones make.

For each kernel it chooses what stays, if the criterion looks at inputs, and solves for it, if it is to be repaired.
"""

from dataclasses import replace

import numpy as np

from keras_sparse import optimizers, patterns
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.allocation import Uniform
from keras_sparse.pruning.channel_repair import repair_channels
from keras_sparse.pruning.repair import cost, damped, input_statistic, repaired
from keras_sparse.quiet import progress_bar

__all__ = ["alternatives", "prune_layerwise"]

ROUNDS = 8  # in which a criterion that repairs removes weights, at most
AFFORDABLE = 2e9  # sum of (weights that stay)^3 over output units from which on there is another round
CHEAP = 1e8  # sum of (weights)^3 over output units up to which each level of a sensitivity begins anew


def prune_layerwise(plan, masks, calibration, repair, statistics=None):
    """Set the weights of a plan's goals to zero, layer by layer, and return the masks.

    Args:
        plan: The `ks.pruning.Plan`.
        masks: The present masks, a boolean array for each goal.
        calibration: A `ks.pruning.calibration.Calibration` that knows all of the plan's weights.
        repair: Whether to solve for the weights that stay.
        statistics: Of gradients, an array for each goal, if the criterion looks at these.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> from keras_sparse.pruning.calibration import Calibration
    >>> from keras_sparse.pruning.layerwise import prune_layerwise
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> plan = ks.pruning.Plan(model, 0.5, criterion="obs")
    >>> data = np.random.default_rng(0).normal(size=(20, 4))
    >>> masks = prune_layerwise(plan, plan.present_masks(), Calibration(model, [data]), repair=True)
    >>> int(masks[0].sum()), int(np.count_nonzero(model.get_weights()[0]))
    (6, 6)
    """
    import threadpoolctl

    goals, found = plan.goals, list(masks)
    index = IdentityDict((goal.weight.variable, i) for i, goal in enumerate(goals))
    weights = [goal.weight for goal in goals]
    of_channels = repair and plan.whole_units  # then all that read them are solved for, once they are chosen
    if not plan.criterion.of_inputs:
        targets = plan.masks(masks, statistics=statistics)
    elif plan.by_groups or of_channels or plan.allocation.live_paths:
        targets = plan.keep(_shares(plan, masks, calibration), masks)
    elif plan.allocation.shared:
        targets, goals = None, _shared_goals(plan, masks, calibration)
    else:
        targets = None
    if of_channels:
        repair_channels(plan, targets, calibration)
        return targets

    def visit(moments):
        for weight, moment in moments:
            i = index[weight.variable]
            one = _Layer(plan, goals[i], moment, repair)
            # Many small systems of equations: threads, above all those of several libraries, get in each other's way.
            with threadpoolctl.threadpool_limits(1, "blas"):
                if targets is None:
                    one.choose(masks[i], goals[i].sparsity)
                else:
                    one.take(targets[i])
            found[i] = one.mask
            weight.variable.assign(
                optimizers.masked_value(weight.variable, one.mask) if one.value is None else one.value
            )
            advance()

    with progress_bar("prune", total=len(weights)) as advance:
        calibration.run(weights, visit)
    return found


def alternatives(plan, index, levels, moment=None, statistic=None, repair=False):
    """Yield what one of a plan's weights would be at each of some sparsities, as `ks.prune` would make it.

    In a large kernel a criterion that repairs goes on from one sparsity to the next, as in Frantar and Alistarh,
    "Optimal brain compression" (2022), section 5: to begin anew each time would take several times as long.

    Args:
        plan: The `ks.pruning.Plan`.
        index: Of the goal.
        levels: Sparsities, rising.
        moment: The `Moment` of what it multiplies, if the criterion looks at inputs or it is to be repaired.
        statistic: Of gradients, if the criterion looks at these.
        repair: Whether to solve for the weights that stay.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> from keras_sparse.pruning.layerwise import alternatives
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> plan = ks.pruning.Plan(model, 0.5)
    >>> [int(np.sum(keras.ops.convert_to_numpy(value) == 0)) for value in alternatives(plan, 0, [0.25, 0.75])]
    [3, 9]
    """
    import threadpoolctl

    goal, present = plan.goals[index], plan.present_masks()[index]
    one = None if moment is None else _Layer(plan, goal, moment, repair)
    for level in levels:
        with threadpoolctl.threadpool_limits(1, "blas"):
            if plan.criterion.of_inputs:
                one.choose(present, level)
                mask = one.mask
            else:
                [ranked] = plan.compared([replace(goal, sparsity=level)])
                [mask] = Uniform().keep([ranked], [plan.scores(goal, present, statistic)], 1.0)
                mask &= present
                if one is not None:
                    one.take(mask)
        value = None if one is None else one.value
        yield optimizers.masked_value(goal.weight.variable, mask) if value is None else value


def _shares(plan, masks, calibration):
    """The scores of all weights on the inputs of the model as it is, as shares of what their layer puts out.

    So the errors of layers compare: one with outputs of a tenth matters as much as others.
    """
    scores = [None] * len(masks)
    index = IdentityDict((goal.weight.variable, i) for i, goal in enumerate(plan.goals))

    def visit(moments):
        for weight, moment in moments:
            i = index[weight.variable]
            scores[i] = _Layer(plan, plan.goals[i], moment, False).shares(masks[i])
            advance()

    with progress_bar("measure", total=len(masks)) as advance:
        calibration.run([goal.weight for goal in plan.goals], visit)
    return scores


def _shared_goals(plan, masks, calibration):
    """Goals with the sparsity that each gets in one ranking of all weights."""
    shared = plan.keep(_shares(plan, masks, calibration), masks)
    return [replace(goal, sparsity=_dropped(goal, mask)) for goal, mask in zip(plan.goals, shared, strict=True)]


def _dropped(goal, mask):
    groups = goal.pool(mask.astype("float32"))
    return float(np.mean(groups == 0))


class _Layer:
    """One kernel on its way to its goal."""

    def __init__(self, plan, goal, moment, repair):
        self._plan, self._goal, self._repair = plan, goal, repair
        self._moments, self._group_of = np.stack([damped(one) for one in moment.matrices]), moment.group_of
        self._dense = goal.weight.numpy()
        self.mask = self.value = None

    def statistic(self, mask):
        """What the criterion measures of the inputs, in the weight's shape."""
        found = input_statistic(self._plan.criterion, self._matrix(mask), self._moments, self._group_of)
        return self._kernel(found)

    def shares(self, mask):
        """The scores, as shares of the second moment of the outputs."""
        matrix = self._matrix(self._dense).astype(np.float64)
        power = sum(
            np.sum((matrix[units] @ self._moments[group]) * matrix[units])
            for group in np.unique(self._group_of)
            for units in [np.flatnonzero(self._group_of == group)]
        )
        return self._plan.scores(self._goal, mask, self.statistic(mask)) / (power or 1.0)

    def take(self, mask):
        """Let the weights of a mask stay."""
        self.mask = mask
        if self._repair:
            new = repaired(self._matrix(self._dense), self._matrix(mask), self._moments, self._group_of)
            self.value = self._kernel(new).astype(self._dense.dtype)

    def choose(self, mask, sparsity):
        """Choose by the criterion what stays of a mask, in rounds if weights change in between.

        What was chosen before, for a lower sparsity, is what the rounds begin with, if to begin anew costs more, and
        one can afford its scores.
        """
        [goal] = self._plan.compared([replace(self._goal, sparsity=sparsity)])
        units, inputs = self._matrix(self._dense).shape
        left = 1.0
        if self.value is None or units * inputs**3 <= CHEAP or cost(self._matrix(self.mask)) > AFFORDABLE:
            self.mask, self.value = mask, None
        else:
            left = float(np.mean(self.mask))
        for fraction in self._fractions(goal.sparsity, left) if self._repair and goal.sparsity else [1.0]:
            value = self._dense if self.value is None else self.value
            scores = self._plan.scores(goal, self.mask, self.statistic(self.mask), value)
            [new] = Uniform().keep([goal], [scores], fraction)
            self.take(new & self.mask)

    def _fractions(self, sparsity, left):
        """How far each round goes, from what is left: each leaves the same share of what the one before it left.

        The first one is cheap, because all output units have the same inputs. It goes as far as the second one needs.
        """
        units, inputs = self._matrix(self._dense).shape
        kept = [(1 - sparsity) ** (step / ROUNDS) for step in range(1, ROUNDS)]
        kept = [share for share in kept if share < left and units * (share * inputs) ** 3 <= AFFORDABLE]
        return [*((1 - share) / sparsity for share in kept), 1.0]

    def _matrix(self, array):
        return patterns.to_matrix(array, self._goal.weight.output_axes)

    def _kernel(self, matrix):
        return patterns.from_matrix(matrix, self._dense.shape, self._goal.weight.output_axes)
