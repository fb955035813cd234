"""Pruning in one shot sets weights to zero without training."""

import itertools
import warnings

import keras
import numpy as np

from keras_sparse import batches, criteria, optimizers, reports, selection, zeros
from keras_sparse.pruning.budget import final_target
from keras_sparse.pruning.plan import Plan

__all__ = ["prune"]


def prune(model, sparsity, criterion="magnitude", pattern=None, allocation="uniform", filters=None, data=None):
    """Prune a model's weights in one shot, in place.

    Args:
        model: A built Keras model, compiled or not.
        sparsity: The target: a float in [0, 1), a `ks.Budget`, or a dict as in `ks.callbacks.Pruning`. `None` is the
            pattern's own, if it has one: 1 - n/m.
        criterion: A `Criterion` or its name. Those that rank by gradients (`"snip"`, `"taylor"`, `"gradient"`,
            `"movement"`) need `data`.
        pattern: `None`, a name, or a `Pattern`.
        allocation: `"uniform"`, `"global"`, `"erk"` or a `ks.pruning.Allocation`.
        filters: A regex, a layer, a class of layers, a callable on the variable, or a list of them; see
            `ks.selection.select`.
        data: What to take gradients on: `(x, y)` or `(x, y, sample_weight)`, or what yields such batches and ends. The
            loss that the model is compiled with is differentiated once over it, in batches as `fit` makes them, in
            training mode; the weights and all other state stay as they are. The paper on SNIP takes 100 samples.

    Returns:
        The `Report` of `ks.report(model)`. Weights that are sparser than asked stay so, and its notes say it. They name
        kernels that have no weight left, too, of which a warning tells when they lose the last one.

    Raises:
        ValueError: If the model is not built, a number is out of range, a string names nothing, a filter or key
            matches nothing, or `data` is missing, or given for a criterion that needs none.
        TypeError: If the model is not a Keras 3 model, or an argument is of the wrong type.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    >>> ks.prune(model, 0.9).totals["zeros"]
    90
    """
    selection.check_model(model)
    sparsity = final_target(sparsity, allocation, pattern)
    criterion = criteria.get(criterion)
    # Weights that are not trainable have no gradients.
    plan = Plan(model, sparsity, criterion, pattern, allocation, filters, frozen=criterion.statistic is None)
    statistics = _statistics(model, plan, data)
    optimizer = optimizers.find(model)
    present = plan.present_masks()
    masks = plan.masks(present, statistics=statistics)
    parts = None if optimizer is None else optimizer.sparse_parts
    plan.zero_units(masks, parts)
    for goal, mask in zip(plan.goals, masks, strict=True):
        variable = goal.weight.variable
        variable.assign(optimizers.masked_value(variable, mask))
        state = parts.masks.of(variable) if parts is not None else None
        if state is not None:
            state.assign(mask)
        zeros.remember(variable, mask)
    had_weights = [i for i, mask in enumerate(present) if mask.any()]
    for sentence in reports.emptied([plan.goals[i].weight for i in had_weights], [masks[i] for i in had_weights]):
        warnings.warn(sentence, stacklevel=2)
    reports.remember(model, plan.skipped)
    return reports.report(model, _kept_notes(plan, present))


def _statistics(model, plan, data):
    """The statistics of gradients on `data` that the criterion asks for, an array for each goal."""
    kind = plan.criterion.statistic
    name = type(plan.criterion).__name__
    if kind is None:
        if data is not None:
            raise ValueError(f"`{name}` looks at no gradients: leave `data` out, or give another criterion.")
        return None
    if data is None:
        raise ValueError(
            f"`{name}` ranks weights by gradients: pass `data=(x, y)`, or prune in training, with "
            "`ks.callbacks.Pruning` or, in a loop of your own, `ks.update_masks`. Received: data=None"
        )
    if batches.are_arrays(data):
        raise ValueError(
            "`data` must be (x, y) or (x, y, sample_weight), a tuple, or yield such batches: the loss is taken against "
            f"targets. Received: {type(data).__name__}"
        )
    if not isinstance(data, tuple):
        batches.check(data)
        data = (_started(data) if hasattr(data, "__next__") else data,)
    elif len(data) not in (2, 3):
        raise ValueError(f"`data` must be (x, y) or (x, y, sample_weight). Received: a tuple of {len(data)}")
    elif not len(keras.tree.flatten(data[0])[0]):
        raise ValueError("`data` are empty: at least one sample is needed to take a gradient.")
    variables = [goal.weight.variable for goal in plan.goals]
    with optimizers.measuring(model) as sparse, warnings.catch_warnings():
        statistics = sparse.sparse_parts.statistics
        statistics.add(kind, variables)
        # Keras warns of every generator that ends; this one shall.
        warnings.filterwarnings("ignore", "Your input ran out of data")
        model.fit(*data[:2], sample_weight=data[2] if len(data) == 3 else None, shuffle=False, verbose=0)
        if not selection.as_array(statistics.count_of(kind)):
            raise ValueError("`data` gave no finite gradient: it has no batch, or the loss overflows.")
        return [selection.as_array(statistics.of(variable, kind)) for variable in variables]


def _started(data):
    """The batches of an iterator, of which there is one at least, as a generator, which `fit` takes."""
    first = next(data, None)
    if first is None:
        raise ValueError("`data` are empty: at least one batch is needed to take a gradient.")
    return (batch for batch in itertools.chain([first], data))


def _kept_notes(plan, masks):
    """Sentences about weights that are sparser than their goal."""
    if any(goal.pattern.whole_units for goal in plan.goals):
        return []
    if plan.allocation.shared:
        masked, size = sum(int(np.sum(~mask)) for mask in masks), sum(mask.size for mask in masks)
        pairs = [("The whole", plan.goals[0].sparsity, masked, size)]
    else:
        pairs = [
            (goal.weight.path, goal.sparsity, int(np.sum(~mask)), mask.size)
            for goal, mask in zip(plan.goals, masks, strict=True)
        ]
    return [
        f"{name} was already {masked / size:.1%} sparse, more than the {sparsity:.1%} asked for: kept."
        for name, sparsity, masked, size in pairs
        if masked > round(sparsity * size)
    ]
