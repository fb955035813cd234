"""Channels of a model are followed both ways: what is zero behind a unit of zeros, and which units nobody reads."""

import contextlib

import keras
import numpy as np

from keras_sparse.graph.kinds import (
    CONCATENATES,
    JOINS,
    KEEPS,
    MIXES,
    MOVES,
    NORMALIZES,
    OVER_CHANNELS,
    SLICES,
    Equation,
    kind_of,
)  # fmt: skip
from keras_sparse.graph.probing import has_weights
from keras_sparse.graph.weights import as_array
from keras_sparse.graph.weights import layers as layers_of
from keras_sparse.graph.weights import weights as weights_of
from keras_sparse.graph.wiring import consumers, filled, references, wiring
from keras_sparse.identity import IdentityDict

__all__ = ["elementwise", "scale_of", "unit_kernel", "unit_variables", "unread_channels"]


class _StaysNonzero(Exception):
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
    every = layers_of(model)
    # What a layer that mixes channels holds, as attention does, is its own business.
    mixing = [layer for layer in every if kind_of(layer).channels == MIXES]
    inner = IdentityDict.fromkeys(y for x in mixing for y in layers_of(x) if y is not x)
    graphs = _Graphs(model, every)

    def find(weight):
        try:
            return _unit_variables(weight, inner, graphs)
        except _StaysNonzero as reason:
            return f"channels: {reason}"

    return [find(weight) for weight in weights]


def _unit_variables(weight, inner, graphs):
    layer = weight.layer
    kind, name = kind_of(layer), type(layer).__name__
    if layer in inner or not kind.linear or weight.variable.name != list(kind.kernels)[-1]:
        raise _StaysNonzero(f"the units of {name} are not known to be zero when their weights are")
    if not _activation_keeps_zero(layer):
        raise _StaysNonzero(f"the activation of {name} does not map 0 to 0")
    units = int(np.prod([weight.variable.shape[axis] for axis in weight.output_axes]))
    axis = 1 if getattr(layer, "data_format", "channels_last") == "channels_first" else -1
    bias = getattr(layer, kind.bias, None)
    if isinstance(layer, keras.layers.EinsumDense):
        equation = Equation(layer.equation)
        axis = axis if equation.units == equation.outputs[-1] else None
        if bias is not None and "".join(x for x in equation.outputs if x in layer.bias_axes) != equation.units:
            raise _StaysNonzero(f"the bias of {name} is shared by several units, or has them in another order")
    found = ([] if bias is None else [bias]) + graphs.behind(layer, axis)
    if any(int(np.prod(variable.shape)) != units for variable in found):
        raise _StaysNonzero(f"the bias or normalization of {name} is shared by several units")
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
        self._normalized = any(kind_of(x).per_channel for x in every)
        self._graphs = []
        models = [x for x in every if getattr(x, "inputs", None)]
        # A Sequential keeps a functional model of the same layers.
        sequential = [{id(layer) for layer in x.layers} for x in models if isinstance(x, keras.Sequential)]
        for x in models:
            inside = {id(layer) for layer in x.layers if not isinstance(layer, keras.layers.InputLayer)}
            if isinstance(x, keras.Sequential) or inside not in sequential:
                with contextlib.suppress(Exception):  # A layer without a config: such a graph cannot be seen.
                    self._graphs.append(_Graph(x))
        self._wrappers = IdentityDict((x.layer, x) for x in every if isinstance(x, keras.layers.Wrapper))

    def behind(self, layer, axis):
        """List scale and shift of the batch normalizations behind `layer`, whose units lie along `axis`, if any does.

        Raises:
            _StaysNonzero: If a unit that is zero would not stay so, or nobody can tell.
        """
        found, stack = IdentityDict(), [(reader, axis, None) for reader in self._readers(layer)]
        while stack:
            (graph, operation), axis, joined = stack.pop()
            if graph is None:
                if self._normalized:
                    raise _StaysNonzero(operation)
                continue
            name, kind = operation.name, kind_of(operation)
            call = graph.calls[name]
            several = len(references(call)) > 1
            if kind.per_channel:
                if joined:
                    raise _StaysNonzero(f"{name} behind it normalizes it with what {joined} puts beside it")
                found.update(IdentityDict.fromkeys(_per_channel(operation, kind, axis)))
            elif _hides_normalization(operation):
                raise _StaysNonzero(f"a batch normalization behind it, inside of {name}, cannot be found")
            elif _mixes(operation, kind, several):
                continue
            elif several:
                if kind.channels == JOINS and not kind.product:
                    continue
                if not kind.product:
                    joined = name
                elif len({len(x.shape) for x in (*keras.tree.flatten(operation.input), operation.output)}) > 1:
                    axis = None
            elif kind.activates:
                if not _activation_keeps_zero(operation):
                    raise _StaysNonzero(f"the activation {name} behind it does not map 0 to 0")
            elif kind.channels in (MOVES, SLICES, CONCATENATES):
                axis = None
            elif not kind.zero and not _keeps_units(operation, call, axis):
                raise _StaysNonzero(f"{name} behind it is not seen to keep a unit at 0")
            stack += [(reader, axis, joined) for reader in self._readers(operation)]
        return list(found)

    def _readers(self, operation):
        """What reads an output, as pairs `(graph, operation)`; `(None, reason)` for what cannot be seen."""
        while operation in self._wrappers:
            operation = self._wrappers[operation]
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


