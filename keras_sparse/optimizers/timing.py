"""The clock of a fit: what a resumed `fit` must know again of the time, kept in the optimizer."""

import keras
from keras import ops

from keras_sparse.optimizers.parts import Part

__all__ = ["FitClock", "number"]


class FitClock(Part):
    """When the fit started, how long it is, and when each callback had its last update, in optimizer steps.

    Example:

    >>> import keras_sparse as ks
    >>> clock = ks.optimizers.SparseOptimizer("sgd").sparse_parts.clock
    >>> clock.begin()
    >>> clock.now, clock.length, clock.updated(0)
    (0, 0, -1)
    """

    name = "clock"

    @property
    def active(self):
        return False

    def begin(self, elapsed=0):
        """Start the clock at the present step, unless it runs already in this fit.

        Args:
            elapsed: Steps that it has run before.
        """
        if not self._started:
            self._started = True
            self._counter("start", self.iterations - elapsed)
        for name in ("start", "length", "rewound"):
            self._counter(name, 0)

    _started = False

    def release(self):
        super().release()
        self._started = False

    def _counter(self, key, value):
        def create():
            return keras.Variable(
                "zeros", (), "int32", trainable=False, aggregation="only_first_replica", name=f"clock_{key}"
            )

        counter, first = self.claim(key, create)
        if first:
            counter.assign(value)
        return counter

    @property
    def iterations(self):
        """The optimizer's own steps."""
        return number(self.parts.optimizer.iterations)

    @property
    def now(self):
        """The present step; those that were rewound count as well."""
        return self.iterations + number(self.variables["rewound"])

    @property
    def start(self):
        """The step at which the fit began."""
        return number(self.variables["start"])

    @property
    def length(self):
        """The steps that a schedule counts as 1.0; 0 if that is not known yet."""
        return number(self.variables["length"])

    @length.setter
    def length(self, value):
        self.variables["length"].assign(value)

    def rewind(self, steps):
        """Take note that the optimizer goes back by `steps`."""
        self.variables["rewound"].assign(number(self.variables["rewound"]) + steps)

    def updated(self, position):
        """The step of the last update of the callback at `position` in this fit, -1 if there was none."""
        return number(self._counter(f"updated_{position:03d}", -1))

    def mark(self, position, step):
        """Take note of an update."""
        self._counter(f"updated_{position:03d}", -1).assign(step)

    def adopt(self, other):
        """Go on where the clock of another optimizer stopped."""
        for key in sorted(other.claimed):
            self._counter(key, 0).assign(number(other.variables[key]))
        # The new optimizer counts from its own beginning.
        self.variables["rewound"].assign(other.now - self.iterations)
        self._started = True

    def restore(self, config):
        self._started = True
        for key in config:
            self._counter(key, 0)


def number(variable):
    """The value of a scalar variable as an int.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.optimizers.timing.number(keras.Variable(3, dtype="int32"))
    3
    """
    return int(ops.convert_to_numpy(ops.convert_to_tensor(variable)))
