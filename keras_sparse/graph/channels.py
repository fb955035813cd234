"""A graph says which layers a layer's output goes to, and what else belongs to the units of a kernel."""

import contextlib
import re

import keras
import numpy as np

from keras_sparse.graph.weights import layers as all_layers
from keras_sparse.graph.weights import weights as all_weights
from keras_sparse.graph.wiring import consumers, filled, references, wiring

__all__ = ["CHANNELWISE", "elementwise", "unit_variables"]


def _keras_layers(regex):
    return tuple(getattr(keras.layers, name) for name in dir(keras.layers) if re.fullmatch(regex, name))


# Layers and activations whose output channels depend on nothing but the input channel of the same index.
CHANNELWISE = _keras_layers(
    r"(Alpha|Gaussian|Spatial)?Dropout(\dD)?|GaussianNoise|ReLU|LeakyReLU|PReLU|ELU|BatchNormalization|Activation|"
    r"(Global)?(Average|Max)Pooling\dD|ZeroPadding\dD|Cropping\dD|UpSampling\dD|Add|Subtract|Average|Maximum|Minimum"
)
_MIXING = ("softmax", "log_softmax", "sparsemax", "glu")

_KERAS_KERNELS = _keras_layers(r"Dense|EinsumDense|(Depthwise|Separable)?Conv\dD(Transpose)?")
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# What a unit that is zero passes through and stays zero, besides activations.
_TRANSPARENT = _keras_layers(
    r"(Spatial)?Dropout(\dD)?|(Global)?(Average|Max)Pooling\dD|(ZeroPadding|Cropping|UpSampling)\dD"
)
_ACTIVATIONS = _keras_layers("Activation|ReLU|LeakyReLU|PReLU|ELU|Softmax")
# They mix the units of a sample, as kernels do: a unit that is zero is an input of zero to them.
_NORMALIZATIONS = _keras_layers("(Layer|Group|RMS|Unit)Normalization")
# Layers and operations of Keras behind which units have no axis of their own.
_MOVING = re.compile(
    "Flatten|Reshape|Permute|RepeatVector|Transpose|Swapaxes|Moveaxis|ExpandDims|Squeeze|Ravel|Split|GetItem|Repeat|Tile"
)
# Layers and operations of several inputs: a product is zero where one of them is; in a sum or the like, others come in.
_PRODUCT = re.compile("Multiply")
_ADDING = re.compile("Add|Subtract|Average|Maximum|Minimum|Dot|Matmul|Einsum|Tensordot")


class _Alive(Exception):
    """Says why a unit would not be zero."""


def unit_variables(model, weights):
    """Return for each kernel the variables that hold one number for each output unit, besides the kernel itself.

    With their entries and its slice of the kernel at zero, a unit's output is exactly zero: the bias of its layer, and
    scale and shift of the batch normalizations behind it, also behind a product with another input, up to the first
    layer that mixes units or adds others. Nested models are followed inwards and outwards. A layer or operation without
    weights, such as a `Lambda`, is asked by evaluating it (in inference) on units of which some are zero; one that does
    not leave those at zero keeps the unit alive. So does a layer that hides a batch normalization or has weights of its
    own that are no kernel, and a normalization behind a concatenation, which scales others as well.

    Where no graph can be seen (subclassed models, layers that are called several times), kernels count as followed by a
    batch normalization if the model has any, and by no other obstacle: what comes after the layer is up to its author.

    Args:
        model: The built Keras model that the weights are in.
        weights: List of `ks.graph.Weight`, kernels.

    Returns:
        List with, for each weight, a tuple of variables with as many elements as there are units, in the order of the
        matrix view, or a sentence that says why such a unit would not be zero.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layers = [keras.layers.Dense(5, name="a"), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> kernel = ks.graph.weights(model)[0]
    >>> [[variable.name for variable in found] for found in ks.graph.unit_variables(model, [kernel])]
    [['bias', 'gamma', 'beta']]
    """
    every = all_layers(model)
    attention = {id(inner) for x in every if isinstance(x, _ATTENTION) for inner in all_layers(x)}
    graphs = _Graphs(model, every)

    def find(weight):
        try:
            return _unit_variables(weight, attention, graphs)
        except _Alive as reason:
            return f"channels: {reason}"

    return [find(weight) for weight in weights]