def _per_channel(layer, kind, axis):
    """The variables with which a layer scales and shifts channels, which lie along `axis` before it."""
    own = getattr(layer, "axis", 1 if getattr(layer, "data_format", None) == "channels_first" else -1)
    rank = len(layer.output.shape)
    scale, *others = (getattr(layer, name, None) for name in kind.per_channel)
    if axis is None or own % rank != axis % rank or scale is None:
        raise _StaysNonzero(f"{layer.name} behind it has no scale for each unit (scale=False, or another axis)")
    return [variable for variable in (scale, *others) if variable is not None]


def scale_of(layer):
    """The variable with which a layer scales each channel, such as the gamma of a batch normalization, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    >>> [ks.graph.scale_of(layer) is not None for layer in model.layers]
    [False, True]
    """
    names = kind_of(layer).per_channel
    return getattr(layer, names[0], None) if names else None


def _hides_normalization(operation):
    return isinstance(operation, keras.layers.Layer) and any(kind_of(x).per_channel for x in layers_of(operation))


def _mixes(operation, kind, several):
    """Whether an operation mixes the units of a sample, or normalizes over them: one that is zero is zero to it."""
    if not isinstance(operation, keras.layers.Layer):
        return several and kind.channels == MIXES
    mixes = kind.channels in (MIXES, NORMALIZES) and not kind.activates
    return mixes or any(weight.kernel for weight in weights_of(operation))


def _activation_keeps_zero(layer):
    """Whether the layer's activation maps a unit of 0 to 0, whatever the other units are.

    An activation layer is its own activation.
    """
    kind, activation = kind_of(layer), getattr(layer, "activation", None)
    if activation is None and kind.activates and kind.zero is None:
        activation = layer
    if activation is None:
        return True
    if has_weights(activation):
        return False
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


