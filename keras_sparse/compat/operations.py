"""An operation of TensorFlow that Keras 2 made a layer of (`TFOpLambda`), as one of `keras.ops`."""

import keras
import numpy as np
from keras import ops

__all__ = ["apply"]


def _add(x, y):
    # Keras 3.15 takes a tensor of shape (batch, 1, 1) for a bias where the batch is as long as the last axis.
    if all(isinstance(one, keras.KerasTensor) for one in (x, y)):
        if any(len(one.shape) > 1 and set(one.shape[1:]) == {1} for one in (x, y)):
            return ops.subtract(x, ops.negative(y))
    return ops.add(x, y)


def _matmul(a, b, transpose_a=False, transpose_b=False):
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    return ops.matmul(a, ops.swapaxes(b, -1, -2) if transpose_b else b)


def _pad(tensor, paddings, mode="CONSTANT", constant_values=0):
    return ops.pad(
        tensor, paddings, mode.lower(), **({"constant_values": constant_values} if mode == "CONSTANT" else {})
    )


def _split(value, num_or_size_splits, axis=0):
    sizes = num_or_size_splits
    return ops.split(value, sizes if isinstance(sizes, int) else [int(n) for n in np.cumsum(sizes)[:-1]], axis)


def _resize(images, size, method="bilinear", preserve_aspect_ratio=False, antialias=False):
    if preserve_aspect_ratio:
        raise ValueError("`tf.image.resize` with `preserve_aspect_ratio` is not known here.")
    return ops.image.resize(images, size, method, antialias, data_format="channels_last")


def _normalize(x, axis=None, epsilon=1e-12):
    squares = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return ops.multiply(x, ops.rsqrt(ops.maximum(squares, epsilon)))


# By name: the function and the names that TensorFlow gives to its arguments, in the order in which it takes them.
_BINARY = {
    "math.add": _add, "__operators__.add": _add, "math.subtract": ops.subtract, "math.multiply": ops.multiply,
    "math.divide": ops.true_divide, "math.truediv": ops.true_divide, "math.pow": ops.power,
    "math.maximum": ops.maximum, "math.minimum": ops.minimum, "math.greater": ops.greater, "math.less": ops.less,
    "math.equal": ops.equal, "math.floordiv": ops.floor_divide, "math.squared_difference": None,
}  # fmt: skip
_BINARY["math.squared_difference"] = lambda x, y: ops.square(ops.subtract(x, y))
_UNARY = {
    "math.abs": ops.abs, "math.negative": ops.negative, "math.sqrt": ops.sqrt, "math.rsqrt": ops.rsqrt,
    "math.square": ops.square, "math.exp": ops.exp, "math.log": ops.log, "math.tanh": ops.tanh, "nn.tanh": ops.tanh,
    "math.sin": ops.sin, "math.cos": ops.cos, "math.sigmoid": ops.sigmoid, "nn.sigmoid": ops.sigmoid,
    "math.softplus": ops.softplus, "math.reciprocal": ops.reciprocal, "math.sign": ops.sign, "math.round": ops.round,
    "math.floor": ops.floor, "math.ceil": ops.ceil, "identity": lambda x: x, "stop_gradient": ops.stop_gradient,
    "zeros_like": ops.zeros_like, "ones_like": ops.ones_like, "math.erf": ops.erf, "math.log1p": ops.log1p,
    "math.logical_not": ops.logical_not,
}  # fmt: skip
_FEATURES = {
    "nn.relu": ops.relu, "nn.relu6": ops.relu6, "nn.elu": ops.elu, "nn.selu": ops.selu, "nn.swish": ops.silu,
    "nn.silu": ops.silu, "nn.softplus": ops.softplus, "nn.softsign": ops.softsign,
}  # fmt: skip
_REDUCTIONS = {
    "math.reduce_mean": ops.mean, "math.reduce_sum": ops.sum, "math.reduce_max": ops.max, "math.reduce_min": ops.min,
    "math.reduce_prod": ops.prod, "math.reduce_variance": ops.var, "math.reduce_std": ops.std,
}  # fmt: skip
_OPERATIONS = {
    **{name: (function, "x y") for name, function in _BINARY.items()},
    **{name: (function, "x") for name, function in _UNARY.items()},
    **{name: (function, "features") for name, function in _FEATURES.items()},
    **{name: (function, "input_tensor axis keepdims") for name, function in _REDUCTIONS.items()},
    "nn.gelu": (lambda x, approximate=False: ops.gelu(x, approximate), "features approximate"),
    "nn.leaky_relu": (lambda x, alpha=0.2: ops.leaky_relu(x, alpha), "features alpha"),
    "nn.softmax": (ops.softmax, "logits axis"),
    "nn.log_softmax": (ops.log_softmax, "logits axis"),
    "linalg.matmul": (_matmul, "a b transpose_a transpose_b"),
    "math.l2_normalize": (_normalize, "x axis epsilon"),
    "math.argmax": (ops.argmax, "input axis"),
    "clip_by_value": (ops.clip, "t clip_value_min clip_value_max"),
    "concat": (ops.concatenate, "values axis"),
    "stack": (ops.stack, "values axis"),
    "split": (_split, "value num_or_size_splits axis"),
    "reshape": (ops.reshape, "tensor shape"),
    "transpose": (ops.transpose, "a perm"),
    "expand_dims": (ops.expand_dims, "input axis"),
    "squeeze": (ops.squeeze, "input axis"),
    "tile": (ops.tile, "input multiples"),
    "pad": (_pad, "tensor paddings mode constant_values"),
    "gather": (lambda params, indices, axis=None: ops.take(params, indices, axis or 0), "params indices axis"),
    "cast": (ops.cast, "x dtype"),
    "where": (ops.where, "condition x y"),
    "image.resize": (_resize, "images size method preserve_aspect_ratio antialias"),
}
_TENSORS = {"x", "y", "a", "b", "values", "params", "indices", "condition", "clip_value_min", "clip_value_max"}


