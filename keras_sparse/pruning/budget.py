"""A target is how sparse a model is to become, as a user writes it: shares of zeros, or what it may cost."""

import math

import keras

from keras_sparse import patterns, selection
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning import allocation as allocations
from keras_sparse.registry import Configurable, is_real

__all__ = ["Shares", "Target", "as_target", "check_target", "final_target"]


class Target(Configurable):
    """How sparse a model is to become. Subclasses implement `check`, `check_pattern` and `per_weight`.

    Attributes:
        budget: What the model may cost, a `ks.Budget`; `None` where shares of zeros are the target.
        patterned: Whether it names patterns for weights.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.budget.as_target(ks.Budget(macs=0.5)).budget.macs, ks.pruning.budget.as_target(0.5).budget
    (0.5, None)
    """

    budget = None
    patterned = False

    @property
    def as_written(self):
        """What a user writes for it."""
        return self

    def check(self, allocation):
        """Raise unless it goes with an `Allocation`."""
        raise TypeError(f"`{type(self).__name__}` must implement `check(self, allocation)`.")

    def check_pattern(self, pattern, allocation, on_the_way=False):
        """Raise unless it goes with a `Pattern` and an `Allocation`; `on_the_way`, less than it asks for will do."""
        raise TypeError(f"`{type(self).__name__}` must implement `check_pattern(self, pattern, allocation)`.")

    def per_weight(self, weights):
        """List `(weight, sparsity or None, own pattern or None)` for the weights that have a target."""
        raise TypeError(f"`{type(self).__name__}` must implement `per_weight(self, weights)`.")


class Shares(Target):
    """Shares of zeros: one for all weights, or a dict `{regex: sparsity}` or `{regex: (sparsity, pattern)}`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> shares = ks.pruning.budget.Shares({"b/": (0.5, "2:4")})
    >>> shares.patterned
    True
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(5, name="b")])
    >>> [(w.layer.name, *rest) for w, *rest in shares.per_weight(ks.selection.select(model).chosen)]
    [('b', 0.5, '2:4')]
    """

    def __init__(self, shares):
        self.shares = shares

    @property
    def as_written(self):
        return self.shares

    @property
    def patterned(self):
        return any(isinstance(share, (tuple, list)) for share in self._each())

    def _each(self):
        return self.shares.values() if isinstance(self.shares, dict) else [self.shares]

    def check(self, allocation):
        if not isinstance(self.shares, dict):
            _check_sparsity(self.shares)
            return
        if not self.shares:
            raise ValueError("A dict of target sparsities must have at least one key. Received: {}")
        if allocation.shared or allocation.redistributes:
            raise ValueError(
                "A dict of target sparsities says itself how the budget is shared: it goes with allocation='uniform'. "
                f"Received: allocation={allocation!r}, target={self.shares!r}"
            )
        for value in self.shares.values():
            sparsity, pattern = _sparsity_and_pattern(value)
            _check_sparsity(sparsity)
            patterns.get(pattern)

    def check_pattern(self, pattern, allocation, on_the_way=False):
        for sparsity, own in map(_sparsity_and_pattern, self._each()):
            own = pattern if own is None else patterns.get(own)
            if own.sparsity is None:
                continue
            fits = math.isclose(sparsity, own.sparsity, abs_tol=1e-6) or (on_the_way and sparsity < own.sparsity)
            if allocation.redistributes or not fits:
                raise ValueError(
                    f"The pattern {own.get_config()} is a sparsity of {own.sparsity:g} in each weight: leave the "
                    f"target out, or give this one{' or less' * on_the_way}, with allocation='uniform'. "
                    f"Received: {sparsity!r}, allocation={allocation!r}"
                )

    def per_weight(self, weights):
        if not isinstance(self.shares, dict):
            return [(weight, float(self.shares), None) for weight in weights]
        found = IdentityDict()
        for key, value in self.shares.items():
            for weight in selection.matching(key, weights):
                found.setdefault(weight.variable, _sparsity_and_pattern(value))
        targets = [(weight, *found[weight.variable]) for weight in weights if weight.variable in found]
        return [(weight, float(sparsity), pattern) for weight, sparsity, pattern in targets]


def as_target(value):
    """The `Target` that a user's value stands for: itself, the config of one, or `Shares`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.budget.as_target(0.9).as_written
    0.9
    """
    if isinstance(value, dict) and isinstance(value.get("registered_name"), str):  # of a callback's config
        value = keras.saving.deserialize_keras_object(value)
    return value if isinstance(value, Target) else Shares(value)


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
    as_target(target_sparsity).check(allocation)


def final_target(target_sparsity, allocation, pattern, on_the_way=False):
    """Return the sparsity to end at, checked: `None` stands for the pattern's own, where it has one.

    `on_the_way` to it, less than the pattern's own will do.

    Example:

    >>> import keras_sparse as ks
    >>> ks.pruning.final_target(None, "uniform", ks.patterns.NM(2, 4))
    0.5
    """
    pattern = patterns.get(pattern)
    target = as_target(pattern.sparsity if target_sparsity is None else target_sparsity)
    check_target(target, allocation)
    target.check_pattern(pattern, allocations.get(allocation), on_the_way)
    return target.as_written


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
