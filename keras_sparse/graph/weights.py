"""A weight of a model is a variable in a layer; some are kernels, which may become sparse.

The walk is over the layers, never the optimizer. A weight's identity is its variable object: paths repeat in nested
models and change when a model is loaded. The order is that of `model.trainable_variables`.
"""

from dataclasses import dataclass

import keras
import numpy as np

from keras_sparse import zeros
from keras_sparse.graph.kinds import KERNEL, Kernel, kernel_of, kind_of
from keras_sparse.identity import IdentityDict

__all__ = ["Weight", "along", "as_array", "check_model", "layers", "weights"]


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a model, as pruning sees it.

    Attributes:
        variable: The `keras.Variable`.
        layer: The layer that owns it.
        layout: The `ks.graph.Kernel` that it is, as the kind of its layer says; `None` if it is none.
        trainable: Whether training changes it.
        skipped: Why it is left dense, or `None` if it is selected.
        holders: The layers that hold it: the owner, and those around it up to the model.
        quantized: The `ks.graph.Kernel` that it holds as integers, which Keras's `quantize` made, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    >>> [(w.variable.name, w.skipped) for w in ks.graph.weights(model)]
    [('kernel', None), ('bias', 'bias of Dense: not a kernel')]
    """

    variable: keras.Variable
    layer: keras.layers.Layer
    layout: Kernel | None
    trainable: bool
    skipped: str | None
    holders: tuple = ()
    quantized: Kernel | None = None

    @property
    def path(self):
        """The variable's path, such as `"dense/kernel"`."""
        return self.variable.path

    @property
    def kernel(self):
        """Whether it multiplies inputs, or is looked up, and may therefore be made sparse if a filter names it."""
        return self.layout is not None

    @property
    def role(self):
        """`"kernel"`, `"depthwise kernel"`, `"embedding"`, `FOREIGN`, or `None` for all other weights."""
        return self.layout.role if self.kernel else None

    @property
    def size(self):
        """Number of elements."""
        return int(np.prod(self.variable.shape))

    def numpy(self):
        """The value as a NumPy array; low-precision floats come as float32."""
        value = as_array(self.variable)
        return value if value.dtype in (np.float32, np.float64) else value.astype("float32")

    def in_use(self):
        """The value that the layer multiplies with, as a NumPy array: with LoRA's update, where it has one.

        Of integers that Keras's `quantize` made it is without the scale: what is zero in it is zero in use.
        """
        if self.quantized is not None:
            return _integers(self.layer, self.variable)
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
        """The axes that count output units, as the kind of its layer says; of other weights the last."""
        return (self.layout or Kernel()).output_axes(self.layer, len(self.variable.shape))

    @property
    def input_axes(self):
        """The axes that count inputs: those that are no outputs; of a convolution the channels, not the positions."""
        return (self.layout or Kernel()).input_axes(self.layer, len(self.variable.shape))

    def dead_units(self):
        """How many output units have only zeros; `None` for weights that are not kernels."""
        return _count_zero_slices(self.in_use(), self.output_axes) if self.kernel else None

    def dead_inputs(self):
        """How many inputs (of a convolution: channels) meet only zeros; `None` for weights that are not kernels."""
        if not self.kernel:
            return None
        value, axes = self.in_use(), self.input_axes
        groups = self.layer.groups if kind_of(self.layer).grouped else 1
        if groups > 1:  # Each group of filters reads channels of its own.
            value = value.reshape(*value.shape[:-1], groups, -1)
            axes = (*axes, value.ndim - 2)
        return _count_zero_slices(value, axes)


def _count_zero_slices(value, axes):
    """How many slices along `axes` hold only zeros."""
    others = tuple(axis for axis in range(value.ndim) if axis not in axes)
    return int(np.sum(~np.any(value != 0, axis=others)))


def _integers(layer, variable):
    """The integers of a quantized kernel, unpacked, in the kernel's own order of axes, without their zero points."""
    mode = layer.quantization_mode
    value = as_array(variable if mode == "int8" else getattr(layer, variable.name)).astype("float32")
    zero, groups = getattr(layer, "kernel_zero", None), getattr(layer, "g_idx", None)
    if mode == "int8" or zero is None:
        return value
    axis = 0 if mode == "int4" else -1  # GPTQ and AWQ keep outputs first.
    value = value - np.take(as_array(zero).astype("float32"), as_array(groups).astype(int), axis=axis)
    return value if axis == 0 else value.T


def as_array(variable):
    """Return the value of a `keras.Variable` (or a tensor) as a NumPy array.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.selection.as_array(keras.Variable([1.0, 0.0])) == 0
    array([False,  True])
    """
    # As a tensor first: NumPy 2 warns when it meets the variables of TensorFlow and JAX themselves (Keras 3.15).
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def along(axis, values, rank):
    """Reshape a vector so that it broadcasts along one axis of arrays of a rank.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.graph.along(1, np.array([True, False]), 4).shape
    (1, 2, 1, 1)
    """
    return np.reshape(values, [-1 if i == axis else 1 for i in range(rank)])


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
                "the model with `import keras`; `ks.compat.tfmot.load(path)` reads `.h5` files that tf_keras saved, "
                f"with the wrappers of tfmot or without. Received: {type(model).__module__}.{type(model).__name__}"
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
    owners, holders = IdentityDict(), IdentityDict()
    for layer, own in _walk(model, set()):
        for variable in own:
            owners.setdefault(variable, layer)
        for variable in layer.weights:
            holders.setdefault(variable, []).append(layer)
    trainable = IdentityDict.fromkeys(model.trainable_variables)
    return [
        _weight(v, owners.get(v, model), v in trainable, tuple(holders.get(v, (model,))))
        for v in IdentityDict.fromkeys([*trainable, *model.weights])
    ]


def _weight(variable, layer, trainable, holders):
    layout, reason = kernel_of(layer, variable.name, variable.shape, trainable)
    quantized = None
    if layout is not None and "float" not in variable.dtype:
        if _is_read(layer):
            quantized = layout
        layout, reason = None, f"{variable.dtype}, not floating point"
    skipped = None if reason is None else f"{variable.name} of {type(layer).__name__}: {reason}"
    if layout is not None and layout.role != KERNEL:
        skipped = f"{layout.role}: left dense unless a filter names it"
    return Weight(variable, layer, layout, trainable, skipped, holders, quantized)


def _is_read(layer):
    """Whether the integers of a quantized layer are understood here."""
    mode = getattr(layer, "quantization_mode", None)
    if mode == "int8":
        return True
    if mode in ("gptq", "awq"):
        return isinstance(layer, keras.layers.Dense) and bool(getattr(layer, f"is_{mode}_calibrated", False))
    equation = getattr(layer, "equation", "ab,bc->ac")
    two_axes = len(equation.replace("->", ",").split(",")[1]) == 2
    return mode == "int4" and two_axes and isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))


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
