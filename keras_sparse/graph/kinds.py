"""A kind is what a layer does to channels: one row of one table, in which users may write rows for their own layers.

A row says which of a layer's weights are kernels and along which axes these count units, whether the layer mixes
channels, keeps them apart, joins, moves or normalizes them, and what its outputs cost. Selection, reports, MACs, dead
units, L0's gates, `bake` and the TFLite stage all ask these rows. A layer has the row of its class, or else of the
nearest class that it inherits from.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import keras

__all__ = [
    "CONCATENATES",
    "DEPTHWISE",
    "EMBEDDING",
    "FOREIGN",
    "JOINS",
    "KEEPS",
    "KERNEL",
    "MIXES",
    "MOVES",
    "NORMALIZES",
    "NO_KERNELS",
    "OVER_CHANNELS",
    "SLICES",
    "UNKNOWN",
    "Equation",
    "Kernel",
    "Kind",
    "kernel_of",
    "kind_of",
    "kinds",
    "of_keras",
    "operator_axes",
    "register_kind",
]

# What a layer does to channels.
MIXES = "mixes"  # an output channel depends on all input channels
KEEPS = "keeps"  # an output channel depends on the input channel of the same index alone
JOINS = "joins"  # likewise, of several inputs
CONCATENATES = "concatenates"  # channels come to lie beside those of other inputs
SLICES = "slices"  # some of the positions along an axis are picked or repeated, and that may be the channels'
MOVES = "moves"  # the axes become others
NORMALIZES = "normalizes"  # by statistics over the channels of a sample
UNKNOWN = "unknown"
_CHANNELS = (MIXES, KEEPS, JOINS, CONCATENATES, SLICES, MOVES, NORMALIZES, UNKNOWN)

# What a kernel is for.
KERNEL = "kernel"  # multiplies all inputs
DEPTHWISE = "depthwise kernel"  # multiplies each channel for itself
EMBEDDING = "embedding"  # is looked up
FOREIGN = "weight of code that Keras does not see"  # of a torch module or a SavedModel in a layer
_ROLES = (KERNEL, DEPTHWISE, EMBEDDING, FOREIGN)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a kernel lies in its variable.

    Args:
        outputs: The axes that count output units, a tuple of ints; or a function of the layer that returns it.
        inputs: The axes that count inputs, of a convolution the channels and not the positions; `None`: all others.
        role: `"kernel"`, `"depthwise kernel"`, `"embedding"` or `FOREIGN`. Only the first is pruned without a filter
            that names it; embeddings are looked up and cost no MACs.

    Raises:
        ValueError: If `role` is none of these.
        TypeError: If axes are not ints.

    Example:

    A transposed convolution of Keras has its filters on the last axis but one:

    >>> import keras, keras_sparse as ks
    >>> layer = keras.layers.Conv2DTranspose(4, 3)
    >>> ks.graph.kind_of(layer).kernels["kernel"].output_axes(layer, rank=4)
    (2,)
    """

    outputs: tuple | Callable = (-1,)
    inputs: tuple | Callable | None = None
    role: str = KERNEL

    def __post_init__(self):
        if self.role not in _ROLES:
            raise ValueError(f"`role` must be one of {_ROLES}. Received: role={self.role!r}")
        for name, axes in (("outputs", self.outputs), ("inputs", self.inputs)):
            tuples = isinstance(axes, tuple) and all(type(axis) is int for axis in axes)
            if not (tuples or callable(axes) or (name == "inputs" and axes is None)):
                raise TypeError(f"`{name}` must be a tuple of ints, or a function of the layer. Received: {axes!r}")

    def output_axes(self, layer, rank):
        """The axes that count output units, a tuple of ints from 0 to `rank` - 1."""
        return _axes(self.outputs, layer, rank)

    def input_axes(self, layer, rank):
        """The axes that count inputs, likewise."""
        if self.inputs is not None:
            return _axes(self.inputs, layer, rank)
        outputs = self.output_axes(layer, rank)
        return tuple(axis for axis in range(rank) if axis not in outputs)


