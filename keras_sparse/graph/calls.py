"""A call is one use of a layer or operation in a model, with what is known of the channels it takes and returns."""

import dataclasses
import inspect
from collections.abc import Callable

import keras
import numpy as np

from keras_sparse.graph.weights import along, as_array

__all__ = ["Call", "Condition", "Part", "Tensor"]

_OPEN = 8  # stands for a size that is not known


@dataclasses.dataclass(eq=False)
class Tensor:
    """What is known of a tensor of the model.

    Attributes:
        shape: The shape, with `None` for what is open.
        dtype: The data type.
        labels: The label of each element, an array of the same rank, of size 1 along axes that do not matter.
        constant: The value in inference of elements that are constant, and NaN for others, in the shape of `labels`;
            `None` if none is.

    Example:

    >>> from keras_sparse.graph.calls import Tensor
    >>> Tensor((None, 8, 3), "float32").full
    (1, 8, 3)
    """

    shape: tuple
    dtype: str
    labels: np.ndarray | None = None
    constant: np.ndarray | None = None

    @property
    def full(self):
        """The shape for one sample, with a number for what is open."""
        return (1, *(_OPEN if n is None else n for n in self.shape[1:])) if self.shape else ()

    @property
    def constants(self):
        """`constant`, all NaN if none is."""
        return np.full(self.labels.shape, np.nan) if self.constant is None else self.constant

    def constants_along(self, axis, count):
        """The constant value of each of the `count` places along an axis, NaN where there is none for all of it."""
        value = self.constants
        others = tuple(i for i in range(value.ndim) if i != axis % value.ndim)
        low, high = value.min(axis=others), value.max(axis=others)
        return np.broadcast_to(np.where(low == high, low, np.nan), count)


@dataclasses.dataclass(eq=False)
class Part:
    """The labels of a weight: `{axis: vector of labels}`, for the axes along which channels can be removed.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.graph.calls import Part
    >>> part = Part(keras.Variable([1.0, 2.0]), {0: np.array([1, 2])}, made=(0,))
    >>> part.keep(lambda labels: labels != 2, np.array([5.0, 6.0]))
    array([5.])
    """

    variable: keras.Variable
    axes: dict
    made: tuple = ()  # the axes of channels that are zero where it and what else makes them are

    def keep(self, kept, value):
        """An array of the variable's shape without what is removed; `kept` maps labels to booleans."""
        for axis, labels in self.axes.items():
            value = np.compress(kept(labels), value, axis=axis)
        return value

    def count(self, kept):
        """How many numbers of the variable are left without what is removed."""
        shape = [int(n) for n in self.variable.shape]
        for axis, labels in self.axes.items():
            shape[axis] = int(np.sum(kept(labels)))
        return int(np.prod(shape))

    def silenced(self, kept):
        """The variable's value, an array, with zeros where it makes what is removed."""
        value = as_array(self.variable)
        for axis in self.made:
            value = np.where(along(axis, kept(self.axes[axis]), value.ndim), value, 0)
        return value


@dataclasses.dataclass(eq=False)
class Condition:
    """What must hold for channels to be removed here: `test(kept)` is a boolean for each of `labels`.

    `kept` is a function from labels to booleans: what stays. `reason()` says why not, or nothing.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.graph.calls import Condition
    >>> condition = Condition(np.array([1, 2]), lambda kept: ~kept(np.array([3, 4])), "head reads it")
    >>> condition.test(lambda labels: labels > 3)
    array([ True, False])
    """

    labels: np.ndarray
    test: Callable
    reason: str | Callable


