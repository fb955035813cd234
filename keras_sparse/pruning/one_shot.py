"""Pruning in one shot sets weights to zero without training."""

import itertools
import warnings

import keras
import numpy as np

from keras_sparse import batches, criteria, optimizers, reports, selection, zeros
from keras_sparse.pruning import allocation as allocations
from keras_sparse.pruning import calibration
from keras_sparse.pruning.batch_norm import normalizations, reestimate, unchanged_on_failure
from keras_sparse.pruning.budget import final_target
from keras_sparse.pruning.layerwise import prune_layerwise
from keras_sparse.pruning.plan import Plan

__all__ = ["gradient_statistics", "prune"]

_TIMES = "Milliseconds without dead channels: {asked:.4g} asked, {promised:.4g} by the tables, {measured:.4g} measured."
_RETURNED = "Outputs of the model that are zero now, whatever it gets: {}. Leave its last layer out with `filters`."


def prune(
    model,
    sparsity,
    criterion="magnitude",
    pattern=None,
    allocation="uniform",
    filters=None,
    data=None,
    repair=None,
    batch_size=32,
):
    """Prune a model's weights in one shot, in place.

    Args:
        model: A built Keras model, compiled or not.
        sparsity: The target: a float in [0, 1), a `ks.Budget`, or a dict as in `ks.callbacks.Pruning`. `None` is the
            pattern's own, if it has one: 1 - n/m.
        criterion: A `Criterion` or its name. Those that rank by gradients (`"snip"`, `"taylor"`, `"gradient"`,
            `"movement"`) need `data`.
        pattern: `None`, a name, or a `Pattern`.
        allocation: `"uniform"`, `"global"`, `"erk"`, or `"dynamic"`, which measures the model on `data` first
            (`ks.sensitivity`); or a `ks.pruning.Allocation`.
        filters: A regex, a layer, a class of layers, a callable on the variable, or a list of them; see
            `ks.selection.select`.
        data: Data as all functions take them, see `keras_sparse.batches`. For criteria that rank by gradients, with
            targets. The loss that the model is compiled with is differentiated once over them, in batches as `fit`
            makes them, in training mode; the weights and all other state stay as they are. The paper on SNIP takes 100
            samples. For `"obs"`, `"wanda"` and `repair`, inputs, as for `predict`, whose targets are not looked at:
            some hundred samples of what the model will see.
        repair: Whether to solve for the weights that stay, on the inputs in `data`, so that each layer's outputs are
            as they were as nearly as possible (least squares), and to set the statistics of batch normalizations to
            those of their new inputs, as `ks.reestimate_batch_norm`. `None`: if the criterion is `"obs"`. With
            `pattern="channel"`, all layers that read channels that are gone are solved for, whether `filters` names
            them or not, and their biases, for the outputs that they have in the dense model.
        batch_size: Samples in a batch if `data` are the inputs, as an array: what is held in memory at a time.

    With inputs as `data`, the model is pruned layer by layer, each on what the pruned ones before it make of them.
    Kernels of which nobody knows what they multiply (of layers of your own without a row, see
    `ks.graph.register_kind`) stay dense, with the reason in the report, and so do those that the data do not reach.

    Returns:
        The `Report` of `ks.report(model)`. Weights that are sparser than asked stay so, and its notes say it. They name
        kernels that have no weight left, too, of which a warning tells when they lose the last one.

    Raises:
        ValueError: If the model is not built, a number is out of range, a string names nothing, a filter or key
            matches nothing, or `data` is missing, or given for a criterion that needs none; if inputs are not finite,
            less than two, or not what the model takes. The model is then as it was.
        TypeError: If the model is not a Keras 3 model, or an argument is of the wrong type.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    >>> ks.prune(model, 0.9).totals["zeros"]
    90

    With some inputs, without labels, a trained model bears much more:

    >>> x = keras.random.normal((100, 10))
    >>> ks.prune(model, 0.95, criterion="obs", data=x).totals["zeros"]
    95
    """
    selection.check_model(model)
    criterion = criteria.get(criterion)
    repair = criterion.repairs if repair is None else repair
    allocation = allocations.get(allocation)
    if allocation.measures:
        if data is None:
            raise ValueError(f"`{type(allocation).__name__}` measures the model: pass `data=x`. Received: data=None")
        how = {"criterion": criterion, "pattern": pattern, "filters": filters, "repair": repair}
        sparsity, allocation = allocation.measured(model, sparsity, data, batch_size=batch_size, **how), "uniform"
        looks_at_data = criterion.of_inputs or repair or criterion.statistic is not None
        data = data if looks_at_data else None
    sparsity = final_target(sparsity, allocation, pattern)
    calibrated = None
    if criterion.of_inputs or repair:
        data, inputs = _inputs(criterion, data)
        calibrated = calibration.Calibration(model, calibration.blocks(inputs, batch_size))
    # Weights that are not trainable have no gradients.
    frozen, unknown = criterion.statistic is None, calibrated.unknown if calibrated else ()
    plan = Plan(model, sparsity, criterion, pattern, allocation, filters, frozen=frozen, unknown=unknown)
    statistics = gradient_statistics(model, plan, data)
    optimizer = optimizers.find(model)
    present = plan.present_masks()
    parts = None if optimizer is None else optimizer.sparse_parts
    with unchanged_on_failure(model):
        if calibrated:
            masks = prune_layerwise(plan, present, calibrated, repair, statistics)
        else:
            masks = plan.masks(present, statistics=statistics)
        plan.zero_units(masks)
        for goal, mask in zip(plan.goals, masks, strict=True):
            variable = goal.weight.variable
            variable.assign(optimizers.masked_value(variable, mask))
        if repair and not plan.whole_units:
            reestimate(model, calibrated.data)
    plan.zero_units(masks, parts)
    for goal, mask in zip(plan.goals, masks, strict=True):
        variable = goal.weight.variable
        state = parts.masks.of(variable) if parts is not None else None
        if state is not None:
            state.assign(mask)
        zeros.remember(variable, mask)
    had_weights = [i for i, mask in enumerate(present) if mask.any()]
    for sentence in reports.emptied([plan.goals[i].weight for i in had_weights], [masks[i] for i in had_weights]):
        warnings.warn(sentence, stacklevel=2)
    reports.remember(model, plan.skipped)
    times = plan.times(masks)
    notes = _kept_notes(plan, present) + ([] if repair else _stale_notes(model))
    returned = plan.outputs_gone(masks)
    if returned:
        notes.append(_RETURNED.format(returned))
    report = reports.report(model, notes + ([_TIMES.format(**times)] if times else []))
    report.totals |= {f"milliseconds_{name}": value for name, value in times.items()}
    return report