def _axes(axes, layer, rank):
    return tuple(axis % rank for axis in (axes(layer) if callable(axes) else axes))


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a layer does to channels.

    Args:
        channels: `"mixes"`: an output channel depends on all input channels. `"keeps"`: on the input channel of the
            same index alone. `"joins"`: likewise, of several inputs. `"concatenates"`: channels come to lie beside
            those of other inputs. `"slices"`: some positions along an axis are picked or repeated. `"moves"`: the axes
            become others. `"normalizes"`: by statistics over the channels of a sample. `"unknown"`.
        kernels: Dict from a variable's name to its `Kernel`; the last one makes the output units.
        linear: Whether each unit is `activation(inputs times its slice of the last kernel, plus its bias)`, where the
            layer may have an attribute `activation`. Only then `pattern="channel"` knows that a unit of zeros is dead.
        bias: Name of the layer's attribute with one number for each unit.
        per_channel: Names of the attributes, the scale first, with which a layer that `"keeps"` channels scales and
            shifts each of them. With all of them at zero, the channel is zero.
        zero: Whether a channel of zeros is known to stay zero, whatever the others are. `None`: a layer without weights
            is asked by running it.
        activates: Whether it applies an activation function and nothing else.
        inert: Whether an activation behind it counts as the activation of the layer before it, as behind a
            normalization or dropout.
        product: Whether it multiplies its inputs, so that its output is zero where one of them is.
        width: Name, in the layer's config, of the number of its output channels; `None` if there is no such number.
        grouped: Whether the attribute `groups` says that each filter reads a part of the input channels.
        gates: `"inputs"` or `"outputs"`: what a gate of `ks.layers.L0(granularity="unit")` switches off.
        positions: How often one sample uses each weight: `"outputs"`, once for each position of the output;
            `"inputs"`, of the input; or a function of the layer, the input's shape and the output's shape.
        holder: For layers that run another one at each time step: a function from the layer to the one that makes its
            outputs.
        recurrent: Whether each of these steps needs the one before it.
        pointwise: Whether it treats all positions of an image alike.
        operators: The operators of TFLite that it becomes: dict from a name to the axes of the operator's kernel that
            count output units, or to `None` without a kernel.

    Raises:
        ValueError: If a string is none of those above.
        TypeError: If `kernels` holds something else than a `Kernel`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.graph.kind_of(keras.layers.ReLU()).channels, ks.graph.kind_of(keras.layers.Dense(3)).width
    ('keeps', 'units')
    """

    channels: str = UNKNOWN
    kernels: Mapping[str, Kernel] = dataclasses.field(default_factory=dict)
    linear: bool = False
    bias: str = "bias"
    per_channel: tuple = ()
    zero: bool | None = None
    activates: bool = False
    inert: bool = False
    product: bool = False
    width: str | None = None
    grouped: bool = False
    gates: str = "inputs"
    positions: str | Callable = "outputs"
    holder: Callable | None = None
    recurrent: bool = False
    pointwise: bool = False
    operators: Mapping[str, tuple | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, known in (("channels", _CHANNELS), ("gates", ("inputs", "outputs"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}. Received: {name}={getattr(self, name)!r}")
        if not callable(self.positions) and self.positions not in ("inputs", "outputs"):
            raise ValueError(
                f"`positions` must be 'outputs', 'inputs' or a function. Received: positions={self.positions!r}"
            )
        for name, kernel in self.kernels.items():
            if not isinstance(kernel, Kernel):
                raise TypeError(f"`kernels` must be a dict of `ks.graph.Kernel`. Received: {name!r}: {kernel!r}")


class Equation:
    """The letters of an `EinsumDense` equation: those of its inputs, its kernel and its outputs.

    Args:
        equation: Such as `"abc,cd->abd"`.

    Example:

    >>> import keras_sparse as ks
    >>> equation = ks.graph.Equation("abc,cde->abde")
    >>> equation.units, equation.kernel_outputs, equation.output_axes(rank=4)
    ('de', (1, 2), (2, 3))
    """

    def __init__(self, equation):
        self.inputs, self.kernel, self.outputs = re.split(",|->", equation.replace(" ", ""))

    @property
    def units(self):
        """The letters that count output units, in the kernel's order."""
        return "".join(letter for letter in self.kernel if letter not in self.inputs)

    @property
    def kernel_outputs(self):
        """The kernel's axes that count output units."""
        return tuple(axis for axis, letter in enumerate(self.kernel) if letter not in self.inputs)

    def output_axes(self, rank):
        """The axes of an output of `rank` axes that count units."""
        end = self.outputs.rfind(".")  # letters behind an ellipsis are counted from the end
        return tuple(
            (index if index < end else index - len(self.outputs)) % rank
            for index, letter in enumerate(self.outputs)
            if letter in self.units
        )