class Call:
    """A call of a layer or operation.

    Args:
        operation: The layer or operation.
        args: Its arguments, with a `Tensor` for each tensor.
        kwargs: Likewise.
        inputs: Flat list of these tensors.
        structure: Its outputs, in which `None` may be.
        classes: The `Classes` of all labels.

    Attributes:
        outputs: Flat list of the output tensors.
        parts: The `Part` of each of its weights that has channels.
        conditions: List of `Condition`.
        inside: Whether it is one in a layer of layers, of which the model itself knows nothing.
        closed: Why nobody can look into the layer, where somebody tried.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.graph.labels import Labelled
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.ReLU()])
    >>> [type(call).__name__ for call in Labelled(model).calls]
    ['Linear', 'Elementwise']
    """

    def __init__(self, operation, args, kwargs, inputs, structure, classes):
        self.operation, self.args, self.kwargs = operation, args, kwargs
        self.inputs, self.structure, self.classes = inputs, structure, classes
        self.outputs = [x for x in keras.tree.flatten(structure) if x is not None]
        self.parts, self.conditions = [], []
        self.fixed = self.shared = self.inside = False
        self.closed = None

    def stay(self, reason):
        """Fix all channels that it takes and returns."""
        self.fixed, self.parts, self.conditions = True, [], []
        for output in self.outputs:
            if output.labels is None:
                output.labels = self.classes.new(1).reshape([1] * len(output.shape))
        for tensor in [*self.inputs, *self.outputs]:
            self.classes.fix(tensor.labels, reason)

    def roots(self):
        """The classes of all channels that it takes and returns, a vector."""
        every = [self.classes.find(x.labels).reshape(-1) for x in [*self.inputs, *self.outputs]]
        return np.unique(np.concatenate(every))

    def label(self):
        """Give the outputs their labels, and name parts and conditions."""
        raise NotImplementedError

    def update_constants(self):
        """Find the constants of the outputs anew, from those of the inputs and the present weights."""
        for output in self.outputs:
            output.constant = None
        self.find_constants()

    def find_constants(self):
        """Say which elements of the outputs are constant in inference, from those of the inputs."""
        if not self.fixed and any(tensor.constant is not None for tensor in self.inputs):
            self.fill_constants()

    def fill_constants(self):
        """The same, where an input has constants."""
        known = _Known(self, [tensor.constants for tensor in self.inputs])
        for output, value in zip(self.outputs, self._evaluated(), strict=True):
            where = known.constant(output)
            output.constant = uniform(value, output.labels, where)

    def _evaluated(self):
        values = [filled_with(tensor, np.nan_to_num(tensor.constants, nan=0.7)) for tensor in self.inputs]
        return run(self, values)

    def spec_is(self, shapes, kept_shapes):
        """Whether the operation itself says that tensors of `shapes` become such of `kept_shapes`."""
        symbols = {id(x): keras.KerasTensor(shape, x.dtype) for x, shape in zip(self.inputs, shapes, strict=True)}

        def symbol(argument):
            mask = isinstance(argument, Tensor) and id(argument) not in symbols
            return keras.KerasTensor(argument.shape, argument.dtype) if mask else symbols.get(id(argument), argument)

        args, kwargs = keras.tree.map_structure(symbol, [list(self.args), self.kwargs])
        found = keras.tree.flatten(spec_of(self.operation, args, kwargs))
        return [tuple(x.shape) for x in found] == [tuple(shape) for shape in kept_shapes]

    def shapes_left(self, tensors, kept):
        """The shapes of tensors when only what `kept` says stays."""
        found = []
        for tensor in tensors:
            alive, shape = kept(tensor.labels), list(tensor.shape)
            for axis, size in enumerate(alive.shape):
                if size > 1 and shape[axis] is not None:
                    shape[axis] = int(alive.any(axis=tuple(i for i in range(alive.ndim) if i != axis)).sum())
            found.append(tuple(shape))
        return found

    def own_weights(self):
        """The weights that it uses and no other call."""
        return getattr(self.operation, "weights", ())

    def changes(self, kept):
        """What is different in the layer's config when only what `kept` says stays; an empty dict if nothing is."""
        return {} if self.fixed else self.changed(kept)

    def changed(self, kept):
        """The same, of a call that has not been told to stay."""
        return {}

    def weights(self, kept):
        """The layer's weights without what is removed, a list of arrays."""
        parts = {id(part.variable): part for part in self.parts}
        found = []
        for variable in self.operation.weights:
            value = as_array(variable)
            part = parts.get(id(variable))
            found.append(value if part is None else part.keep(kept, value))
        return found


class _Known:
    """Which classes are constant in all inputs of a call."""

    def __init__(self, call, constants):
        self._classes = call.classes
        roots = [call.classes.find(tensor.labels) for tensor in call.inputs]
        open_roots = [root[np.isnan(value)] for root, value in zip(roots, constants, strict=True)]
        self._open = np.unique(np.concatenate([x.reshape(-1) for x in open_roots]))
        self._seen = np.unique(np.concatenate([x.reshape(-1) for x in roots]))

    def constant(self, tensor):
        """Which elements of an output are: a boolean array."""
        roots = self._classes.find(tensor.labels)
        return np.isin(roots, self._seen) & ~np.isin(roots, self._open)