def _unit_variables(weight, attention, graphs):
    layer = weight.layer
    kind = type(layer).__name__
    known = isinstance(layer, _KERAS_KERNELS) and weight.variable.name in ("kernel", "pointwise_kernel")
    if id(layer) in attention or not known:
        raise _Alive(f"the units of {kind} are not known to be zero when their weights are")
    if not _keeps_zero(layer):
        raise _Alive(f"the activation of {kind} does not map 0 to 0")
    units = int(np.prod([weight.variable.shape[axis] for axis in weight.output_axes]))
    axis = 1 if getattr(layer, "data_format", "channels_last") == "channels_first" else -1
    found = [] if getattr(layer, "bias", None) is None else [layer.bias]
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, output = re.split(",|->", layer.equation.replace(" ", ""))
        letters = [letter for letter in kernel if letter not in inputs]
        axis = axis if letters == [output[-1]] else None
        if found and [letter for letter in output if letter in layer.bias_axes] != letters:
            raise _Alive(f"the bias of {kind} is shared by several units, or has them in another order")
    found += graphs.behind(layer, axis)
    if any(int(np.prod(variable.shape)) != units for variable in found):
        raise _Alive(f"the bias or normalization of {kind} is shared by several units")
    return tuple(found)


class _Graph:
    """The layers and operations of one functional or Sequential model, by name."""

    def __init__(self, model):
        self.model = model
        self.readers = consumers(model)
        if isinstance(model, keras.Sequential):
            names = [layer.name for layer in model.layers]
            self.operations = dict(zip(names, model.layers, strict=True))
            self.entries, self.outputs = [names[:1]], names[-1:]
            self.calls = {name: ((layer.input,), {}) for name, layer in self.operations.items()}
        else:
            config = wiring(model)
            self.operations = {operation.name: operation for operation in model.operations}
            self.entries = [self.readers.get(name, []) for name in references(config["input_layers"])]
            self.outputs = references(config["output_layers"])
            self.calls = {
                layer["name"]: (layer["inbound_nodes"][0]["args"], layer["inbound_nodes"][0]["kwargs"])
                for layer in config["layers"]
                if layer["inbound_nodes"]
            }


class _Graphs:
    """The graphs of a model and of the models nested in it, as one."""

    def __init__(self, model, every):
        self._root = model
        self._normalized = any(isinstance(x, keras.layers.BatchNormalization) for x in every)
        self._graphs = []
        models = [x for x in every if getattr(x, "inputs", None)]
        # A Sequential keeps a functional model of the same layers.
        sequential = [{id(layer) for layer in x.layers} for x in models if isinstance(x, keras.Sequential)]
        for x in models:
            inside = {id(layer) for layer in x.layers if not isinstance(layer, keras.layers.InputLayer)}
            if isinstance(x, keras.Sequential) or inside not in sequential:
                with contextlib.suppress(Exception):  # A layer without a config: such a graph cannot be seen.
                    self._graphs.append(_Graph(x))
        self._wrappers = {}
        for wrapper in (x for x in every if isinstance(x, keras.layers.Wrapper)):
            self._wrappers[id(wrapper.layer)] = wrapper

    def behind(self, layer, axis):
        """List scale and shift of the batch normalizations behind `layer`, whose units lie along `axis`, if any does.

        Raises:
            _Alive: If a unit that is zero would not stay so, or nobody can tell.
        """
        found, stack = {}, [(reader, axis, None) for reader in self._readers(layer)]
        while stack:
            (graph, operation), axis, joined = stack.pop()
            if graph is None:
                if self._normalized:
                    raise _Alive(operation)
                continue
            name = operation.name
            call = graph.calls[name]
            if isinstance(operation, keras.layers.BatchNormalization):
                rank = len(operation.output.shape)
                if joined:
                    raise _Alive(f"{name} behind it normalizes it with what {joined} puts beside it")
                if axis is None or operation.axis % rank != axis % rank or operation.gamma is None:
                    raise _Alive(f"{name} behind it has no scale for each unit (scale=False, or another axis)")
                found |= {id(v): v for v in (operation.gamma, operation.beta) if v is not None}
            elif _hides_normalization(operation):
                raise _Alive(f"a batch normalization behind it, inside of {name}, cannot be found")
            elif _mixes(operation):
                continue
            elif len(references(call)) > 1:
                if _of_keras(operation, _ADDING):
                    continue
                if not _of_keras(operation, _PRODUCT):
                    joined = name
                elif len({len(x.shape) for x in (*keras.tree.flatten(operation.input), operation.output)}) > 1:
                    axis = None
            elif isinstance(operation, _ACTIVATIONS):
                if not _keeps_zero(operation):
                    raise _Alive(f"the activation {name} behind it does not map 0 to 0")
            elif _of_keras(operation, _MOVING):
                axis = None
            elif not isinstance(operation, _TRANSPARENT) and not _keeps_units(operation, call, axis):
                raise _Alive(f"{name} behind it is not seen to keep a unit at 0")
            stack += [(reader, axis, joined) for reader in self._readers(operation)]
        return list(found.values())

    def _readers(self, operation):
        """What reads an output, as pairs `(graph, operation)`; `(None, reason)` for what cannot be seen."""
        while id(operation) in self._wrappers:
            operation = self._wrappers[id(operation)]
        name, found = operation.name, []
        places = [graph for graph in self._graphs if graph.operations.get(name) is operation]
        for graph in places:
            names, outputs = graph.readers.get(name, []), graph.outputs.count(name)
            if names.count(None) > outputs:
                text = f"{name} or what follows is called several times, with a normalization perhaps"
                found.append((None, text))
            if outputs and graph.model is not self._root:
                found += self._readers(graph.model)
            found += self._enter(graph, names)
        if not places:
            text = "a batch normalization behind it cannot be found, because it is in no functional model"
            found.append((None, text))
        return found

    def _enter(self, graph, names):
        """The named layers of a graph; in place of a model that is nested there, what reads its input."""
        found = []
        for name in names:
            nested = next((g for g in self._graphs if name and g.model is graph.operations[name]), None)
            if name is not None and nested is None:
                found.append((graph, graph.operations[name]))
            elif nested is not None and len(nested.entries) == 1:
                found += self._enter(nested, nested.entries[0])
            elif nested is not None:
                found.append((None, f"a batch normalization in {name}, which has several inputs, cannot be found"))
        return found


