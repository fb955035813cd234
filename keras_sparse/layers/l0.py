"""L0 puts random gates around one layer, on its weights, inputs or filters."""

import math

import keras
import numpy as np
from keras import ops

from keras_sparse import graph, selection
from keras_sparse.layers.gated import GatedWrapper, gated_layers
from keras_sparse.registry import serializable

__all__ = ["L0"]


@serializable
class L0(GatedWrapper):
    """Puts hard-concrete gates around a layer, so that training finds which of its weights can be zero.

    Louizos, Welling & Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018). In training each
    kernel is multiplied by gates that are sampled anew for each batch; in inference by gates that depend on the
    learned parameters alone, and are exactly 0 or 1 for most weights. The loss grows by `penalty` times the expected
    number of weights that are not zero: `penalty * sum over gates of P(gate != 0) * weights of the gate`. The paper's
    `lambda / N` is this `penalty`: for one weight in N = 60,000 samples, 0.1 becomes `0.1 / 60_000`.

    `ks.add_l0` wraps the layers of a whole model, `ks.bake` folds the gates in and returns a plain Keras model.
    Gates belong on inputs in [0, 1] or so: standardised inputs keep gates open that carry nothing.

    Args:
        layer: A layer with kernels: dense, convolution (separable, transposed, depthwise), EinsumDense, recurrent layer
            or cell, or any other layer of which `ks.report` says that it could be pruned. All its kernels are gated.
        penalty: The price of one weight, at least 0. It is a variable: `ks.callbacks.L0Penalty` moves it.
        granularity: `"weight"`: each weight has a gate. `"unit"`: as in the paper, the inputs of a dense (or other)
            layer and the filters of a convolution, its bias too, have a gate each.
        open_probability: Where gates start, in (0, 1): `sigmoid(log_alpha)`, the paper's original dropout rate.
        temperature: `beta` of `HardConcrete`.
        limits: `(gamma, zeta)` of `HardConcrete`.
        seed: Integer, or `None` for a random one.
        **kwargs: Arguments of `keras.layers.Layer`. The name is the wrapped layer's by default, so that models, their
            outputs and metrics keep their names.

    Raises:
        ValueError: If a number is out of range, the layer is an `L0` or has no kernel.
        TypeError: If `layer` is not a Keras layer.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layer = ks.layers.L0(keras.layers.Dense(10), penalty=1e-6, granularity="unit")
    >>> model = keras.Sequential([keras.Input((20,)), layer])
    >>> [tuple(log_alpha.shape) for log_alpha in layer.log_alphas]
    [(20, 1)]
    >>> 120 < layer.expected_l0() < 200
    True
    """

    def __init__(
        self,
        layer,
        penalty,
        granularity="weight",
        open_probability=0.5,
        temperature=2 / 3,
        limits=(-0.1, 1.1),
        seed=None,
        **kwargs,
    ):
        _check_layer(layer)
        if granularity not in ("weight", "unit"):
            raise ValueError(f"`granularity` must be 'weight' or 'unit'. Received: granularity={granularity!r}")
        # A recurrent cell is called in a loop over time, in which no state may change; there are cells in layers, too.
        self.is_cell = hasattr(layer, "state_size") and not isinstance(layer, keras.layers.RNN)
        kwargs = {"dtype": layer.dtype_policy} | kwargs
        super().__init__(layer, penalty, open_probability, temperature, limits, seed, **kwargs)
        self.granularity = granularity

    def _generator(self, seed):
        return _HeldSeed(seed) if self.is_cell else super()._generator(seed)

    def __call__(self, *args, **kwargs):
        if not self.layer.built and len(args) > 1:
            # A layer with several inputs, such as attention, knows best how to build itself from them.
            self.layer(*keras.tree.map_structure(_symbolic, args), **keras.tree.map_structure(_symbolic, kwargs))
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        """Build the wrapped layer, unless it is built, and create a gate for each weight or unit of its kernels."""
        super().build(input_shape)
        self.kernels = _kernels(self.layer)
        self._add_penalty()
        for weight in self.kernels:
            shape = self._gate_shape(weight)
            cost = _Cost(self, weight.size / math.prod(shape))
            self._add_log_alpha(shape, cost, f"{weight.variable.name}_log_alpha")
        self.built = True

    def _gate_shape(self, weight):
        shape = tuple(int(n) for n in weight.variable.shape)
        if self.granularity == "weight":
            return shape
        outputs = weight.output_axes
        inputs = tuple(axis for axis in range(len(shape)) if axis not in outputs)
        gated = outputs if graph.kind_of(weight.layer).gates == "outputs" else inputs
        return tuple(n if axis in gated else 1 for axis, n in enumerate(shape))

    def gated(self, training=False):
        """Yield `(variable, value)` for all that gates multiply: kernels, and the biases of filters."""
        for weight, gate in zip(self.kernels, self._gates(training), strict=True):
            yield weight.variable, weight.variable * ops.cast(gate, weight.variable.dtype)
            kind = graph.kind_of(weight.layer)
            bias = getattr(weight.layer, kind.bias, None)
            if self.granularity == "unit" and bias is not None and kind.gates == "outputs":
                # A filter that is switched off gives zeros, not its bias.
                yield bias, bias * ops.cast(ops.reshape(gate, bias.shape), bias.dtype)

    def baked(self):
        """Yield `(variable, value)` for all that `ks.bake` changes: what gates multiply in inference."""
        return self.gated()

    # What the penalty sees.

    def expected_l0(self):
        """The expected number of weights that are not zero: the sum of P(gate != 0) times the weights of the gate."""
        return sum(
            float(np.sum(ops.convert_to_numpy(self.gate.probability_nonzero(log_alpha)), dtype="float64"))
            * (weight.size / math.prod(log_alpha.shape))
            for weight, log_alpha in zip(self.kernels, self.log_alphas, strict=True)
        )

    def gates(self):
        """The gates of inference, a NumPy array for each kernel, of a shape that broadcasts to it."""
        return [ops.convert_to_numpy(self.gate.expected_gate(log_alpha)) for log_alpha in self.log_alphas]

    def shares(self, gone):
        for weight, log_alpha in zip(self.kernels, self.log_alphas, strict=True):
            yield weight, np.mean(gone(selection.as_array(log_alpha)), dtype="float64")

    # What a recurrent layer asks of a cell: an AttributeError where the wrapped layer is none.

    @property
    def state_size(self):
        return self.layer.state_size

    @property
    def output_size(self):
        return self.layer.output_size

    @property
    def get_initial_state(self):
        return self.layer.get_initial_state

    def get_config(self):
        return super().get_config() | {"granularity": self.granularity}