def apply(name, arguments, options):
    """Apply an operation of TensorFlow to tensors of a Keras 3 model.

    Args:
        name: The name after `tf.`, such as `"math.multiply"`.
        arguments: List of what comes without a name: tensors and constants.
        options: Dict of what comes with one.

    Returns:
        The tensor, or a list of them.

    Raises:
        ValueError: If it is not known here, or has options that are not.

    Example:

    >>> import keras
    >>> from keras_sparse.compat import operations
    >>> operations.apply("math.multiply", [keras.Input((3,))], {"y": 0.5, "name": None}).shape
    (None, 3)
    """
    if name == "__operators__.getitem":
        return arguments[0][tuple(_index(index) for index in _listed(options["slice_spec"]))]
    known = _OPERATIONS.get(name.removeprefix("compat.v1.").removeprefix("compat.v2."))
    if known is None:
        raise ValueError(
            f"The model has the operation `tf.{name}` (TFOpLambda), which is not among those that are known here. "
            "Build the model anew with `keras.ops`, and load the weights into it."
        )
    function, names = known[0], known[1].split()
    given = dict(zip(names, arguments, strict=False)) if len(arguments) <= len(names) else {"": arguments}
    given.update({key: value for key, value in options.items() if value is not None and key != "name"})
    unknown = [key for key, value in given.items() if key not in names and value is not False]
    if unknown:
        raise ValueError(f"The operation `tf.{name}` (TFOpLambda) has {unknown}, which are not known here.")
    return _call(
        function, [(key, _constant(given[key]) if key in _TENSORS else given[key]) for key in names if key in given]
    )


def _call(function, pairs):
    """Call a function of `keras.ops`, whose arguments come in the order of TensorFlow's, mostly with other names."""
    tensors = [value for key, value in pairs]
    named = {key: value for key, value in pairs if key in ("axis", "keepdims", "alpha", "epsilon", "antialias")}
    return function(*tensors[: len(tensors) - len(named)], **named)


def _constant(value):
    """A list of numbers as an array; tensors and lists of tensors as they are."""
    if not isinstance(value, list) or any(isinstance(one, keras.KerasTensor) for one in value):
        return value
    array = np.asarray(value)
    return array.astype("float32") if array.dtype.kind == "f" else array


def _listed(spec):
    return spec if isinstance(spec, list) else [spec]


def _index(spec):
    if not isinstance(spec, dict):
        return spec
    if spec.get("class_name") == "__ellipsis__":
        return ...
    return slice(spec.get("start"), spec.get("stop"), spec.get("step"))