def _inputs(criterion, data):
    """What to take gradients on, and the inputs to calibrate on, from the `data` of `prune`."""
    name = type(criterion).__name__
    if data is None:
        raise ValueError(
            f"`{name if criterion.of_inputs else 'repair'}` needs inputs: pass `data=x`, some hundred samples without "
            "targets. Received: data=None"
        )
    if criterion.statistic is None:
        return None, data
    x, y, sample_weight = batches.whole(data)  # read more than once
    if y is None:
        raise ValueError(
            f"The data of `{name}` must be (x, y) or (x, y, sample_weight), or yield such batches. "
            f"Received: {type(data).__name__} without targets"
        )
    return (x, y) if sample_weight is None else (x, y, sample_weight), x


def gradient_statistics(model, plan, data):
    """The statistics of gradients on `data` that a plan's criterion asks for, an array for each goal.

    Args:
        model: The model, compiled.
        plan: Its `ks.pruning.Plan`.
        data: As in `ks.prune`; `None` for a criterion that asks for none.

    Returns:
        List of arrays, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> ks.pruning.one_shot.gradient_statistics(model, ks.pruning.Plan(model, 0.5), None) is None
    True
    """
    kind = plan.criterion.statistic
    name = type(plan.criterion).__name__
    if kind is None:
        if data is not None:
            raise ValueError(f"`{name}` looks at no data: leave `data` out, give another criterion, or `repair=True`.")
        return None
    if data is None:
        raise ValueError(
            f"`{name}` ranks weights by gradients: pass `data=(x, y)`, or prune in training, with "
            "`ks.callbacks.Pruning` or, in a loop of your own, `ks.update_masks`. Received: data=None"
        )
    given = batches.parts(data)
    if len(given) == 1:
        batches.check(given[0])
        given = [_with_targets(given[0])]
    elif not len(keras.tree.flatten(given[0])[0]):
        raise ValueError("`data` are empty: at least one sample is needed to take a gradient.")
    else:
        given = [batches.for_fit(part) for part in given]
    variables = [goal.weight.variable for goal in plan.goals]
    with optimizers.measuring(model) as sparse, warnings.catch_warnings():
        statistics = sparse.sparse_parts.statistics
        statistics.add(kind, variables)
        # Keras warns of every generator that ends; this one shall.
        warnings.filterwarnings("ignore", "Your input ran out of data")
        model.fit(*given[:2], sample_weight=given[2] if len(given) == 3 else None, shuffle=False, verbose=0)
        if not selection.as_array(statistics.count_of(kind)):
            raise ValueError("`data` gave no finite gradient: it has no batch, or the loss overflows.")
        return [selection.as_array(statistics.of(variable, kind)) for variable in variables]


def _with_targets(data):
    """Batches, of which there is one at least, and it has targets; of an iterator a generator, which `fit` takes."""
    once = hasattr(data, "__next__")
    first = next(data if once else batches.labelled(data), None)
    if first is None:
        raise ValueError("`data` are empty: at least one batch is needed to take a gradient.")
    if keras.utils.unpack_x_y_sample_weight(first)[1] is None:
        raise ValueError(
            "`data` must be (x, y) or (x, y, sample_weight), a tuple, or yield such batches: the loss is taken against "
            f"targets. Received: {type(data).__name__} without targets"
        )
    return (batch for batch in itertools.chain([first], data)) if once else data


def _stale_notes(model):
    """A sentence about statistics that nobody has measured since."""
    count = len(normalizations(model))
    if not count:
        return []
    return [
        f"The moving statistics of {count} batch normalization{'s' if count > 1 else ''} are still those of the denser "
        "model: `ks.reestimate_batch_norm(model, x)` measures them, and so does training on."
    ]


def _kept_notes(plan, masks):
    """Sentences about weights that are sparser than their goal."""
    if plan.whole_units:
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
