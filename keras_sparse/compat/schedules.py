"""The schedules of tfmot: at which training steps masks are computed anew, and how sparse they are then."""

import math

__all__ = ["ConstantSparsity", "PolynomialDecay", "PruningSchedule", "get"]


class PruningSchedule:
    """Base of tfmot's schedules: `schedule(step)` returns whether to prune in this step, and the sparsity.

    Example:

    >>> from keras_sparse.compat import tfmot
    >>> isinstance(tfmot.sparsity.keras.ConstantSparsity(0.5, 0), tfmot.sparsity.keras.PruningSchedule)
    True
    """

    def __call__(self, step):
        raise NotImplementedError(f"`{type(self).__name__}` must implement `__call__(self, step)`.")

    def get_config(self):
        return {"class_name": type(self).__name__, "config": dict(vars(self))}

    @classmethod
    def from_config(cls, config):
        """Return the schedule that `get_config()["config"]` describes."""
        return cls(**config)

    # The names of tfmot's own, which schedules that people wrote for it call.

    def _validate_sparsity(self, sparsity, variable_name):
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"{variable_name} must be in range [0,1). Received: {variable_name}={sparsity!r}")

    def _validate_step(self, begin_step, end_step, frequency, allow_negative_1):
        if begin_step < 0:
            raise ValueError(f"begin_step should be >= 0. Received: begin_step={begin_step!r}")
        if not (allow_negative_1 and end_step == -1) and end_step < begin_step:
            raise ValueError(
                f"begin_step should be <= end_step. Received: begin_step={begin_step!r}, end_step={end_step!r}"
            )
        if frequency <= 0:
            raise ValueError(f"frequency should be > 0. Received: frequency={frequency!r}")

    def _should_prune_in_step(self, step, begin_step, end_step, frequency):
        ended = 0 <= end_step < step
        return step >= begin_step and not ended and (step - begin_step) % frequency == 0


class ConstantSparsity(PruningSchedule):
    """The same sparsity at every mask update.

    Args:
        target_sparsity: Share of zeros, in [0, 1).
        begin_step: First training step with an update.
        end_step: Last one; -1 for the end of training.
        frequency: Steps between updates.

    Raises:
        ValueError: If a number is out of range.

    Example:

    >>> from keras_sparse.compat import tfmot
    >>> tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=10, frequency=5)(15)
    (True, 0.5)
    """

    def __init__(self, target_sparsity, begin_step, end_step=-1, frequency=100):
        self.target_sparsity, self.begin_step = target_sparsity, begin_step
        self.end_step, self.frequency = end_step, frequency
        self._validate_sparsity(target_sparsity, "target_sparsity")
        self._validate_step(begin_step, end_step, frequency, allow_negative_1=True)

    def __call__(self, step):
        due = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        return due, self.target_sparsity


class PolynomialDecay(PruningSchedule):
    """Fast at first, slow near the end: Zhu & Gupta, "To prune, or not to prune" (2017), equation 1.

    Args:
        initial_sparsity: Share of zeros at `begin_step`, in [0, 1).
        final_sparsity: Share of zeros at `end_step`.
        begin_step: First training step with an update.
        end_step: Last one.
        power: The exponent.
        frequency: Steps between updates.

    Raises:
        ValueError: If a number is out of range.

    Example:

    >>> from keras_sparse.compat import tfmot
    >>> tfmot.sparsity.keras.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=200)(100)
    (True, 0.7...)
    """

    def __init__(self, initial_sparsity, final_sparsity, begin_step, end_step, power=3, frequency=100):
        self.initial_sparsity, self.final_sparsity, self.power = initial_sparsity, final_sparsity, power
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        self._validate_sparsity(initial_sparsity, "initial_sparsity")
        self._validate_sparsity(final_sparsity, "final_sparsity")
        self._validate_step(begin_step, end_step, frequency, allow_negative_1=False)

    def __call__(self, step):
        span = self.end_step - self.begin_step
        progress = min(1.0, max(0.0, (step - self.begin_step) / span)) if span else 1.0
        left = (self.initial_sparsity - self.final_sparsity) * math.pow(1 - progress, self.power)
        due = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        return due, self.final_sparsity + left


def get(schedule):
    """Return a schedule of this module for one, or for one of the real tfmot, which is known by its `get_config()`.

    Raises:
        TypeError: If it is neither.

    Example:

    >>> from keras_sparse.compat import schedules
    >>> schedules.get(schedules.ConstantSparsity(0.5, 0)).target_sparsity
    0.5
    """
    if isinstance(schedule, PruningSchedule):
        return schedule
    config = schedule.get_config() if hasattr(schedule, "get_config") else None
    known = {kind.__name__: kind for kind in (ConstantSparsity, PolynomialDecay)}
    if not isinstance(config, dict) or config.get("class_name") not in known:
        raise TypeError(
            "`pruning_schedule` can only be a `ConstantSparsity`, a `PolynomialDecay`, of tfmot itself too, or a "
            f"subclass of `ks.compat.tfmot.sparsity.keras.PruningSchedule`. Received: {schedule!r}"
        )
    return known[config["class_name"]].from_config(config["config"])