def unread_channels(model):
    """Find the channels of each layer's output that nobody reads: all kernels that they reach are zero there.

    Channels are followed backwards, from the kernels that read them through layers that keep channels apart, as far as
    the graph shows it: layers that are called once, with channels last, inside of `model` itself.

    Args:
        model: A built functional or Sequential model.

    Returns:
        Function from the name of a layer to a boolean array with an entry for each of its output's channels, or to
        `None` if it is not known who reads them. It sees the kernels as they are when it is first asked about a layer.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> body = [keras.layers.Dense(3, name="a"), keras.layers.ReLU(), keras.layers.Dense(2, name="b")]
    >>> model = keras.Sequential([keras.Input((4,)), *body])
    >>> model.layers[2].set_weights([np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), np.zeros(2)])
    >>> ks.graph.unread_channels(model)("a")
    array([False,  True, False])
    """
    layers = {layer.name: layer for layer in model.layers}
    readers, known = consumers(model), {}

    def unread(name):
        if name not in known:
            known[name] = None
            votes = [ignored(reader) for reader in readers.get(name, [None])]
            if not isinstance(layers[name].output, keras.KerasTensor):
                votes = []  # who reads which of several outputs, such as the state of a GRU, is not followed
            if votes and all(vote is not None and vote.shape == (layers[name].output.shape[-1],) for vote in votes):
                known[name] = np.logical_and.reduce(votes)
        return known[name]

    def ignored(name):
        """Which channels of its inputs a layer ignores."""
        layer = layers.get(name)
        if layer is None or getattr(layer, "data_format", "channels_last") != "channels_last":
            return None
        if not isinstance(layer.output, keras.KerasTensor):
            return None
        if isinstance(layer, keras.layers.Flatten):
            after, shape = unread(name), layer.input.shape
            return None if after is None else after.reshape(-1, shape[-1]).all(axis=0)
        kind = kind_of(layer)
        axis = _input_axis(layer, kind)
        if axis is not None:
            kernel = as_array(_kernel(layer, kind))
            return ~np.any(kernel != 0, axis=tuple(other for other in range(kernel.ndim) if other != axis))
        last = getattr(layer, "axis", -1) in (-1, len(layer.output.shape) - 1)
        apart = kind.channels in (KEEPS, JOINS) and not kind.kernels
        return unread(name) if apart and last and elementwise(layer) else None

    return unread


def unit_kernel(layer):
    """What makes the channels of a layer's output, the last axis, one by one: kernel, its axis that counts them, bias.

    Args:
        layer: A built layer.

    Returns:
        `(variable, axis, variable or None)`, or `None` if an output channel depends on more than that.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layer = keras.layers.Dense(3, use_bias=False)
    >>> layer.build((None, 4))
    >>> ks.graph.unit_kernel(layer)[1:]
    (1, None)
    >>> ks.graph.unit_kernel(keras.layers.Dense(3, "softmax")) is None
    True
    """
    kind = kind_of(layer)
    if not (_multiplies(layer, kind) and elementwise(layer)):
        return None
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    variable, row = _kernel(layer, kind), list(kind.kernels.values())[-1]
    axes = row.output_axes(layer, len(variable.shape))
    bias = getattr(layer, kind.bias, None)
    if isinstance(layer, keras.layers.EinsumDense):
        equation = Equation(layer.equation)
        if equation.units != equation.outputs[-1] or (bias is not None and layer.bias_axes != equation.units):
            return None
    return (variable, *axes, bias) if len(axes) == 1 else None


def _input_axis(layer, kind):
    """The axis of a layer's kernel that counts the channels of its input, the last axis; `None` if there is none."""
    if not (_multiplies(layer, kind) and len(kind.kernels) == 1) or (kind.grouped and layer.groups != 1):
        return None
    if isinstance(layer, keras.layers.EinsumDense):
        equation = Equation(layer.equation)
        found = equation.kernel.find(equation.inputs[-1])
        return None if found < 0 or equation.inputs[-1] in equation.outputs else found
    (row,) = kind.kernels.values()
    axes = row.input_axes(layer, len(_kernel(layer, kind).shape))
    return axes[0] if len(axes) == 1 else None


def _multiplies(layer, kind):
    """Whether a layer multiplies its inputs by its last kernel, as it is stored (with LoRA, something is added)."""
    return kind.linear and kind.channels == MIXES and not getattr(layer, "lora_enabled", False)


def _kernel(layer, kind):
    """The variable of the kernel that makes the output units."""
    name = list(kind.kernels)[-1]
    return next(variable for variable in layer.weights if variable.name == name)


def elementwise(layer):
    """Whether the layer's activation, if it has one, is one of Keras's that keep channels apart.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.graph.channels import elementwise
    >>> elementwise(keras.layers.Dense(3, activation="softmax"))
    False
    """
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", "")
    own = getattr(keras.activations, name, None) is activation and name not in OVER_CHANNELS
    return activation is None or own
