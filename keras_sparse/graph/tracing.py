"""A layer of layers with a `call` of its own is traced: run on symbolic inputs, it becomes a functional model."""

import keras
import numpy as np

from keras_sparse.graph.calls import Tensor
from keras_sparse.graph.kinds import UNKNOWN, kind_of, of_keras
from keras_sparse.graph.rebuilding import replay
from keras_sparse.graph.substitution import substituted
from keras_sparse.graph.weights import as_array
from keras_sparse.graph.weights import layers as layers_of

__all__ = ["check_opened", "drawn", "is_composite", "may_open", "repacked", "runnable", "traced"]

_SAMPLES, _LENGTH = 3, 5  # with which a graph that is to stand for a layer is tried


def is_composite(operation):
    """Whether it is a layer, not one of Keras's own, that holds layers with weights, and has no row that tells of it.

    Example:

    >>> import keras, keras_sparse as ks
    >>> class Block(keras.layers.Layer):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = keras.layers.Dense(3)
    ...
    ...     def build(self, shape):
    ...         self.inner.build(shape)
    >>> block = Block()
    >>> block.build((None, 4))
    >>> from keras_sparse.graph.tracing import is_composite
    >>> is_composite(block), is_composite(block.inner)
    (True, False)
    """
    if not isinstance(operation, keras.layers.Layer) or of_keras(operation) or getattr(operation, "has_gates", False):
        return False  # of Keras, layers of layers are known; gates are to be baked first
    kind = kind_of(operation)
    known = kind.channels != UNKNOWN or kind.kernels or kind.holder
    return not known and any(one is not operation and one.weights for one in layers_of(operation))


def traced(layer, args, kwargs, full=True):
    """A functional model that does what the layer's `call` does with such arguments, and its tensors.

    Args:
        layer: The layer.
        args: Its arguments, with a `Tensor` for each tensor.
        kwargs: Likewise.
        full: Whether its inputs are for one sample, with numbers for sizes that are open.

    Returns:
        `(model, tensors)`: the `Tensor` for each of the model's inputs.

    Raises:
        Exception: Whatever `call` raises on symbolic inputs.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.calls import Tensor
    >>> from keras_sparse.graph.tracing import traced
    >>> class Double(keras.layers.Layer):
    ...     def call(self, x):
    ...         return x + x
    >>> model, tensors = traced(Double(), [Tensor((None, 4), "float32")], {})
    >>> [operation.name for operation in model.operations][1:]
    ['add']
    """
    symbols, tensors = {}, []

    def symbol(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) not in symbols:
            symbols[id(value)] = keras.Input(batch_shape=value.full if full else value.shape, dtype=value.dtype)
            tensors.append(value)
        return symbols[id(value)]

    args, kwargs = keras.tree.map_structure(symbol, [list(args), kwargs])
    mine, nothing = [one for one in layers_of(layer) if not of_keras(one)], [None]
    specs = [(one, "compute_output_spec", _spec(one, nothing)) for one in mine]
    # Weights that it uses by itself: a tensor can stand in the config of a graph, a variable cannot.
    own = [(layer, name, value) for name, value in vars(layer).items() if isinstance(value, keras.Variable)]
    with substituted([*specs, *((one, name, keras.ops.convert_to_tensor(value)) for one, name, value in own)]):
        outputs = keras.tree.flatten(layer.call(*args, **kwargs))
    outputs = [x for x in outputs if all(x is not one for one in nothing)]
    return keras.Model([symbols[id(tensor)] for tensor in tensors], outputs, name=layer.name), tensors


def runnable(operation):
    """The operation, or a layer in place of a reshape that took the size of the batch from a symbolic input: `None`.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.tracing import runnable
    >>> x = keras.Input((4,))
    >>> model = keras.Model(x, keras.ops.reshape(x, (x.shape[0], 2, 2)))
    >>> runnable(model.operations[-1])(keras.ops.ones((3, 4))).shape[0]
    3
    """
    shape = getattr(operation, "newshape", None)
    if not isinstance(shape, (list, tuple)) or not shape or shape[0] is not None or list(shape).count(None) > 2:
        return operation
    return keras.layers.Reshape([-1 if n is None else n for n in shape[1:]])