def kind_of(operation):
    """The `Kind` of a layer, or of an operation of `keras.ops` in a functional model.

    Of a layer that has no row, `channels` is `"unknown"`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> class Head(keras.layers.Dense):
    ...     pass
    >>> ks.graph.kind_of(Head(3)) is ks.graph.kind_of(keras.layers.Dense(3))
    True
    """
    if isinstance(operation, keras.layers.Layer):
        return _ROWS.get(_class_with_row(operation), _NONE)
    # In a functional model, `keras.ops.relu6(x)` is an operation of a class `Relu6`, which Keras keeps to itself.
    own = type(operation).__module__.startswith("keras.")
    return _OPERATIONS.get(type(operation).__name__.lower(), _NONE) if own else _NONE


def _class_with_row(layer):
    return next((one for one in type(layer).__mro__ if one in _ROWS), None)


def kernel_of(layer, name, shape, trainable=True):
    """The `Kernel` that a weight of a layer is, or `None` if it is none, and why: a pair.

    The layer's row says it. In a `TorchModuleWrapper` or a `TFSMLayer` it is every weight of rank 2 or more; of torch's
    the first axis counts the outputs. Of other layers without a row, Keras's names count, and in layers that are not
    Keras's own every weight of rank 2 or more, unless its name is that of a bias or normalization, or it is a vector
    that broadcasts.

    Args:
        layer: The layer.
        name: The variable's name.
        shape: The variable's shape.
        trainable: Whether training changes it; others are no kernels unless the row or the name says so.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.graph.kernel_of(keras.layers.Dense(3), "bias", (3,))
    (None, 'not a kernel')
    >>> ks.graph.kernel_of(keras.layers.Embedding(9, 3), "embeddings", (9, 3))[0].role
    'embedding'
    """
    owner, no = _class_with_row(layer), (None, "not a kernel")
    kernels = kind_of(layer).kernels
    if name in kernels:
        if kind_of(layer).grouped and layer.groups > 1 and shape[-2] == 1 and kernels[name].role == KERNEL:
            return dataclasses.replace(kernels[name], role=DEPTHWISE), None  # as depthwise layers have it
        return kernels[name], None
    foreign = next((kernel for kind, kernel in _FOREIGN.items() if isinstance(layer, kind)), None)
    if foreign is not None:
        plain = len(shape) < 2 or name.split(":")[0].split("_")[-1] in NO_KERNELS
        return no if plain else (foreign, None)
    if owner is not None and (of_keras(layer) or owner.__module__.split(".")[0] != "keras"):
        return no
    guessed = _DENSE if hasattr(layer, "kernel_size") else Kernel()
    if name in _KERNELS:
        return guessed, None
    if name == "depthwise_kernel":
        return _DEPTHWISE_KERNEL, None
    if of_keras(layer) or len(shape) < 2 or name.split("_")[-1] in NO_KERNELS:
        return no
    if sum(int(n) > 1 for n in shape) <= 1:  # Scales, class tokens and the like, which broadcast.
        return None, f"a vector of shape {tuple(shape)}, not a kernel"
    if not trainable:
        return None, "not trainable"
    named = _EMBEDDED.search(name) or _POSITIONS.search(type(layer).__name__)
    return (_TABLE if named and not name.endswith("_kernel") else guessed), None


def kinds():
    """All rows of the table, `{class of layers: Kind}`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.graph.kinds()[keras.layers.Conv2DTranspose].positions
    'inputs'
    """
    return dict(_ROWS)


def operator_axes():
    """The operators of TFLite that have a kernel, and the axes of it that count output units: `{name: axes}`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.graph.operator_axes()["DEPTHWISE_CONV_2D"]
    (3,)
    """
    every = (item for kind in _ROWS.values() for item in kind.operators.items())
    return {name: axes for name, axes in every if axes is not None}