class _Cost:
    """The regularizer of a `log_alpha`: a loss once per step, however often the layer is called."""

    def __init__(self, owner, weights_per_gate):
        self.owner = owner
        self.weights_per_gate = weights_per_gate

    def __call__(self, log_alpha):
        if self.owner.is_cell:
            self.owner.seed_generator.advance()
        probabilities = self.owner.gate.probability_nonzero(log_alpha)
        return ops.convert_to_tensor(self.owner.penalty) * self.weights_per_gate * ops.sum(probabilities)


class _HeldSeed(keras.random.SeedGenerator):
    """A seed that stays the same until `advance`: one sample of the gates for all time steps of a batch."""

    def next(self, ordered=True):
        return ops.copy(ops.convert_to_tensor(self.state))

    def advance(self):
        super().next()


def _check_layer(layer):
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(f"`layer` must be a Keras layer. Received: {layer!r} of type {type(layer).__name__}")
    if isinstance(layer, keras.Model):
        raise ValueError(
            "`L0` wraps a layer; `ks.add_l0(model, penalty)` wraps the layers of a model. "
            f"Received: {type(layer).__name__} {layer.name!r}"
        )
    if getattr(layer, "has_gates", False):
        raise ValueError(f"The layer has gates already: `L0` around `L0` is not possible. Received: {layer.name!r}")
    cell = hasattr(layer, "state_size") and not isinstance(layer, keras.layers.RNN)
    if cell and (getattr(layer, "dropout", 0) or getattr(layer, "recurrent_dropout", 0)):
        raise ValueError(
            "A cell with dropout cannot be wrapped: its dropout masks would be made anew in each time step. Wrap the "
            f"recurrent layer instead: `L0(keras.layers.RNN(cell), ...)`. Received: {type(layer).__name__}"
        )
    if layer.built:
        _kernels(layer)


def _kernels(layer):
    """The weights to gate: what pruning selects by default, else any kernels that there are."""
    everything = selection.weights(layer)
    if gated_layers(layer):
        raise ValueError(f"{layer.name!r} holds a layer with gates already: `L0` around `L0` is not possible.")
    kernels = [w for w in everything if w.kernel and w.role != graph.EMBEDDING]
    chosen = [w for w in kernels if w.skipped is None] or kernels
    if not chosen:
        raise ValueError(
            "`L0` needs a layer with a kernel, such as Dense, a convolution or a recurrent layer. "
            f"Received: {type(layer).__name__} {layer.name!r} with weights {[w.variable.name for w in everything]}"
        )
    return chosen


def _symbolic(value):
    return keras.KerasTensor(value.shape, value.dtype) if hasattr(value, "shape") else value
