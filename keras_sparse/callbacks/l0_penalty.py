"""A gate callback logs how far the gates of `L0` layers are closed, and moves the price of open ones in `model.fit`."""

import functools
import math

import keras
import numpy as np

from keras_sparse import schedules, selection
from keras_sparse.callbacks.clock import Clock
from keras_sparse.callbacks.sparse_callback import SparseCallback
from keras_sparse.layers import gated_layers
from keras_sparse.optimizers.parts import Ledger
from keras_sparse.registry import is_real, serializable

__all__ = ["L0Penalty"]

# The controller, in logarithms of the penalty for each update: how much a sparsity that is too low by 1 adds, how much
# one that is too high by 1 takes off, and how much a change of that error by 1 adds. Gates take a while to close, so
# the last one has to see it coming, and few that have closed open again.
_RAISE, _LOWER, _PROPORTIONAL = 0.3, 3.0, 10.0
_LARGEST_CHANGE, _LARGEST_FACTOR = math.log(2), math.log(1e4)
# How a gate's pace is smoothed from update to update, and which share of its way it keeps up if it is no noise.
_SMOOTH, _STEADY = 0.8, 0.7
_FASTER = 1.25  # by which factor gates move faster at least when a price that is twice as high moves them
_PRICES = 8  # how many prices are told apart between one and its double


