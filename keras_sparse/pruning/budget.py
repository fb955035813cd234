"""A budget is the share of weights to set to zero, as a user gives it."""

import math

import keras

from keras_sparse import patterns, selection
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning import allocation as allocations
from keras_sparse.pruning.costs import Budget
from keras_sparse.registry import is_real

__all__ = ["check_target", "final_target", "per_weight"]


def check_target(target_sparsity, allocation="uniform"):
    """Raise unless `target_sparsity` and `allocation` are as `Plan` takes them.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.check_target(90)
    Traceback (most recent call last):
    ...
    ValueError: A sparsity must be at least 0 and below 1: the share of weights to set to zero. Received: 90. Did ...
    """
    allocation = allocations.get(allocation)
    if allocation.measures:
        raise ValueError(
            "This allocation measures the model on data: it goes with `ks.prune(data=x)`. Elsewhere measure first and "
            "pass what comes out as the target: `ks.sensitivity(model, x).allocate(0.9)`. "
            f"Received: allocation={allocation!r}"
        )
    if isinstance(target_sparsity, Budget):
        if allocation.redistributes:
            raise ValueError(
                "A `Budget` goes with allocation='uniform', 'global' or 'isomorphic'. "
                f"Received: allocation={allocation!r}, target={target_sparsity!r}"
            )
        return
    if not isinstance(target_sparsity, dict):
        _check_sparsity(target_sparsity)
        return
    if not target_sparsity:
        raise ValueError("A dict of target sparsities must have at least one key. Received: {}")
    if allocation.shared or allocation.redistributes:
        raise ValueError(
            "A dict of target sparsities says itself how the budget is shared: it goes with allocation='uniform'. "
            f"Received: allocation={allocation!r}, target={target_sparsity!r}"
        )
    for value in target_sparsity.values():
        sparsity, pattern = _sparsity_and_pattern(value)
        _check_sparsity(sparsity)
        patterns.get(pattern)


def final_target(target_sparsity, allocation, pattern, on_the_way=False):
    """Return the sparsity to end at, checked: `None` stands for the pattern's own, where it has one.

    `on_the_way` to it, less than the pattern's own will do.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.final_target(None, "uniform", ks.patterns.NM(2, 4))
    0.5
    """
    pattern = patterns.get(pattern)
    if isinstance(target_sparsity, dict) and target_sparsity.get("registered_name") == "keras_sparse>Budget":
        target_sparsity = keras.saving.deserialize_keras_object(target_sparsity)  # of a callback's config
    if target_sparsity is None:
        target_sparsity = pattern.sparsity
    check_target(target_sparsity, allocation)
    if isinstance(target_sparsity, Budget):
        if not pattern.whole_units:
            raise ValueError(
                "A `Budget` counts what is left when channels are removed: it goes with pattern='channel'. "
                f"Received: pattern={pattern!r}, target={target_sparsity!r}"
            )
        return target_sparsity
    values = target_sparsity.values() if isinstance(target_sparsity, dict) else [target_sparsity]
    for sparsity, own in map(_sparsity_and_pattern, values):
        own = pattern if own is None else patterns.get(own)
        if own.sparsity is None:
            continue
        fits = math.isclose(sparsity, own.sparsity, abs_tol=1e-6) or (on_the_way and sparsity < own.sparsity)
        if allocations.get(allocation).redistributes or not fits:
            raise ValueError(
                f"The pattern {own.get_config()} is a sparsity of {own.sparsity:g} in each weight: leave the target "
                f"out, or give this one{' or less' * on_the_way}, with allocation='uniform'. "
                f"Received: {sparsity!r}, allocation={allocation!r}"
            )
    return target_sparsity


def _check_sparsity(value):
    if not is_real(value):
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


def per_weight(target_sparsity, weights):
    """List `(weight, sparsity, own pattern or None)` for the weights that have a target.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(5, name="b")])
    >>> weights = ks.selection.select(model).chosen
    >>> [(w.layer.name, *rest) for w, *rest in ks.pruning.budget.per_weight({"b/": (0.5, "2:4")}, weights)]
    [('b', 0.5, '2:4')]
    """
    if isinstance(target_sparsity, Budget):
        return [(weight, None, None) for weight in weights]
    if not isinstance(target_sparsity, dict):
        return [(weight, float(target_sparsity), None) for weight in weights]
    found = IdentityDict()
    for key, value in target_sparsity.items():
        for weight in selection.matching(key, weights):
            found.setdefault(weight.variable, _sparsity_and_pattern(value))
    targets = [(weight, *found[weight.variable]) for weight in weights if weight.variable in found]
    return [(weight, float(sparsity), pattern) for weight, sparsity, pattern in targets]
