"""A schedule is the shape of a number's way from its start to its target: `schedule(progress) -> fraction`.

Both `progress` and the fraction lie in [0, 1]. `Pruning` multiplies the fraction by the target sparsity.
"""

import math

from keras_sparse.registry import Configurable, Registry, is_real

__all__ = ["Cosine", "Exponential", "Linear", "OneShot", "Polynomial", "Schedule", "get"]

SCHEDULES = Registry("schedule")


class Schedule(Configurable):
    """Base class of schedules. Subclasses implement `fraction(progress)`, which is 1 at progress 1.

    A subclass of your own that is registered with `keras.saving.register_keras_serializable` works wherever a string
    does.

    Example:

    >>> import keras_sparse as ks
    >>> class SquareRoot(ks.schedules.Schedule):
    ...     def fraction(self, progress):
    ...         return progress**0.5
    >>> SquareRoot()(0.25)
    0.5
    """

    def __call__(self, progress):
        """Return the fraction of the way that is done at `progress`, which is clipped to [0, 1]."""
        return float(self.fraction(min(max(float(progress), 0.0), 1.0)))

    def fraction(self, progress):
        """The shape itself, for a progress in [0, 1]."""
        raise TypeError(f"`{type(self).__name__}` must implement `fraction(self, progress)`.")


def _positive(name, value):
    if not is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive, finite number. Received: {name}={value!r}")
    return float(value)


@SCHEDULES.register("polynomial")
class Polynomial(Schedule):
    """Fast at first, slow near the target: `1 - (1 - p) ** power`.

    With `power=3` this is the schedule of Zhu & Gupta, "To prune, or not to prune" (2017), equation 1.

    Args:
        power: Positive number. Defaults to 3.

    Example:

    >>> import keras_sparse as ks
    >>> ks.schedules.Polynomial()(0.5)
    0.875
    """

    def __init__(self, power=3.0):
        self.power = _positive("power", power)

    def fraction(self, progress):
        return 1.0 - (1.0 - progress) ** self.power


@SCHEDULES.register("linear")
class Linear(Schedule):
    """Equal steps: `p`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.schedules.Linear()(0.25)
    0.25
    """

    def fraction(self, progress):
        return progress


@SCHEDULES.register("cosine")
class Cosine(Schedule):
    """Slow at both ends: `(1 - cos(pi * p)) / 2`, as in Loshchilov & Hutter, "SGDR" (2017), equation 5.

    Example:

    >>> import keras_sparse as ks
    >>> round(ks.schedules.Cosine()(0.5), 6)
    0.5
    """

    def fraction(self, progress):
        # Exactly 1 at the end: cos(pi) is exactly -1 in floating point.
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@SCHEDULES.register("exponential")
class Exponential(Schedule):
    """The distance to the target decays exponentially: `(1 - exp(-rate * p)) / (1 - exp(-rate))`.

    Args:
        rate: Positive number; the higher, the earlier the fraction rises. Defaults to 5.

    Example:

    >>> import keras_sparse as ks
    >>> round(ks.schedules.Exponential(rate=5)(0.5), 3)
    0.924
    """

    def __init__(self, rate=5.0):
        self.rate = _positive("rate", rate)

    def fraction(self, progress):
        return math.expm1(-self.rate * progress) / math.expm1(-self.rate)


@SCHEDULES.register("one_shot")
class OneShot(Schedule):
    """All at once: 1 from the start, so that `Pruning` reaches its target at `begin`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.schedules.OneShot()(0.0)
    1.0
    """

    def fraction(self, progress):
        return 1.0


def get(identifier):
    """Return a `Schedule` from an instance, a config, or one of the names.

    The names are `"polynomial"`, `"linear"`, `"cosine"`, `"exponential"` and `"one_shot"`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.schedules.get("linear")(0.5)
    0.5
    """
    return SCHEDULES.get(identifier, Schedule)
