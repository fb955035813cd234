"""A weight of a model is a variable in a layer; some are kernels, which may become sparse.

The walk is over the layers, never the optimizer. A weight's identity is its variable object: paths repeat in nested
models and change when a model is loaded. The order is that of `model.trainable_variables`.
"""

import re
from dataclasses import dataclass, replace

import keras
import numpy as np

from keras_sparse import zeros

__all__ = ["NO_KERNELS", "Weight", "as_array", "check_model", "layers", "weights"]

_KERNELS = ("kernel", "recurrent_kernel", "pointwise_kernel")
NO_KERNELS = ("bias", "gamma", "beta", "alpha")
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
# Embedding tables in custom layers, by the weight's name (pos_embed, abs_position) or the class's (PositionalEncoding).
_EMBEDDING = re.compile(r"embed|(^|_)pos")
_POSITIONS = re.compile(r"Pos(ition(al)?)?_?(Emb|Enc)")
_TRANSPOSED = tuple(getattr(keras.layers, f"Conv{n}DTranspose") for n in (1, 2, 3))


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a model, as pruning sees it.

    Attributes:
        variable: The `keras.Variable`.
        layer: The layer that owns it.
        kernel: Whether it multiplies inputs and may therefore be made sparse if a filter names it.
        trainable: Whether training changes it.
        skipped: Why it is left dense, or `None` if it is selected.
        holders: The layers that hold it: the owner, and those around it up to the model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    >>> [(w.variable.name, w.skipped) for w in ks.selection.weights(model)]
    [('kernel', None), ('bias', 'bias of Dense: not a kernel')]
    """

    variable: keras.Variable
    layer: keras.layers.Layer
    kernel: bool
    trainable: bool
    skipped: str | None
    holders: tuple = ()

    @property
    def path(self):
        """The variable's path, such as `"dense/kernel"`."""
        return self.variable.path

    @property
    def size(self):
        """Number of elements."""
        return int(np.prod(self.variable.shape))

    def numpy(self):
        """The value as a NumPy array; low-precision floats come as float32."""
        value = as_array(self.variable)
        return value if value.dtype in (np.float32, np.float64) else value.astype("float32")

    def in_use(self):
        """The value that the layer multiplies with, as a NumPy array: with LoRA's update, where it has one."""
        if not (self.kernel and getattr(self.layer, "lora_enabled", False)):
            return self.numpy()
        # Of these layers the attribute is the sum, and the variable only the frozen part.
        value = as_array(getattr(self.layer, self.variable.name, self.variable))
        return value if value.dtype in (np.float32, np.float64) else value.astype("float32")

    def pruned_zeros(self, value=None):
        """Where zeros count as pruned and not as the initializer's, an array of booleans: see `keras_sparse.zeros`."""
        return zeros.pruned(self.numpy() if value is None else value, self.variable, self.layer)

    @property
    def output_axes(self):
        """The axes that count output units: the last, unless the layer's mathematics says otherwise."""
        last = len(self.variable.shape) - 1
        if isinstance(self.layer, _TRANSPOSED):
            return (last - 1,)
        if self._depthwise:
            return (last - 1, last)
        if isinstance(self.layer, keras.layers.EinsumDense) and self.variable.name == "kernel":
            inputs, kernel, _ = re.split(",|->", self.layer.equation.replace(" ", ""))
            return tuple(axis for axis, letter in enumerate(kernel) if letter not in inputs)
        return (last,)

    @property
    def input_axes(self):
        """The axes that count inputs: those that are no outputs; of a convolution the channels, not the positions."""
        rank = len(self.variable.shape)
        if self._depthwise:
            return (rank - 2,)
        rest = tuple(axis for axis in range(rank) if axis not in self.output_axes)
        return rest[-1:] if self._convolves else rest

    @property
    def _depthwise(self):
        return isinstance(self.layer, _DEPTHWISE) or self.variable.name == "depthwise_kernel"

    @property
    def _convolves(self):
        return hasattr(self.layer, "kernel_size")  # Every convolution of Keras has it, the recurrent cells' too.

    def dead_units(self):
        """How many output units have only zeros; `None` for weights that are not kernels."""
        return _count_zero_slices(self.in_use(), self.output_axes) if self.kernel else None

    def dead_inputs(self):
        """How many inputs (of a convolution: channels) meet only zeros; `None` for weights that are not kernels."""
        if not self.kernel:
            return None
        value, axes = self.in_use(), self.input_axes
        groups = getattr(self.layer, "groups", 1) if self._convolves else 1
        if groups > 1:  # Each group of filters reads channels of its own.
            value = value.reshape(*value.shape[:-1], groups, -1)
            axes = (*axes, value.ndim - 2)
        return _count_zero_slices(value, axes)


def _count_zero_slices(value, axes):
    """How many slices along `axes` hold only zeros."""
    others = tuple(axis for axis in range(value.ndim) if axis not in axes)
    return int(np.sum(~np.any(value != 0, axis=others)))