def register_kind(layer_class, kind):
    """Write a row for a class of layers, and for its subclasses; a row that is there is replaced.

    From then on the layer is pruned, counted, gated, baked and checked like one of Keras's own: `ks.prune` and
    `ks.report` know its kernels and units, `ks.neuron_sparsity` and MACs where its units lie, `pattern="channel"` what
    is dead with a unit, `ks.layers.L0` and `ks.bake` what a closed gate takes along.

    Args:
        layer_class: A subclass of `keras.layers.Layer`.
        kind: Its `Kind`.

    Raises:
        TypeError: If the arguments are something else.

    Example:

    A dense layer whose kernel has the outputs first, as in PyTorch:

    >>> import keras, keras_sparse as ks
    >>> class Linear(keras.layers.Layer):
    ...     def __init__(self, units):
    ...         super().__init__()
    ...         self.units = units
    ...
    ...     def build(self, shape):
    ...         self.w = self.add_weight(shape=(self.units, shape[-1]), name="w")
    ...         self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")
    ...
    ...     def call(self, x):
    ...         return keras.ops.matmul(x, keras.ops.transpose(self.w)) + self.bias
    >>> kernel = ks.graph.Kernel(outputs=(0,), inputs=(1,))
    >>> ks.graph.register_kind(Linear, ks.graph.Kind("mixes", {"w": kernel}, linear=True, width="units"))
    >>> model = keras.Sequential([keras.Input((8,)), Linear(4), keras.layers.ReLU(), keras.layers.Dense(2)])
    >>> report = ks.prune(model, 0.5, pattern="channel", filters="/w$")
    >>> report.rows[0]["pattern"], report.rows[0]["dead_units"]
    ('channel', 2)
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(f"`layer_class` must be a subclass of `keras.layers.Layer`. Received: {layer_class!r}")
    if not isinstance(kind, Kind):
        raise TypeError(f"`kind` must be a `ks.graph.Kind`. Received: {kind!r} of type {type(kind).__name__}")
    _ROWS[layer_class] = kind


def of_keras(layer):
    """Whether a layer's class is Keras's own.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.kinds import of_keras
    >>> of_keras(keras.layers.ReLU()), of_keras(type("Mine", (keras.layers.ReLU,), {})())
    (True, False)
    """
    return type(layer).__module__.split(".")[0] == "keras"


# The table.


def _einsum_outputs(layer):
    return Equation(layer.equation).kernel_outputs


def _einsum_positions(layer, inputs, outputs):
    units = [outputs[axis] for axis in Equation(layer.equation).output_axes(len(outputs))]
    return math.prod(outputs[1:]) // math.prod(units)


def _recurrent_positions(layer, inputs, outputs):
    one = list(outputs[2 if getattr(layer, "return_sequences", False) else 1 :])
    del one[0 if getattr(layer.cell, "data_format", None) == "channels_first" else -1]
    return inputs[1] * math.prod(one)


def _last_cell(layer):
    return layer.cell.cells[-1] if isinstance(layer.cell, keras.layers.StackedRNNCells) else layer.cell


# The activation functions of Keras whose output channels depend on other channels.
OVER_CHANNELS = ("softmax", "log_softmax", "sparsemax", "glu")
# What weights are called that are kernels, and that are none, in layers that have no row.
_KERNELS = ("kernel", "recurrent_kernel", "pointwise_kernel")
NO_KERNELS = ("bias", "gamma", "beta", "alpha")
# Embedding tables in such layers, by the weight's name (pos_embed, abs_position) or the class's (PositionalEncoding).
_EMBEDDED = re.compile(r"embed|encoding|(^|_)pos")
_POSITIONS = re.compile(r"Pos(ition(al)?)?_?(Emb|Enc)")

_L = keras.layers
_DENSE = Kernel((-1,), (-2,))
_CELL = {"kernel": _DENSE, "recurrent_kernel": _DENSE}
_DEPTHWISE_KERNEL = Kernel((-2, -1), (-2,), DEPTHWISE)
_TABLE = Kernel(role=EMBEDDING)
# Weights of any name: which of them are tables, Keras does not know.
_FOREIGN = {_L.TorchModuleWrapper: Kernel((0,), (1,), FOREIGN), _L.TFSMLayer: Kernel((-1,), (-2,), FOREIGN)}
# Axes of operators: comments in tensorflow/compiler/mlir/lite/ir/tfl_ops.td.
_GATHERED = {"GATHER": (-1,), "EMBEDDING_LOOKUP": (-1,)}  # the former also multiplies ones and zeros
_NONE = Kind()


def _of_dimensions(name, kind, operators=None):
    """Rows for the layers of one, two and three dimensions: `{layer: kind}`; `operators` are for each dimension."""
    found = {}
    for n in (1, 2, 3):
        layer = getattr(_L, name.replace("#", str(n)), None)
        if layer is not None:
            found[layer] = dataclasses.replace(kind, operators=(operators or {}).get(n, {}))
    return found


_CONVOLUTION = Kind(MIXES, {"kernel": _DENSE}, True, width="filters", grouped=True, gates="outputs")
_TRANSPOSED = Kind(MIXES, {"kernel": Kernel((-2,), (-1,))}, True, width="filters", gates="outputs", positions="inputs")
_DEPTHWISE_CONVOLUTION = Kind(KEEPS, {"kernel": _DEPTHWISE_KERNEL}, True, gates="outputs")
_SEPARABLE = Kind(
    MIXES, {"depthwise_kernel": _DEPTHWISE_KERNEL, "pointwise_kernel": _DENSE}, True, width="filters", gates="outputs"
)
_RECURRENT = Kind(MIXES, width="units", positions=_recurrent_positions, holder=_last_cell, recurrent=True)
_PLACES = Kind(KEEPS, zero=True)  # of an image, one channel at a time
_ALIKE = Kind(KEEPS, zero=True, pointwise=True)
_FUNCTION = Kind(KEEPS, activates=True, pointwise=True)
_KEEPING_ZERO = dataclasses.replace(_FUNCTION, zero=True)
_NOISE = Kind(KEEPS, inert=True, pointwise=True)
_NORMALIZATION = Kind(NORMALIZES, inert=True)
_SUM = Kind(JOINS, pointwise=True)
_PRODUCT = Kind(JOINS, product=True, pointwise=True)

_ROWS = {
    # Mixing by a kernel
    _L.Dense: Kind(MIXES, {"kernel": _DENSE}, True, width="units", operators={"FULLY_CONNECTED": (0,)}),
    _L.EinsumDense: Kind(
        MIXES,
        {"kernel": Kernel(_einsum_outputs)},
        linear=True,
        positions=_einsum_positions,
        operators={"BATCH_MATMUL": (-1,)},
    ),
    **_of_dimensions("Conv#D", _CONVOLUTION, {2: {"CONV_2D": (0,)}, 3: {"CONV_3D": (4,)}}),
    **_of_dimensions("Conv#DTranspose", _TRANSPOSED, {2: {"TRANSPOSE_CONV": (0,)}, 3: {"CONV_3D_TRANSPOSE": (3,)}}),
    **_of_dimensions("DepthwiseConv#D", _DEPTHWISE_CONVOLUTION, {2: {"DEPTHWISE_CONV_2D": (3,)}}),
    **_of_dimensions("SeparableConv#D", _SEPARABLE),
    # Recurrent, attention, embeddings
    _L.RNN: _RECURRENT,
    _L.SimpleRNN: _RECURRENT,
    _L.GRU: _RECURRENT,
    _L.LSTM: dataclasses.replace(_RECURRENT, operators={"UNIDIRECTIONAL_SEQUENCE_LSTM": (0,), "LSTM": (0,)}),
    **_of_dimensions("ConvLSTM#D", dataclasses.replace(_RECURRENT, width="filters")),
    _L.SimpleRNNCell: Kind(MIXES, _CELL, width="units"),
    _L.GRUCell: Kind(MIXES, _CELL, width="units"),
    _L.LSTMCell: Kind(MIXES, _CELL, width="units"),
    _L.TimeDistributed: Kind(holder=lambda layer: layer.layer),
    _L.MultiHeadAttention: Kind(MIXES),
    _L.GroupQueryAttention: Kind(MIXES),
    _L.Attention: Kind(MIXES),
    _L.AdditiveAttention: Kind(MIXES),
    _L.Dot: Kind(MIXES),
    _L.Embedding: Kind(kernels={"embeddings": _TABLE}, width="output_dim", operators=_GATHERED),
    _L.ReversibleEmbedding: Kind(
        kernels={"embeddings": _TABLE, "reverse_embeddings": _TABLE}, width="output_dim", operators=_GATHERED
    ),
    # Activations
    _L.Activation: _FUNCTION,
    _L.ReLU: _FUNCTION,
    _L.LeakyReLU: _KEEPING_ZERO,
    _L.ELU: _KEEPING_ZERO,
    _L.PReLU: Kind(KEEPS, zero=True, activates=True, operators={"PRELU": None}),  # a slope for each position
    _L.Softmax: Kind(NORMALIZES, activates=True),
    # Normalizations, dropout and noise
    _L.BatchNormalization: Kind(KEEPS, per_channel=("gamma", "beta"), inert=True, pointwise=True),
    _L.LayerNormalization: _NORMALIZATION,
    _L.GroupNormalization: _NORMALIZATION,
    _L.RMSNormalization: _NORMALIZATION,
    _L.UnitNormalization: _NORMALIZATION,
    _L.Dropout: dataclasses.replace(_NOISE, zero=True),
    _L.AlphaDropout: dataclasses.replace(_NOISE, pointwise=False),
    _L.GaussianDropout: _NOISE,
    _L.GaussianNoise: _NOISE,
    _L.Identity: _NOISE,
    _L.ActivityRegularization: dataclasses.replace(_NOISE, pointwise=False),
    _L.Rescaling: Kind(pointwise=True),
    _L.Normalization: Kind(pointwise=True),
    _L.InputLayer: Kind(pointwise=True),
    # Positions, one channel at a time
    **_of_dimensions("MaxPooling#D", _PLACES, {2: {"MAX_POOL_2D": None}}),
    **_of_dimensions("AveragePooling#D", _PLACES, {2: {"AVERAGE_POOL_2D": None}}),
    **_of_dimensions("GlobalMaxPooling#D", _PLACES),
    **_of_dimensions("GlobalAveragePooling#D", _PLACES, {2: {"MEAN": None}}),
    **_of_dimensions("AdaptiveMaxPooling#D", _PLACES),
    **_of_dimensions("AdaptiveAveragePooling#D", _PLACES),
    **_of_dimensions("ZeroPadding#D", _PLACES),
    **_of_dimensions("Cropping#D", _PLACES),
    **_of_dimensions("UpSampling#D", _ALIKE),
    # Several inputs
    _L.Add: dataclasses.replace(_SUM, operators={"ADD": None}),
    _L.Subtract: _SUM,
    _L.Average: _SUM,
    _L.Maximum: _SUM,
    _L.Minimum: _SUM,
    _L.Multiply: dataclasses.replace(_PRODUCT, operators={"MUL": None}),
    _L.Concatenate: Kind(CONCATENATES, pointwise=True),
    # Other axes
    _L.Flatten: Kind(MOVES),
    _L.Reshape: Kind(MOVES),
    _L.Permute: Kind(MOVES),
    _L.RepeatVector: Kind(MOVES),
}

# The operations of `keras.ops`, by the lower-case names of their classes.
_OPERATIONS = {
    **{
        name.replace("_", ""): Kind(NORMALIZES, activates=True) if name in OVER_CHANNELS else _FUNCTION
        for name in dir(keras.activations)
        if name not in ("linear", "get", "serialize", "deserialize") and not name.startswith("_")
    },
    **dict.fromkeys(("clip", "identity", "zeroslike", "oneslike"), Kind(KEEPS, pointwise=True)),
    **dict.fromkeys(("add", "subtract", "maximum", "minimum"), _SUM),
    **dict.fromkeys(("divide", "truedivide"), Kind(pointwise=True)),
    "multiply": _PRODUCT,
    **dict.fromkeys(("dot", "matmul", "einsum", "tensordot"), Kind(MIXES)),
    "concatenate": Kind(CONCATENATES, pointwise=True),
    **dict.fromkeys(("split", "getitem", "repeat", "tile"), Kind(SLICES)),
    **dict.fromkeys(
        ("reshape", "ravel", "transpose", "swapaxes", "moveaxis", "expanddims", "squeeze"),
        Kind(MOVES),
    ),
}
