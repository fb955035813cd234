"""Channel L0 puts one random gate on each channel of a model, wherever the channel goes."""

import itertools
import math

import numpy as np
from keras import ops

from keras_sparse import graph, selection
from keras_sparse.layers.gated import GatedWrapper
from keras_sparse.layers.places import Place
from keras_sparse.registry import serializable

__all__ = ["ChannelL0"]


@serializable
class ChannelL0(GatedWrapper):
    """Puts hard-concrete gates on the channels of a model, one for all layers that a channel can only leave at once.

    The gates are those of `ks.layers.L0`; here one belongs to a channel of `ks.channel_groups`, such as those that the
    branches of a residual sum have in common, the heads of an attention or the units of a recurrent layer. In each step
    a gate is drawn once, and multiplies all weights that read the channel: the network is the one without the channel
    where it is 0. The loss grows by `penalty` times the expected number of weights that are left, which is the sum over
    the kernels of the products of P(gate != 0) along their axes. So a channel costs what would leave with it.

    `ks.add_l0(model, penalty, granularity="channel")` makes it, with all that it needs to know; `ks.bake` and
    `ks.shrink` make a smaller model of it.

    Args:
        layer: The model.
        penalty: The price of one weight, at least 0. It is a variable: `ks.callbacks.L0Penalty` moves it.
        places: List of `[weight, axis, index, multiplies]`, see `keras_sparse.layers.places.Place`; `index` is that of
            its numbers in `numbers`.
        numbers: List of lists: the gate of each channel along an axis, from 1 on, 0 for what has none.
        open_probability: Where gates start, in (0, 1).
        temperature: `beta` of `HardConcrete`.
        limits: `(gamma, zeta)` of `HardConcrete`.
        seed: Integer, or `None` for a random one.
        **kwargs: Arguments of `keras.layers.Layer`. The name is the model's by default.

    Attributes:
        log_alphas: List of one vector, with an entry for each gate.

    Raises:
        ValueError: If a number is out of range.

    Example:

    >>> import keras, keras_sparse as ks
    >>> x = keras.Input((4,))
    >>> a, b = keras.layers.Dense(8, name="a")(x), keras.layers.Dense(8, name="b")(x)
    >>> model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.add([a, b])))
    >>> layer = ks.add_l0(model, penalty=1e-3, granularity="channel").layers[-1]
    >>> [tuple(log_alpha.shape) for log_alpha in layer.log_alphas], [w.layer.name for w in layer.kernels]
    ([(8,)], ['a', 'b', 'head'])
    """

    of_model = True

    def __init__(
        self,
        layer,
        penalty,
        places,
        numbers,
        open_probability=0.5,
        temperature=2 / 3,
        limits=(-0.1, 1.1),
        seed=None,
        **kwargs,
    ):
        # The layers inside cast their own inputs and weights.
        kwargs = {"dtype": "float32"} | kwargs | {"autocast": False}
        super().__init__(layer, penalty, open_probability, temperature, limits, seed, **kwargs)
        self._given = {"places": places, "numbers": numbers}
        vectors = [np.array(one, "int32") for one in numbers]
        self._count = max(int(one.max()) for one in vectors)
        self._places = [Place(weight, axis, vectors[index], factor) for weight, axis, index, factor in places]

    def build(self, input_shape=None):
        """Create a gate for each channel."""
        super().build(input_shape)
        known = {id(weight.variable): weight for weight in selection.weights(self.layer)}
        own = {}
        for place in self._places:
            own.setdefault(place.weight, []).append(place)
        self._own = [(known[id(self.layer.weights[index])], places) for index, places in sorted(own.items())]
        self.kernels = [weight for weight, _ in self._own if weight.kernel]
        self._counted = [self._count_of(weight, places) for weight, places in self._own if weight.kernel]
        self._add_penalty()
        self._add_log_alpha((self._count,), self._cost, "log_alpha")
        self.built = True

    def _count_of(self, weight, places):
        """A kernel, the gates along its axes, those that stand along two, and how many weights each choice has."""
        axes = {}
        for place in places:
            axes[place.axis] = axes.get(place.axis, 0) + place.numbers
        axes = [numbers.astype("int32") for numbers in axes.values()]
        counts = [np.bincount(numbers, minlength=1 + self._count).astype("float32") for numbers in axes]
        pairs = itertools.combinations(range(len(axes)), 2)
        ties = [(i, j, counts[i] * counts[j]) for i, j in pairs if (counts[i] * counts[j])[1:].any()]
        return weight, axes, ties, weight.size / math.prod(map(len, axes))

    def gated(self, training=False):
        """Yield `(variable, value)` for all that gates multiply."""
        (gates,) = self._gates(training)
        gates = ops.concatenate([ops.ones((1,), gates.dtype), gates])
        for weight, places in self._own:
            value = ops.convert_to_tensor(weight.variable)
            for place in places:
                if place.multiplies:
                    factor = ops.take(gates, place.numbers)
                    shape = [-1 if axis == place.axis else 1 for axis in range(len(value.shape))]
                    value = value * ops.cast(ops.reshape(factor, shape), value.dtype)
            if any(place.multiplies for place in places):
                yield weight.variable, value

    def baked(self):
        """Yield `(variable, value)` for all that `ks.bake` changes: also what makes channels whose gates are closed."""
        for weight, places in self._own:
            value = selection.as_array(weight.variable)
            yield weight.variable, (value * self._factor(places, value.ndim)).astype(value.dtype)

    def _factor(self, places, rank):
        (gates,) = (selection.as_array(self.gate.expected_gate(log_alpha)) for log_alpha in self.log_alphas)
        gates, factor = np.concatenate([[1], gates]).astype("float32"), np.ones((1,) * rank, "float32")
        for place in places:
            own = gates[place.numbers]
            factor = factor * graph.along(place.axis, own if place.multiplies else own > 0, rank)
        return factor

    def gates(self):
        """What inference and `ks.bake` multiply, a NumPy array for each kernel, of a shape that broadcasts to it."""
        return [self._factor(places, len(weight.variable.shape)) for weight, places in self._own if weight.kernel]

    def shares(self, gone):
        left = np.concatenate([[1], 1 - gone(selection.as_array(self.log_alphas[0]))])
        for weight, axes, _, _ in self._counted:
            yield weight, 1 - math.prod(left[numbers].mean(dtype="float64") for numbers in axes)

    def expected_l0(self):
        """The expected number of weights that are not zero in the kernels from or to channels with gates."""
        return float(ops.convert_to_numpy(self._expected(self.log_alphas[0])))

    def _cost(self, log_alpha):
        return ops.convert_to_tensor(self.penalty) * self._expected(log_alpha)

    def _expected(self, log_alpha):
        some = ops.concatenate([ops.ones((1,), "float32"), self.gate.probability_nonzero(log_alpha)])
        total = 0.0
        for _, axes, ties, rest in self._counted:
            sums = [ops.sum(ops.take(some, numbers)) for numbers in axes]
            expected = math.prod(sums)
            for first, second, count in ties:  # one gate, not two of the same distribution
                others = [one for axis, one in enumerate(sums) if axis not in (first, second)]
                both = ops.sum(ops.convert_to_tensor(count) * (some - ops.square(some)))
                expected = expected + math.prod([both, *others])
            total = total + rest * expected
        return total

    def get_config(self):
        return super().get_config() | self._given
