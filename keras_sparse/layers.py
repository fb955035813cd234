"""Layers that learn which weights to do without: `L0` puts random gates around any layer with a kernel."""

import inspect
import math

import keras
import numpy as np
from keras import ops

from keras_sparse import graph, selection
from keras_sparse.gates import HardConcrete
from keras_sparse.identity import IdentityDict
from keras_sparse.registry import check_penalty, is_real, serializable

__all__ = ["L0", "HardConcrete", "gated_layers"]

# As in the authors' code: a gate that leaves this range has a gradient too small to bring it back.
_LOG_ALPHA_LIMIT = math.log(100.0)


@serializable
class L0(keras.layers.Wrapper):
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
        if not is_real(open_probability) or not 0 < open_probability < 1:
            raise ValueError(
                f"`open_probability` must be between 0 and 1. Received: open_probability={open_probability!r}"
            )
        check_penalty("penalty", penalty)
        self._accepts_training = "training" in inspect.signature(layer.call).parameters
        # Keras reads from the signature which masks and states to pass, and writes calls down in the terms of it.
        self.call = _with_signature(self._call_gated, layer.call)
        super().__init__(layer, **{"name": layer.name, "dtype": layer.dtype_policy} | kwargs)
        self.penalty_start = float(penalty)
        self.granularity = granularity
        self.open_probability = float(open_probability)
        self.gate = HardConcrete(temperature, limits)
        self.seed = seed
        # A recurrent cell is called in a loop over time, in which no state may change; there are cells in layers, too.
        self.is_cell = hasattr(layer, "state_size") and not isinstance(layer, keras.layers.RNN)
        self.seed_generator = _HeldSeed(seed) if self.is_cell else keras.random.SeedGenerator(seed)
        self.supports_masking = layer.supports_masking

    def __call__(self, *args, **kwargs):
        if not self.layer.built and len(args) > 1:
            # A layer with several inputs, such as attention, knows best how to build itself from them.
            self.layer(*keras.tree.map_structure(_symbolic, args), **keras.tree.map_structure(_symbolic, kwargs))
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        """Build the wrapped layer, unless it is built, and create a gate for each weight or unit of its kernels."""
        super().build(input_shape)
        self.kernels = _kernels(self.layer)
        self.log_alphas = []
        self.penalty = self.add_weight(
            (), keras.initializers.Constant(self.penalty_start), trainable=False, autocast=False, name="penalty"
        )
        mean = math.log(self.open_probability / (1 - self.open_probability))
        for weight in self.kernels:
            shape = self._gate_shape(weight)
            self.log_alphas.append(
                self.add_weight(
                    shape,
                    keras.initializers.RandomNormal(mean, 0.01, seed=self.seed),
                    dtype="float32",
                    autocast=False,
                    regularizer=_Cost(self, weight.size / math.prod(shape)),
                    constraint=_clamp,
                    name=f"{weight.variable.name}_log_alpha",
                )
            )
        self.built = True

    def _gate_shape(self, weight):
        shape = tuple(int(n) for n in weight.variable.shape)
        if self.granularity == "weight":
            return shape
        outputs = weight.output_axes
        inputs = tuple(axis for axis in range(len(shape)) if axis not in outputs)
        gated = outputs if graph.kind_of(weight.layer).gates == "outputs" else inputs
        return tuple(n if axis in gated else 1 for axis, n in enumerate(shape))

    def _call_gated(self, *args, training=None, **kwargs):
        kwargs |= {"training": training} if self._accepts_training else {}
        # Keras does not count the states of stateful recurrent layers as variables of theirs.
        recurrent = [inner for inner in selection.layers(self.layer) if getattr(inner, "stateful", False)]
        variables = [*self.layer.variables, *keras.tree.flatten([inner.states for inner in recurrent])]
        gated = IdentityDict(self.gated(training))
        # The layer runs on values instead of its variables: kernels that are multiplied by their gates.
        scope = keras.StatelessScope([(v, gated.get(v, v)) for v in variables], collect_losses=True)
        before = [scope.get_current_value(v) for v in variables]
        with scope:
            outputs = self.layer(*args, **kwargs)
        for variable, old in zip(variables, before, strict=True):
            new = scope.get_current_value(variable)
            if new is not old:  # Such as the state of a stateful recurrent layer.
                variable.assign(new)
        for loss in scope.losses:
            self.add_loss(ops.multiply(loss, 1.0))  # Its own tensor: Keras tells whose losses are whose by identity.
        return outputs

    def gated(self, training=False):
        """Yield `(variable, value)` for all that gates multiply: kernels, and the biases of filters."""
        for weight, gate in zip(self.kernels, self._gates(training), strict=True):
            yield weight.variable, weight.variable * ops.cast(gate, weight.variable.dtype)
            kind = graph.kind_of(weight.layer)
            bias = getattr(weight.layer, kind.bias, None)
            if self.granularity == "unit" and bias is not None and kind.gates == "outputs":
                # A filter that is switched off gives zeros, not its bias.
                yield bias, bias * ops.cast(ops.reshape(gate, bias.shape), bias.dtype)

    def _gates(self, training):
        if not training:
            return [self.gate.expected_gate(log_alpha) for log_alpha in self.log_alphas]
        sizes = [math.prod(log_alpha.shape) for log_alpha in self.log_alphas]
        # Strictly inside of (0, 1): the logarithms of both ends are infinite. One draw, which no two gates share.
        noise = keras.random.uniform((sum(sizes),), 1e-6, 1 - 1e-6, dtype="float32", seed=self.seed_generator)
        ends = np.cumsum(sizes).tolist()
        return [
            self.gate.sample(log_alpha, ops.reshape(noise[end - size : end], log_alpha.shape))
            for log_alpha, size, end in zip(self.log_alphas, sizes, ends, strict=True)
        ]

    def compute_output_spec(self, *args, training=None, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs, previous_mask):
        return self.layer.compute_mask(inputs, previous_mask)

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

    # Keras does not save the states of seeds. With it, a training that resumes has the gates it would have had.

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["seed"] = selection.as_array(self.seed_generator.state)

    def load_own_variables(self, store):
        super().load_own_variables({key: store[key] for key in store.keys() if key != "seed"})
        self.seed_generator.state.assign(store["seed"])

    def get_config(self):
        return super().get_config() | {
            "penalty": self.penalty_start,
            "granularity": self.granularity,
            "open_probability": self.open_probability,
            "temperature": self.gate.temperature,
            "limits": list(self.gate.limits),
            "seed": self.seed,
        }


# Its own weights, the parameters of the gates, are no kernels.
graph.register_kind(L0, graph.Kind())


def gated_layers(model):
    """List the `L0` layers of a model, nested ones and those in the attributes of subclassed models too.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), ks.layers.L0(keras.layers.Dense(3, name="body"), 1e-6)])
    >>> [layer.name for layer in ks.layers.gated_layers(model)]
    ['body']
    """
    return [layer for layer in selection.layers(model) if isinstance(layer, L0)]


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
    if isinstance(layer, L0):
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


def _clamp(log_alpha):
    return ops.clip(log_alpha, -_LOG_ALPHA_LIMIT, _LOG_ALPHA_LIMIT)


def _with_signature(function, model):
    """A function that does as `function`, which takes `training`, and has the other parameters of `model`."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    parameters = inspect.signature(model).parameters
    training = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
    known = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    open_ended = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    added = [] if "training" in parameters else [training]
    call.__signature__ = inspect.Signature([*known, *added, *open_ended])
    return call


def _symbolic(value):
    return keras.KerasTensor(value.shape, value.dtype) if hasattr(value, "shape") else value