def _of_keras(operation, names):
    return type(operation).__module__.startswith("keras.") and names.fullmatch(type(operation).__name__)


def _hides_normalization(operation):
    return isinstance(operation, keras.layers.Layer) and any(
        isinstance(x, keras.layers.BatchNormalization) for x in all_layers(operation)
    )


def _mixes(operation):
    """Whether a layer has kernels of its own, or normalizes over units."""
    return isinstance(operation, (*_KERAS_KERNELS, *_NORMALIZATIONS)) or (
        isinstance(operation, keras.layers.Layer) and any(weight.kernel for weight in all_weights(operation))
    )


def _keeps_zero(layer):
    """Whether the layer's activation maps a unit of 0 to 0, whatever the other units are."""
    if isinstance(layer, keras.layers.Softmax):
        return False
    if isinstance(layer, keras.layers.ReLU):
        return layer.threshold == 0 or layer.negative_slope == 0
    activation = getattr(layer, "activation", None)
    if activation is None:
        return True
    x = np.array([[0, 1, -2, 3], [0, -1, -2, -3], [0, 1, 2, 3]], "float32")
    try:
        value = keras.ops.convert_to_numpy(activation(keras.ops.convert_to_tensor(x)))
    except Exception:  # a function of the user's that wants another shape
        return False
    return value.shape == x.shape and (value[:, 0] == 0).all()


def _keeps_units(operation, call, axis):
    """Whether an operation without weights leaves zero what is zero along `axis`, whatever the others are.

    Without an axis: whether it leaves zero what is all zeros.
    """
    if getattr(operation, "weights", None):
        return False
    rng = np.random.default_rng(0)
    try:
        for low, high in ((-3, 3), (-3, -1), (1, 3)):
            drawn = []

            def draw(config, low=low, high=high, drawn=drawn):
                shape = [2, *(16 if n is None else n for n in config["shape"][1:])]
                drawn.append(rng.uniform(low, high, shape).astype("float32"))
                _half(drawn[0], axis)[...] = 0
                return keras.ops.convert_to_tensor(drawn[0])

            args, kwargs = filled(call, draw)
            value = keras.ops.convert_to_numpy(operation(*args, **kwargs))
            if (axis is not None and value.shape[axis] != drawn[0].shape[axis]) or _half(value, axis).any():
                return False
    except Exception:  # not made for such shapes, or with arguments that a config cannot hold
        return False
    return True


def _half(value, axis):
    """A view of every second unit; of everything if there is no axis for units."""
    return value if axis is None else np.moveaxis(value, axis, 0)[::2]


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
