"""A gated layer is run on its own weights times random gates, whose distributions training learns."""

import inspect
import math

import keras
import numpy as np
from keras import ops

from keras_sparse import graph, selection, states
from keras_sparse.gates import HardConcrete
from keras_sparse.identity import IdentityDict
from keras_sparse.registry import check_penalty, is_real

__all__ = ["GatedWrapper", "HardConcrete", "gated_layers"]

# As in the authors' code: a gate that leaves this range has a gradient too small to bring it back.
_LOG_ALPHA_LIMIT = math.log(100.0)


class GatedWrapper(keras.layers.Wrapper):
    """What the layers with gates have in common: subclasses say which weights a gate multiplies, and what it costs.

    They create `log_alphas` in `build`, set `kernels`, the `ks.selection.Weight` that have gates, and implement
    `gated`, `baked`, `gates`, `shares` and `expected_l0`.

    Args:
        layer: The layer, or model.
        penalty: The price of one weight, at least 0.
        open_probability: Where gates start, in (0, 1).
        temperature: `beta` of `HardConcrete`.
        limits: `(gamma, zeta)` of `HardConcrete`.
        seed: Integer, or `None` for a random one.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If a number is out of range.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.layers.gated import GatedWrapper
    >>> issubclass(ks.layers.L0, GatedWrapper), issubclass(ks.layers.ChannelL0, GatedWrapper)
    (True, True)
    """

    has_gates = True

    def __init__(
        self, layer, penalty, open_probability=0.5, temperature=2 / 3, limits=(-0.1, 1.1), seed=None, **kwargs
    ):
        if not is_real(open_probability) or not 0 < open_probability < 1:
            raise ValueError(
                f"`open_probability` must be between 0 and 1. Received: open_probability={open_probability!r}"
            )
        check_penalty("penalty", penalty)
        self._accepts_training = "training" in inspect.signature(layer.call).parameters
        # Keras reads from the signature which masks and states to pass, and writes calls down in the terms of it.
        self.call = _with_signature(self._call_gated, layer.call)
        super().__init__(layer, **{"name": layer.name} | kwargs)
        self.penalty_start = float(penalty)
        self.open_probability = float(open_probability)
        self.gate = HardConcrete(temperature, limits)
        self.seed = seed
        self.seed_generator = self._generator(seed)
        self.supports_masking = layer.supports_masking

    def _generator(self, seed):
        return keras.random.SeedGenerator(seed)

    def _add_penalty(self):
        self.penalty = self.add_weight(
            (), keras.initializers.Constant(self.penalty_start), trainable=False, autocast=False, name="penalty"
        )
        self.log_alphas = []

    def _add_log_alpha(self, shape, cost, name):
        mean = math.log(self.open_probability / (1 - self.open_probability))
        self.log_alphas.append(
            self.add_weight(
                shape,
                keras.initializers.RandomNormal(mean, 0.01, seed=self.seed),
                dtype="float32",
                autocast=False,
                regularizer=cost,
                constraint=_clamp,
                name=name,
            )
        )

    def _call_gated(self, *args, training=None, **kwargs):
        kwargs |= {"training": training} if self._accepts_training else {}
        variables = [*self.layer.variables, *states.memory(self.layer)]
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
            "open_probability": self.open_probability,
            "temperature": self.gate.temperature,
            "limits": list(self.gate.limits),
            "seed": self.seed,
        }


# Its own weights, the parameters of the gates, are no kernels.
graph.register_kind(GatedWrapper, graph.Kind())


def gated_layers(model):
    """List the layers with gates of a model, nested ones and those in the attributes of subclassed models too.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), ks.layers.L0(keras.layers.Dense(3, name="body"), 1e-6)])
    >>> [layer.name for layer in ks.layers.gated_layers(model)]
    ['body']
    """
    return [layer for layer in selection.layers(model) if isinstance(layer, GatedWrapper)]


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
