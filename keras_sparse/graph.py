"""A graph says which layers a layer's output goes to, and what else belongs to the units of a kernel."""

import re
import warnings

import keras
import numpy as np

from keras_sparse import selection

__all__ = ["CHANNELWISE", "consumers", "elementwise", "unit_variables"]

# Layers and activations whose output channels depend on nothing but the input channel of the same index.
CHANNELWISE = tuple(
    getattr(keras.layers, name)
    for name in dir(keras.layers)
    if re.fullmatch(
        r"(Alpha|Gaussian|Spatial)?Dropout(\dD)?|GaussianNoise|ReLU|LeakyReLU|PReLU|ELU|BatchNormalization|Activation|"
        r"(Global)?(Average|Max)Pooling\dD|ZeroPadding\dD|Cropping\dD|UpSampling\dD|Add|Subtract|Average|Maximum|Minimum",
        name,
    )
)
_MIXING = ("softmax", "log_softmax", "sparsemax", "glu")
_KERAS_KERNELS = tuple(
    getattr(keras.layers, name)
    for name in dir(keras.layers)
    if re.fullmatch(r"Dense|EinsumDense|(Depthwise|Separable)?Conv\dD(Transpose)?", name)
)
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# What a unit that is zero passes through and stays zero, besides activations.
_TRANSPARENT = tuple(
    getattr(keras.layers, name)
    for name in dir(keras.layers)
    if re.fullmatch(
        r"(Spatial)?Dropout(\dD)?|(Global)?(Average|Max)Pooling\dD|(ZeroPadding|Cropping|UpSampling)\dD", name
    )
)
_ACTIVATIONS = tuple(
    getattr(keras.layers, name) for name in ("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax")
)


def unit_variables(model, weights):
    """Return for each kernel the variables that hold one number for each output unit, besides the kernel itself.

    With their entries and its slice of the kernel at zero, a unit's output is exactly zero: the bias of its layer, and
    scale and shift of the batch normalizations behind it, up to the first layer that mixes units or adds others.

    Args:
        model: The built Keras model that the weights are in.
        weights: List of `selection.Weight`, kernels.

    Returns:
        List with, for each weight, a tuple of variables with as many elements as there are units, in the order of the
        matrix view, or a sentence that says why such a unit would not be zero.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layers = [keras.layers.Dense(5, name="a"), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> kernel = ks.selection.weights(model)[0]
    >>> [[variable.name for variable in found] for found in ks.graph.unit_variables(model, [kernel])]
    [['bias', 'gamma', 'beta']]
    """
    every = selection.layers(model)
    attention = {id(inner) for x in every if isinstance(x, _ATTENTION) for inner in selection.layers(x)}
    normalizations = [x for x in every if isinstance(x, keras.layers.BatchNormalization)]
    # A Sequential keeps a functional model of the same layers: itself first.
    models = sorted((x for x in every if getattr(x, "inputs", None)), key=lambda x: not isinstance(x, keras.Sequential))
    graphs = [_Graph(x, x is model, normalizations) for x in models]
    return [_unit_variables(weight, attention, normalizations, graphs) for weight in weights]


def _unit_variables(weight, attention, normalizations, graphs):
    layer = weight.layer
    kind = type(layer).__name__
    known = isinstance(layer, _KERAS_KERNELS) and weight.variable.name in ("kernel", "pointwise_kernel")
    if id(layer) in attention or not known:
        return f"channels: the units of {kind} are not known to be zero when their weights are"
    if not _keeps_zero(layer):
        return f"channels: the activation of {kind} does not map 0 to 0"
    units = int(np.prod([weight.variable.shape[axis] for axis in weight.output_axes]))
    found = [] if getattr(layer, "bias", None) is None else [layer.bias]
    graph = next((graph for graph in graphs if graph.layers.get(layer.name) is layer), None)
    if graph is None and normalizations:
        return "channels: a batch normalization behind it cannot be found, because it is in no functional model"
    if graph is not None:
        behind = graph.behind(layer)
        if isinstance(behind, str):
            return behind
        found += behind
    if any(int(np.prod(variable.shape)) != units for variable in found):
        return f"channels: the bias or normalization of {kind} is shared by several units"
    return tuple(found)


