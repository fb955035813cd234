"""Loops that a user writes by hand move their masks themselves."""

import keras

from keras_sparse import optimizers, patterns, reports, selection, zeros
from keras_sparse.pruning.budget import final_target
from keras_sparse.pruning.plan import Plan

__all__ = ["update_masks"]


def update_masks(
    model, sparsity=None, criterion="magnitude", pattern=None, allocation="uniform", filters=None, optimizer=None
):
    """Recompute the masks of a model that trains with a `SparseOptimizer`: the call of a custom training loop.

    Call it before the loop, so that compiled steps see the masks, and whenever the sparsity should move:
    `ks.update_masks(model, 0.9 * schedule(step / steps))`. Masked weights stay masked.

    Args:
        model: A built Keras model.
        sparsity: The sparsity to have now, as in `ks.prune`; for `"2:4"` it may be below the pattern's own. `None` is
            the pattern's own, if it has one, and keeps the zeros that are there otherwise.
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
    if sparsity is None and patterns.get(pattern).sparsity is None:
        sparsity = 0.0
    sparsity = final_target(sparsity, allocation, pattern, on_the_way=True)
    plan = Plan(model, sparsity, criterion, pattern, allocation, filters)
    plan.attach(sparse.sparse_parts)
    optimizers.refresh(model, sparse.sparse_parts)
    for goal, mask in zip(plan.goals, plan.update(sparse.sparse_parts), strict=True):
        zeros.remember(goal.weight.variable, mask)
    reports.remember(model, plan.skipped)
    return reports.report(model)
