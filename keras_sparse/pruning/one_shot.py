"""Pruning in one shot sets weights to zero without training."""

import numpy as np

from keras_sparse import optimizers, reports, selection
from keras_sparse.pruning.budget import final_target
from keras_sparse.pruning.plan import Plan

__all__ = ["prune"]


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