@serializable
class L0Penalty(SparseCallback):
    """Logs the expected L0 norm and the sparsity of a model with `ks.layers.L0`, and moves the penalty if asked.

    At the end of each epoch `logs["expected_l0"]` is the expected number of gated weights that are not zero (equation
    12 of Louizos, Welling & Kingma, 2018, summed over all layers), `logs["sparsity"]` the share of zeros in
    inference, as `ks.bake` would leave them, over the gated weights and those that other callbacks of the fit mask.

    Args:
        schedule: How the penalty of each layer rises from 0 at `begin` to its own value, the one it was created with,
            at `end`: `"linear"`, `"cosine"`, or any other name or `ks.schedules.Schedule`.
        target_sparsity: The share of the gated weights to be zero, in (0, 1). A controller multiplies the penalties of
            all layers by a common factor, so that the sparsity rises from 0 at `begin` to the target at `end`, and
            stays there. It waits while enough gates are on their way. Gates need some time to close, with Adam about
            2.4 divided by the learning rate in steps: a fit should have twice as many, or gates a higher learning rate.
        begin: When the penalty, or the sparsity, starts to rise. A float is a fraction of this `fit`
            (epochs x steps), an int counts optimizer steps from the start of this `fit`.
        end: When it has arrived, like `begin`.
        frequency: Optimizer steps between updates. Defaults to a fiftieth of the span from `begin` to `end`.

    Raises:
        ValueError: If a number is out of range, both `schedule` and `target_sparsity` are given, or the model has no
            `L0` layer, is not built, or all its penalties are 0 and there is a target.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layer = ks.layers.L0(keras.layers.Dense(1), penalty=0.01)
    >>> model = keras.Sequential([keras.Input((20,)), layer])
    >>> model.compile("adam", "mse")
    >>> x, y = np.zeros((64, 20)), np.zeros((64, 1))
    >>> history = model.fit(x, y, verbose=0, callbacks=[ks.callbacks.L0Penalty(schedule="linear")])
    >>> 16 < history.history["expected_l0"][0] < 17, history.history["sparsity"]
    (True, [0.0])
    """

    alone = True

    def __init__(self, schedule=None, target_sparsity=None, begin=0.0, end=0.5, frequency=None):
        super().__init__()
        if schedule is not None and target_sparsity is not None:
            raise ValueError(
                "Give `schedule` or `target_sparsity`, not both: each of them says what the penalty is. "
                f"Received: schedule={schedule!r}, target_sparsity={target_sparsity!r}"
            )
        self.clock = Clock(begin, end, frequency, goes_on=True)
        self.schedule = None if schedule is None else schedules.get(schedule)
        self.target_sparsity = None if target_sparsity is None else _check_target(target_sparsity)
        self.begin, self.end, self.frequency = begin, end, frequency
        self._layers, self._memory = [], None

    @property
    def reached(self):
        """Whether the gated weights are as sparse as they are to be."""
        return self.target_sparsity is None or (self._memory is not None and self._memory.get("arrived") == 1)

    def attach(self, run):
        model = run.model
        self._layers = gated_layers(model)
        if not self._layers:
            raise ValueError(
                "`L0Penalty` needs a model with `ks.layers.L0`; `ks.add_l0(model, penalty)` makes one. "
                f"Received: {type(model).__name__} {model.name!r}"
            )
        if self.target_sparsity is not None and not any(layer.penalty_start for layer in self._layers):
            raise ValueError(
                "`target_sparsity` multiplies the penalties of the layers: create at least one with a penalty above 0."
                f" Received: the penalties of {[layer.name for layer in self._layers]} are 0"
            )
        if self.target_sparsity is not None:
            self._memory = run.parts.of(_Memory)
            self._memory.add([log_alpha for layer in self._layers for log_alpha in layer.log_alphas])

    def start(self, run):
        if self.schedule is not None and self.clock.updated < 0:
            self._scale(0.0)
        if self.target_sparsity is not None and math.isnan(self._memory.get("error")):
            self._memory.put(error=self._miss(self.clock.fraction(self.clock.now)))

    def update(self, run, progress):
        if self.schedule is not None:
            self._scale(self.schedule(progress))
        elif self.target_sparsity is not None:
            self._control(progress)
            if self._measure(_closed) >= self.target_sparsity:
                self._memory.put(arrived=1)

    def _scale(self, fraction):
        for layer in self._layers:
            layer.penalty.assign(layer.penalty_start * fraction)

    def log(self, run):
        return {"expected_l0": sum(layer.expected_l0() for layer in self._layers)}

    def zeros(self):
        gated = [pair for layer in self._layers for pair in zip(layer.kernels, layer.gates(), strict=True)]
        return [(weight.variable, weight.numpy() * gate == 0) for weight, gate in gated]

    def _control(self, progress):
        """A proportional-integral controller of the logarithm of the penalty; the penalty itself is the integral."""
        error = self._miss(progress)
        if math.isnan(error):  # Training has diverged: whoever puts good weights back goes on with the same prices.
            return
        change = (_RAISE if error > 0 else _LOWER) * error + _PROPORTIONAL * (error - self._memory.get("error"))
        self._memory.put(error=error)
        factor = self._factor()
        change = np.clip(change, -_LARGEST_CHANGE, _LARGEST_CHANGE)
        excess = self._will_close(factor) - self.target_sparsity
        if excess >= 0:  # They are on their way: a higher price would only take more of them along.
            change = min(change, -_RAISE * excess * progress)
        factor = math.exp(np.clip(factor + change, -_LARGEST_FACTOR, _LARGEST_FACTOR))
        for layer in self._layers:
            layer.penalty.assign(layer.penalty_start * factor)

    def _factor(self):
        """The logarithm of the common factor, as near as it may be to that of penalties which others have assigned."""
        first = next(layer for layer in self._layers if layer.penalty_start)
        smallest, largest = math.exp(-_LARGEST_FACTOR), math.exp(_LARGEST_FACTOR)
        return math.log(np.clip(float(selection.as_array(first.penalty)) / first.penalty_start, smallest, largest))

    def _miss(self, progress):
        """How much sparsity is missing."""
        # A gate that is on its way counts in part, as long as the target rises: closed ones alone come too late.
        closed = self._measure(_closed)
        closing = self._measure(_way)
        return self.target_sparsity * progress - (progress * closed + (1 - progress) * closing)

    def _will_close(self, factor):
        """The share of the gated weights whose gates are closed, or will be in time if they go on as they do.

        In time is by `end`; or later, if the fastest gates need longer, and did not get faster when the price doubled:
        an optimizer such as Adam moves them by its learning rate at most, and a higher price only moves others, too.
        """
        gates = [(layer, log_alpha) for layer in self._layers for log_alpha in layer.log_alphas]
        values = [selection.as_array(log_alpha) for _, log_alpha in gates]
        falls = [-np.minimum(pace, 0) for pace in self._memory.paces(values, self.clock.now - self.clock.updated)]
        fastest = max(float(fall.max()) for fall in falls)
        left = max(0, (self.clock.last or 0) - self.clock.elapsed(self.clock.now))
        if fastest < _FASTER * self._memory.fastest(factor, fastest):
            way = max(start - closed for start, closed in map(_start_and_end, self._layers))
            left = max(left, way / max(fastest, 1e-9))
        later = [value - fall * left for value, fall in zip(values, falls, strict=True)]
        pairs = zip(gates, later, strict=True)
        with keras.StatelessScope([(v, keras.ops.convert_to_tensor(x, "float32")) for (_, v), x in pairs]):
            return self._measure(_closed)

    def _measure(self, value):
        """The share of the gated weights that is gone, where `value(layer, log_alpha)` says how much of a gate is."""
        found = [pair for layer in self._layers for pair in layer.shares(functools.partial(value, layer))]
        return float(sum(weight.size * share for weight, share in found) / sum(weight.size for weight, _ in found))