def check_opened(layer, graph, args, kwargs):
    """Raise unless a functional model computes what a layer does, with other weights, on other numbers of samples.

    A weight that `call` uses by itself, and not by a layer that it calls, is a constant in the model.

    Args:
        layer: The layer.
        graph: What `traced` makes of it.
        args: The arguments of its call, with a `Tensor` for each tensor.
        kwargs: Likewise.

    Raises:
        ValueError: If it computes something else.
        Exception: If it cannot be run.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.calls import Tensor
    >>> from keras_sparse.graph.tracing import check_opened, traced
    >>> layer, args = keras.layers.ReLU(), [Tensor((None, 4), "float32")]
    >>> check_opened(layer, traced(layer, args, {}, full=False)[0], args, {})
    """
    rng, values = np.random.default_rng(0), {}

    def value(tensor):
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in values:
            shape = (_SAMPLES, *(_LENGTH if n is None else n for n in tensor.shape[1:]))
            values[id(tensor)] = keras.ops.convert_to_tensor(drawn(shape, tensor.dtype, rng))
        return values[id(tensor)]

    args, kwargs = keras.tree.map_structure(value, [list(args), kwargs])
    others = [(v, as_array(v) * 0.9 + 0.1) for v in layer.weights if "float" in v.dtype]
    with keras.StatelessScope([(v, keras.ops.convert_to_tensor(x, v.dtype)) for v, x in others]):
        expected = [x for x in keras.tree.flatten(layer(*args, **kwargs)) if x is not None]
        found = replay(graph, list(values.values()), lambda operation, a, k: runnable(operation)(*a, **k))
    for one, other in zip(expected, found, strict=True):
        one, other = (keras.ops.convert_to_numpy(x) for x in (one, other))
        if one.shape != other.shape or not np.allclose(one, other, 1e-4, 1e-5):
            raise ValueError("its `call` does something else on symbolic inputs")


def drawn(shape, dtype, rng):
    """Normal random numbers of a float's type, ones of any other.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.graph.tracing import drawn
    >>> drawn((2,), "int32", np.random.default_rng(0)).tolist()
    [1, 1]
    """
    kind = keras.backend.standardize_dtype(dtype)
    return rng.normal(size=shape).astype(kind) if kind.startswith("float") else np.ones(shape, kind)


def may_open(layer, args, kwargs):
    """Whether a functional model may stand for the layer: it is called as Keras does it, and casts no inputs.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.calls import Tensor
    >>> from keras_sparse.graph.tracing import may_open
    >>> half = keras.layers.Dense(3, dtype="mixed_float16")
    >>> may_open(half, [Tensor((None, 4), "float32")], {}), may_open(half, [Tensor((None, 4), "float16")], {})
    (False, True)
    """
    tensors = [x for x in keras.tree.flatten([list(args), kwargs]) if isinstance(x, Tensor)]
    kinds = {keras.backend.standardize_dtype(x.dtype) for x in tensors}
    return "mask" not in kwargs and all("float" not in kind or kind == layer.compute_dtype for kind in kinds)


def _spec(layer, nothing):
    """What tells the outputs of a layer inside: tensors all, as a graph has it.

    What stands for a `None` is appended to `nothing`.
    """
    own = layer.compute_output_spec

    def something(x):
        if x is None:
            nothing.append(keras.KerasTensor((1,), "float32"))
            return nothing[-1]
        return x

    def found(*args, **kwargs):
        try:
            spec = own(*args, **kwargs)
        except Exception:
            spec = keras.Operation.compute_output_spec(layer, *args, **kwargs)
        return keras.tree.map_structure(something, spec)

    return found


def repacked(structure, outputs):
    """A structure with these outputs in place of its tensors; what is `None` stays so.

    Example:

    >>> from keras_sparse.graph.tracing import repacked
    >>> repacked((1, None, 2), ["a", "b"])
    ('a', None, 'b')
    """
    left = iter(outputs)
    return keras.tree.map_structure(lambda x: None if x is None else next(left), structure)