class _Graph:
    """A functional model, `outermost` or nested in one that has these `normalizations`."""

    def __init__(self, model, outermost, normalizations):
        self.layers = {layer.name: layer for layer in model.layers}
        self._consumers = consumers(model)
        self._normalized = bool(normalizations)
        inside = {id(layer) for layer in model.layers}
        self._normalized_outside = not outermost and any(id(x) not in inside for x in normalizations)
        if isinstance(model, keras.Sequential):
            self._outputs = {model.layers[-1].name}
        else:
            self._outputs = set(_references(_config(model)["output_layers"]))

    def behind(self, layer):
        """Scale and shift of the normalizations behind `layer`, or a sentence that says why there are none to tell."""
        found = {}
        channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
        stack = [(layer.name, name) for name in self._consumers.get(layer.name, [])]
        while stack:
            source, name = stack.pop()
            if name is None:
                # The model's output, or calls that cannot be told apart.
                if source not in self._outputs and self._normalized:
                    return f"channels: {source} or what follows is called several times, with a normalization perhaps"
                if self._normalized_outside:
                    return "channels: a batch normalization behind it, outside of the nested model, cannot be found"
                continue
            after = self.layers[name]
            if isinstance(after, keras.layers.BatchNormalization):
                rank = len(after.output.shape)
                if after.axis % rank != (1 if channels_first else rank - 1) or after.gamma is None:
                    return f"channels: {name} behind it has no scale for each unit (scale=False, or another axis)"
                found |= {id(variable): variable for variable in (after.gamma, after.beta) if variable is not None}
            elif isinstance(after, _ACTIVATIONS):
                if not _keeps_zero(after):
                    return f"channels: the activation {name} behind it does not map 0 to 0"
            elif not isinstance(after, _TRANSPARENT):
                continue
            stack += [(name, consumer) for consumer in self._consumers.get(name, [])]
        return list(found.values())


def _keeps_zero(layer):
    """Whether the layer's activation maps a unit of 0 to 0, whatever the other units are."""
    if isinstance(layer, keras.layers.Softmax):
        return False
    if isinstance(layer, keras.layers.ReLU):
        return layer.threshold == 0 or layer.negative_slope == 0
    activation = getattr(layer, "activation", None)
    if activation is None:
        return True
    x = keras.ops.convert_to_tensor(np.array([[0.0, 1.0, -2.0, 3.0]], "float32"))
    try:
        value = keras.ops.convert_to_numpy(activation(x))
    except Exception:  # a function of the user's that wants another shape
        return False
    return value.shape == (1, 4) and value[0, 0] == 0


def elementwise(layer):
    """Whether the layer's activation, if it has one, is one of Keras's that keep channels apart.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.graph.elementwise(keras.layers.Dense(3, activation="softmax"))
    False
    """
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", "")
    return activation is None or (getattr(keras.activations, name, None) is activation and name not in _MIXING)


def consumers(model):
    """The names of the layers that each layer's output goes to, `{name: [name or None]}`; `None` stands for others.

    Layers that are called more than once are others, and so is the outside of the model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")])
    >>> ks.graph.consumers(model)
    {'a': ['b'], 'b': [None]}
    """
    if isinstance(model, keras.Sequential):
        names = [layer.name for layer in model.layers]
        return dict(zip(names, [[name] for name in [*names[1:], None]], strict=True))
    config = _config(model)
    found = {}
    for layer in config["layers"]:
        nodes = layer["inbound_nodes"]
        for source in _references(nodes):
            found.setdefault(source, []).append(layer["name"] if len(nodes) == 1 else None)
        if len(nodes) > 1:
            found.setdefault(layer["name"], []).append(None)
    for source in _references(config["output_layers"]):
        found.setdefault(source, []).append(None)
    return found


def _config(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lambdas in it are not safe to load; nobody will.
        return model.get_config()


def _references(value):
    """The names of layers in the part of a config that says whose outputs are meant: `[name, node, tensor]`."""
    if isinstance(value, (list, tuple)) and len(value) == 3 and [type(v) for v in value] == [str, int, int]:
        return [value[0]]
    if isinstance(value, dict):
        value = list(value.values())
    return [name for item in value for name in _references(item)] if isinstance(value, (list, tuple)) else []
