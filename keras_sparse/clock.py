"""A clock tells a schedule when to act in a `fit`: it turns begin, end and frequency into due optimizer steps.

Steps are the optimizer's iterations, never callback calls: steps per execution, gradient accumulation and skipped
fp16 steps all come out right. What a resumed run must know again (where the clock started, how many steps the fit has,
when the last update was) are variables of the `SparseOptimizer`; each callback has a last update of its own.
"""

import numbers

from keras_sparse.registry import is_real
from keras_sparse.selection import as_array

__all__ = ["Clock"]


class Clock:
    """The due steps of a schedule.

    Args:
        begin: When the first update is due. A float is a fraction of the fit, an int counts optimizer steps.
        end: When the last one is due, like `begin`.
        frequency: Optimizer steps between updates; `None` is a fiftieth of the span.
        name: What a user calls `begin`.

    Attributes:
        length: Optimizer steps of the fit; 0 if that is not known yet. This and the following exist from the first
            `start_epoch` on.
        first: The step at which the first update is due, counted from the start, or `None` if it is not known yet.
        last: The step at which the last one is due, likewise.
        every: Steps between updates.
        updated: The step of the last update, negative if there was none.

    Raises:
        ValueError: If a number is out of range or `end` does not follow `begin`.
        TypeError: If an argument is not a number.

    Example:

    >>> from keras_sparse.clock import Clock
    >>> Clock(begin=0.5, end=0.25)
    Traceback (most recent call last):
    ...
    ValueError: `end` must be after `begin`. Received: begin=0.5, end=0.25
    """

    def __init__(self, begin=0.0, end=0.75, frequency=None, name="begin"):
        self.name = name
        self.begin = _check_time(name, begin)
        self.end = _check_time("end", end)
        if type(self.begin) is type(self.end) and self.end <= self.begin:
            raise ValueError(f"`end` must be after `begin`. Received: begin={begin!r}, end={end!r}")
        if frequency is not None and (
            isinstance(frequency, bool) or not isinstance(frequency, numbers.Integral) or frequency < 1
        ):
            raise ValueError(f"`frequency` must be a whole number of steps, at least 1. Received: {frequency!r}")
        self.frequency = frequency
        self._first_epoch = None

    def restart(self):
        """Forget the last fit."""
        self._first_epoch = None

    def start_epoch(self, sparse, counter, epoch, epochs, steps):
        """Read the state in `sparse`, measure the fit if that has not been done, and resolve the due steps.

        Args:
            sparse: The `SparseOptimizer`.
            counter: The variable that holds the step of this clock's last update.
            epoch: Index of the epoch that starts.
            epochs: Index at which the fit ends.
            steps: Batches in an epoch, or `None` if that is not known.

        Returns:
            The present step, to be passed to `progress`.

        Raises:
            ValueError: If the schedule can never fire in this fit.
        """
        if self._first_epoch is None:
            self._first_epoch = epoch
        now, self._start = self.now(sparse), number(sparse.start)
        self.length = number(sparse.length)
        if not self.length:  # Else a backup or a saved file brought it.
            self.length = self._measure(sparse, epoch, epochs, steps, now - self._start)
            sparse.length.assign(self.length)
        self._counter = counter
        self.updated = number(counter)
        self._base = now
        self._resolve()
        return now

    def may_be_due(self, batch):
        """Whether an update may be due after `batch`, by an upper bound that does not touch the model."""
        return self._base + batch + 1 - self._start >= self._next_due()

    def read(self, sparse, batch):
        """Return the present step, exactly."""
        now = self.now(sparse)
        self._base = now - (batch + 1)
        return now

    def progress(self, now):
        """The schedule's progress in [0, 1] if an update is due at step `now`, else `None`."""
        step = now - self._start
        if step < self._next_due():
            return None
        # Without a known end this is the update at the very beginning.
        return 0.0 if self.last is None else min(1.0, (step - self.first) / (self.last - self.first))

    def now(self, sparse):
        """The present step; those that were rewound count as well."""
        return number(sparse.iterations) + number(sparse.rewound)

    def mark(self, now):
        """Remember that an update was made at step `now`."""
        self._counter.assign(now)
        self.updated = now

    def elapsed(self, now):
        """Steps since the clock started."""
        return now - self._start

    def _measure(self, sparse, epoch, epochs, steps, done):
        """The optimizer steps of this fit, of which `done` lie before `epoch`; 0 if that cannot be known yet."""
        remaining = epochs - epoch
        if steps:
            return done + max(1, remaining * steps // (sparse.gradient_accumulation_steps or 1))
        # Epochs of unknown length: once one has passed, the others count as long as it. A resumed fit counts from 0.
        passed = epoch - self._first_epoch or epoch
        return done + remaining * (done // passed) if done and passed else 0

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
        if self.length and self.first is not None and self.first >= self.length:
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

    def _next_due(self):
        """The step, counted from the start, at which the next update is due."""
        if self.first is None:
            return float("inf")
        updated = self.updated - self._start if self.updated >= 0 else -1
        if updated < self.first:
            return self.first
        if self.last is None or updated >= self.last:
            return float("inf")
        return min(self.last, self.first + ((updated - self.first) // self.every + 1) * self.every)


def number(variable):
    """The value of a scalar variable as an int."""
    return int(as_array(variable))


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
