"""A clock tells a schedule when to act in a `fit`: it turns begin, end and frequency into due optimizer steps.

Steps are the optimizer's iterations, never callback calls: steps per execution, gradient accumulation and skipped
fp16 steps all come out right. What a resumed run must know again (where the clock started, how many steps the fit has,
when the last update was) is in the optimizer's `FitClock`; each callback has a last update of its own there.
"""

import numbers
import warnings

from keras_sparse.registry import is_real

__all__ = ["Clock"]


class Clock:
    """The due steps of a schedule.

    Args:
        begin: When the first update is due. A float is a fraction of the fit, an int counts optimizer steps.
        end: When the last one is due, like `begin`.
        frequency: Optimizer steps between updates; `None` is a fiftieth of the span.
        name: What a user calls `begin`.
        goes_on: Whether updates are due after `end`, too, at a progress of 1.

    Attributes:
        length: Optimizer steps of the fit; 0 if that is not known yet. This and the following exist from the first
            `start_epoch` on.
        first: The step at which the first update is due, counted from the start, or `None` if it is not known yet.
        last: The step at which the last one is due, likewise.
        every: Steps between updates.
        updated: The step of the last update, negative if there was none.
        planned: The length by the number of batches, before steps were seen to come otherwise.
        offset: Steps that it has run in fits before this one, which count too.

    Raises:
        ValueError: If a number is out of range or `end` does not follow `begin`.
        TypeError: If an argument is not a number.

    Example:

    >>> from keras_sparse.callbacks.clock import Clock
    >>> Clock(begin=0.5, end=0.25)
    Traceback (most recent call last):
    ...
    ValueError: `end` must be after `begin`. Received: begin=0.5, end=0.25
    """

    def __init__(self, begin=0.0, end=0.75, frequency=None, name="begin", goes_on=False):
        self.name, self._goes_on = name, goes_on
        self.begin = _check_time(name, begin)
        self.end = _check_time("end", end)
        if type(self.begin) is type(self.end) and self.end <= self.begin:
            raise ValueError(f"`end` must be after `begin`. Received: begin={begin!r}, end={end!r}")
        if frequency is not None and (
            isinstance(frequency, bool) or not isinstance(frequency, numbers.Integral) or frequency < 1
        ):
            raise ValueError(f"`frequency` must be a whole number of steps, at least 1. Received: {frequency!r}")
        self.frequency = frequency
        self.offset, self._updated_before = 0, -1

    def restart(self, time, position):
        """Begin a fit.

        Args:
            time: The optimizer's `FitClock`.
            position: Which callback of the fit this is.
        """
        self._time, self._position = time, position
        self._first_epoch = None
        self._warned, self.planned = False, 0

    def carry_on(self):
        """Let the next fit go on at the step at which this one is."""
        self._updated_before = self._updated()
        self.offset = self.elapsed(self.now)

    def move(self, time):
        """Go on with the clock of another optimizer, which counts the same steps."""
        self._time = time

    def start_epoch(self, epoch, epochs, steps, accumulation=None):
        """Measure the fit and resolve the due steps, at the start of each epoch.

        Args:
            epoch: Index of the epoch that starts.
            epochs: Index at which the fit ends.
            steps: Batches in an epoch, or `None` if that is not known.
            accumulation: Batches for each optimizer step, or `None` for one.

        Returns:
            The present step, to be passed to `progress`.

        Raises:
            ValueError: If the schedule can never fire in this fit.
        """
        time = self._time
        now, self._start = time.now, time.start - self.offset
        self.planned = self.planned or time.length
        if self._first_epoch is None:
            self._first_epoch, self._first_now = epoch, now
        if not time.length:  # Else a backup or a saved file brought it, or another callback.
            time.length = self._measure(epoch, epochs, steps, now - time.start, accumulation)
            self.planned = time.length
        elif epoch > self._first_epoch:
            self._measure_again(epoch, epochs, now)
        self.length = time.length
        self.updated = time.updated(self._position)
        self._base = now
        self._resolve()
        return now

    def may_be_due(self, batch):
        """Whether an update may be due after `batch`, by an upper bound that does not touch the model."""
        return self._base + batch + 1 - self._start >= self._next_due()

    def read(self, batch):
        """Return the present step, exactly."""
        now = self._time.now
        self._base = now - (batch + 1)
        return now

    def progress(self, now):
        """The schedule's progress in [0, 1] if an update is due at step `now`, else `None`."""
        return None if now - self._start < self._next_due() else self.fraction(now)

    def fraction(self, now):
        """How far step `now` is on the way from begin to end, in [0, 1]; 0 if that is not known yet."""
        if self.first is None or self.last is None:
            return 0.0
        return min(1.0, max(0.0, (now - self._start - self.first) / (self.last - self.first)))

    @property
    def now(self):
        """The present step."""
        return self._time.now

    def mark(self, now):
        """Remember that an update was made at step `now`."""
        self._time.mark(self._position, now)
        self.updated = now

    def elapsed(self, now):
        """Steps since the clock started."""
        return now - self._start

    @property
    def stands_still(self):
        """Whether the optimizer has taken no step in this fit."""
        return self._time.now == self._first_now

    def warn_of_no_steps(self, epochs):
        """Say once that the optimizer takes no steps."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"`model.optimizer` has taken no step in {epochs} epoch(s), so nothing is pruned. If it accumulates "
                "gradients, there were fewer batches than `gradient_accumulation_steps`. If it is a "
                "`LossScaleOptimizer`, gradients have overflowed in each batch. Else the `train_step` of this model "
                "steps another optimizer: compile the model with the one that it steps, or wrap that one in "
                "`ks.optimizers.SparseOptimizer(...)` and call `ks.update_masks(model, sparsity, optimizer=...)` "
                "yourself.",
                stacklevel=2,
            )

    def _measure(self, epoch, epochs, steps, done, accumulation):
        """The optimizer steps of this fit, of which `done` lie before `epoch`; 0 if that cannot be known yet."""
        remaining = epochs - epoch
        if steps:
            return done + max(1, remaining * steps // (accumulation or 1))
        # Epochs of unknown length: once one has passed, the others count as long as it. A resumed fit counts from 0.
        passed = epoch - self._first_epoch or epoch
        return done + remaining * (done // passed) if done and passed else 0

    def _measure_again(self, epoch, epochs, now):
        """Correct the length if steps come otherwise than batches do: gradients that a `train_step` accumulates."""
        passed, taken = epoch - self._first_epoch, now - self._first_now
        expected = (self._time.length - (self._first_now - self._time.start)) / (epochs - self._first_epoch) * passed
        missing = abs(taken - expected)
        if missing < 1 or missing <= 0.1 * expected:  # Less than a step: gradients of the next one accumulate.
            return
        if not taken:
            self.warn_of_no_steps(passed)
        else:
            self._time.length = max(1, now - self._time.start + round(taken / passed * (epochs - epoch)))

    def _resolve(self):
        """Turn `begin`, `end` and `frequency` into steps; `None` for what is not known yet."""
        self.first, self.last = self._steps(self.begin), self._steps(self.end)
        if self.first is not None and self.last is not None and self.last <= self.first:
            if not (isinstance(self.begin, float) and isinstance(self.end, float)):
                raise ValueError(
                    "`end` must be after `begin`; in this fit of "
                    f"{self.length} steps they come to {self.first} and {self.last}. "
                    f"Received: begin={self.begin!r}, end={self.end!r}"
                )
            self.last = self.first + 1  # A short fit: both fractions round to the same step.
        if self.length and self.first is not None and self.first >= self.length + self.offset:
            raise ValueError(
                f"The schedule can never fire: it begins at step {self.first}, and this fit has {self.length} "
                f"optimizer steps. Lower `{self.name}` (a float is a fraction of the fit), or train for longer. "
                f"Received: {self.name}={self.begin!r}"
            )
        span = (self.last or 0) - (self.first or 0)
        self.every = self.frequency or max(1, span // 50)

    def _steps(self, value):
        if isinstance(value, int):
            return value
        if value == 0:
            return 0
        return round(value * self.length) if self.length else None

    def _updated(self):
        """The step, counted from the start, of the last update; -1 if there was none."""
        return self.updated - self._start if self.updated >= 0 else self._updated_before

    def _next_due(self):
        """The step, counted from the start, at which the next update is due."""
        if self.first is None:
            return float("inf")
        updated = self._updated()
        if updated < self.first:
            return self.first
        if self.last is None:
            return float("inf")
        due = self.first + ((updated - self.first) // self.every + 1) * self.every
        if updated >= self.last:
            return due if self._goes_on else float("inf")
        return min(self.last, due)


def _check_time(name, value):
    if not is_real(value):
        raise TypeError(
            f"`{name}` is a float in [0, 1], a fraction of the fit, or an int, a number of steps. "
            f"Received: {name}={value!r} of type {type(value).__name__}"
        )
    if isinstance(value, numbers.Integral):
        if value < 0:
            raise ValueError(f"`{name}` in steps must not be negative. Received: {name}={value!r}")
        return int(value)
    if not 0 <= value <= 1:
        raise ValueError(
            f"`{name}` as a float is a fraction of the fit, in [0, 1]; write an int for a number of steps. "
            f"Received: {name}={value!r}"
        )
    return float(value)