class Elementwise(Call):
    """An operation whose output elements depend on the elements at the same place, or on the same channel."""

    product = False  # whether one zero makes a zero

    def label(self):
        (output,) = self.outputs
        rank = len(output.shape)
        first = self.inputs[0].labels
        if len(self.inputs) == 1:
            if first.ndim == rank:
                output.labels = first
            else:  # pooling to a vector
                output.labels = first.reshape(1, -1)
            return
        labels = np.zeros((1,) * rank, "int64")
        for tensor in self.inputs:
            own = tensor.labels.reshape((1,) * (rank - tensor.labels.ndim) + tensor.labels.shape)
            full = (1,) * (rank - len(tensor.shape)) + tensor.full
            spread = [axis for axis in range(1, rank) if full[axis] == 1 and output.full[axis] > 1]
            if spread and own.size == 1 and any(axis == _channel_axis(output, self.inputs) for axis in spread):
                self.classes.fix(own, f"{self.operation.name} spreads it over channels")
                continue
            self.classes.join(labels, own)
            labels = np.maximum(*np.broadcast_arrays(labels, own))
        output.labels = labels

    def fill_constants(self):
        if len(self.inputs) == 1 and self.inputs[0].labels.size != self.outputs[0].labels.size:
            return super().fill_constants()
        (output,) = self.outputs
        rank = len(output.shape)
        values = [x.constants.reshape((1,) * (rank - x.constants.ndim) + x.constants.shape) for x in self.inputs]
        if len(self.inputs) == 1:
            values = [self.inputs[0].constants.reshape(output.labels.shape)]
        values = np.broadcast_arrays(*values, np.empty(output.labels.shape))[:-1]
        where = ~np.any(np.isnan(values), axis=0)
        if not any(v.shape == output.labels.shape for v in values):
            return None
        evaluated = uniform(self._evaluated()[0], output.labels, where)
        if self.product:
            zero = np.any(np.asarray(values) == 0, axis=0)
            evaluated = np.where(zero, 0.0, np.full(output.labels.shape, np.nan) if evaluated is None else evaluated)
        output.constant = evaluated
        return None


def _channel_axis(output, inputs):
    """The axis along which labels vary in the widest input."""
    rank, widest = len(output.shape), max((x.labels for x in inputs), key=np.size)
    return rank - widest.ndim + int(np.argmax(widest.shape))


def uniform(value, labels, where):
    """The values of elements, in the shape of labels, where they are the same along the axes that do not matter."""
    axes = tuple(axis for axis, size in enumerate(labels.shape) if size == 1)
    if value.dtype.kind != "f" or not where.any():
        return None
    low, high = value.min(axis=axes, keepdims=True), value.max(axis=axes, keepdims=True)
    found = np.where(where & (low == high), low, np.nan)
    return None if np.isnan(found).all() else found


def spec_of(operation, args, kwargs):
    """The symbolic outputs of an operation.

    A subclass may take other arguments than what its base class tells the shapes of: then its `call` is asked.
    """
    try:
        return operation.compute_output_spec(*args, **kwargs)
    except Exception:
        return keras.Operation.compute_output_spec(operation, *args, **kwargs)


def filled_with(tensor, values):
    """An array of a tensor's shape for one sample from values in the shape of its labels."""
    kind = keras.backend.standardize_dtype(tensor.dtype)
    return np.broadcast_to(values, tensor.full).astype(kind if "float" not in kind else "float32")


def run(call, values):
    """The outputs of a call, a flat list of arrays, on arrays in place of its inputs. No step is masked."""
    position = {id(tensor): value for tensor, value in zip(call.inputs, values, strict=True)}

    def value_of(argument):
        if not isinstance(argument, Tensor):
            return argument
        value = position[id(argument)] if id(argument) in position else np.ones(argument.full, "bool")
        return keras.ops.convert_to_tensor(value)

    args, kwargs = keras.tree.map_structure(value_of, [list(call.args), call.kwargs])
    if isinstance(call.operation, keras.layers.Layer) and call.operation.built and takes_training(call.operation):
        kwargs = {**kwargs, "training": False}
    outputs = call.operation(*args, **kwargs)
    return [np.asarray(keras.ops.convert_to_numpy(x)) for x in keras.tree.flatten(outputs)]


def takes_training(layer):
    return "training" in inspect.signature(layer.call).parameters