def as_array(variable):
    """Return the value of a `keras.Variable` (or a tensor) as a NumPy array.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.selection.as_array(keras.Variable([1.0, 0.0])) == 0
    array([False,  True])
    """
    # As a tensor first: NumPy 2 warns when it meets the variables of TensorFlow and JAX themselves (Keras 3.15).
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def check_model(model):
    """Raise unless `model` is a built Keras 3 model (or layer).

    Raises:
        TypeError: If it is something else; a `tf_keras` object gets a message that says so.
        ValueError: If it has not been built.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.selection.check_model(keras.Sequential([keras.layers.Dense(3)]))
    Traceback (most recent call last):
    ...
    ValueError: The model 'sequential...' is not built, so it has no weights yet. Call it on a batch of data, ...
    """
    if not isinstance(model, keras.layers.Layer):
        if any(base.__module__.split(".")[0] == "tf_keras" for base in type(model).__mro__):
            raise TypeError(
                "keras_sparse works on Keras 3, and this is an object of tf_keras, the legacy Keras 2. Build or load "
                "the model with `import keras`; reading models that tfmot pruned is the purpose of `ks.compat.tfmot` "
                f"(not in this version). Received: {type(model).__module__}.{type(model).__name__}"
            )
        raise TypeError(f"Expected a Keras 3 model. Received: {model!r} of type {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights yet. Call it on a batch of data, call "
            f"`model.build(input_shape)`, or start it with `keras.Input`. Received: {type(model).__name__}"
        )
    if not model.weights:
        raise ValueError(
            f"The model {model.name!r} has no weights, so there is nothing to make sparse. "
            f"Received: {type(model).__name__} without weights"
        )


def layers(model):
    """List a model and every layer in it, nested ones too, once each; the model comes last.

    Example:

    >>> import keras, keras_sparse as ks
    >>> block = keras.Sequential([keras.layers.Dense(3, name="a")], name="block")
    >>> [layer.name for layer in ks.selection.layers(block)]
    ['a', 'block']
    """
    return [layer for layer, _ in _walk(model, set())]


def weights(model):
    """List every weight of a built model, trainable ones first, with the reason why it is skipped by default.

    Args:
        model: A built Keras model or layer.

    Returns:
        List of `Weight`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(9, 3)])
    >>> [w.skipped for w in ks.selection.weights(model)]
    ['embedding: left dense unless a filter names it']
    """
    owners, holders = {}, {}
    for layer, own in _walk(model, set()):
        for variable in own:
            owners.setdefault(id(variable), layer)
        for variable in layer.weights:
            holders.setdefault(id(variable), []).append(layer)
    trainable = {id(v) for v in model.trainable_variables}
    ordered = model.trainable_variables + [v for v in model.weights if id(v) not in trainable]
    unique = {id(v): v for v in ordered}.values()
    return [
        replace(_weight(v, owners.get(id(v), model), id(v) in trainable), holders=tuple(holders.get(id(v), (model,))))
        for v in unique
    ]


def _weight(variable, layer, trainable):
    name, rank = variable.name, len(variable.shape)
    of = f"{name} of {type(layer).__name__}"
    # A layer is Keras's own by where its class lives; its rank-2 biases (GRU, attention) are no kernels.
    own = type(layer).__module__.split(".")[0] == "keras"
    embedding = ("embedding" in name and not name.startswith("lora_")) if own else _is_embedding(name, layer)
    # Scales, class tokens and the like come as (1, C), (T, 1) or (1, 1, C), so that they broadcast.
    vector = not own and name not in _KERNELS and sum(int(n) > 1 for n in variable.shape) <= 1
    depthwise = isinstance(layer, _DEPTHWISE) or name == "depthwise_kernel"
    kernel = name in _KERNELS or depthwise or embedding or (not own and rank >= 2)
    skipped = None
    if not kernel or name in NO_KERNELS or name.endswith("log_alpha") or rank < 1:
        kernel, skipped = False, f"{of}: not a kernel"
    elif vector and not depthwise:
        kernel, skipped = False, f"{of}: a vector of shape {tuple(variable.shape)}, not a kernel"
    elif "float" not in variable.dtype:
        kernel, skipped = False, f"{of}: {variable.dtype}, not floating point"
    elif not trainable and not own and name not in _KERNELS:
        kernel, skipped = False, f"{of}: not trainable"
    elif embedding:
        skipped = "embedding: left dense unless a filter names it"
    elif depthwise:
        skipped = "depthwise kernel: left dense unless a filter names it"
    return Weight(variable, layer, kernel, trainable, skipped)


def _is_embedding(name, layer):
    """Whether a weight of a layer that is not Keras's own looks like an embedding table, such as one of positions."""
    named = bool(_EMBEDDING.search(name)) or bool(_POSITIONS.search(type(layer).__name__))
    return named and name not in _KERNELS and not name.endswith(("_kernel", "_bias"))


def _walk(holder, seen):
    """Yield each layer with the variables that are its own, found in its attributes and the containers in them.

    `Layer` has no public list of its sublayers (only `Model` has), and attention, wrappers and custom layers keep
    theirs in attributes. Sublayers come first: wrappers (spectral normalization) refer to the weights of the layer
    that they wrap.
    """
    seen.add(id(holder))
    own, stack = [], list(vars(holder).values())
    while stack:
        value = stack.pop()
        if isinstance(value, keras.Variable):
            own.append(value)
        elif isinstance(value, keras.layers.Layer):
            if id(value) not in seen:
                yield from _walk(value, seen)
        elif isinstance(value, (list, tuple, set, dict)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
    yield holder, own