def _closed(layer, log_alpha):
    return selection.as_array(layer.gate.expected_gate(log_alpha)) == 0


def _way(layer, log_alpha):
    """How far gates are from where they started to where they close, from 0 to 1."""
    start, closed = _start_and_end(layer)
    return np.clip((start - log_alpha) / max(start - closed, 1e-3), 0, 1)


def _start_and_end(layer):
    """Where the gates of a layer started, and where they close."""
    low, high = layer.gate.limits
    return [math.log(p / (1 - p)) for p in (layer.open_probability, -low / (high - low))]


class _Memory(Ledger):
    """What the controller has seen so far: the last error, how far each gate moves in a step, and what a price did."""

    name = "l0_penalty"
    names = ("error", "arrived", "seen", "known")

    def add(self, gates):
        """Make room for the numbers, for the fastest pace at each price, and for what is known of each gate."""
        self.claim_numbers(error=math.nan)
        self.claim_array((0, 1), np.zeros(1 + _price(_LARGEST_FACTOR)))
        self._gates = range(1, 1 + len(gates))
        for index, gate in zip(self._gates, gates, strict=True):
            for kind in range(3):
                self.claim_array((index, kind), np.zeros(gate.shape))

    def paces(self, values, steps):
        """How far each gate moves in a step, smoothed over the updates; 0 for those that go to and fro.

        Args:
            values: An array for each vector of gates.
            steps: Optimizer steps since the update before.
        """
        known, seen, found = self.get("known"), bool(self.get("seen")), []
        known = _SMOOTH * known + 1 - _SMOOTH if seen and steps > 0 else known
        for index, value in zip(self._gates, values, strict=True):
            before, mean, size = (selection.as_array(self.variables[index, kind]) for kind in range(3))
            if seen and steps > 0:
                moved = (value - before) / steps
                mean = _SMOOTH * mean + (1 - _SMOOTH) * moved
                size = _SMOOTH * size + (1 - _SMOOTH) * np.abs(moved)
            for kind, array in enumerate((value, mean, size)):
                self.variables[index, kind].assign(array)
            found.append(np.where(np.abs(mean) >= _STEADY * size, mean, 0) / max(known, 1e-9))
        self.put(known=known, seen=1)
        return found

    def fastest(self, factor, pace):
        """Take note of the fastest pace at a price, and return the fastest one at prices of half of it and less."""
        paces, price = np.array(selection.as_array(self.variables[0, 1])), _price(factor)
        paces[price] = max(paces[price], pace)
        self.variables[0, 1].assign(paces)
        return float(paces[: max(0, price - _PRICES + 1)].max(initial=0.0))


def _price(factor):
    """The number of a price, of which the logarithm is given."""
    return round((factor + _LARGEST_FACTOR) / math.log(2) * _PRICES)


def _check_target(value):
    if not is_real(value):
        raise TypeError(
            "`target_sparsity` must be a number in (0, 1). "
            f"Received: target_sparsity={value!r} of type {type(value).__name__}"
        )
    if not 0 < value < 1:
        raise ValueError(f"`target_sparsity` must be in (0, 1). Received: target_sparsity={value!r}")
    return float(value)
