"""A composite is a layer of layers with a `call` of its own, such as the block of a transformer.

Its `call` is run on symbolic inputs, which says where channels go inside of it. What stands for it with fewer channels
is of the same class, with other numbers in its config, where such numbers are found; else a functional model of the
layers inside, if `call` works on inputs of open sizes.
"""

import itertools
import json

import keras
import numpy as np

from keras_sparse.graph.calls import Call, Tensor, spec_of
from keras_sparse.graph.kinds import UNKNOWN, kind_of, of_keras
from keras_sparse.graph.rebuilding import config_of, remade, replay
from keras_sparse.graph.substitution import substituted
from keras_sparse.graph.weights import along, as_array
from keras_sparse.graph.weights import layers as layers_of
from keras_sparse.identity import IdentityDict

__all__ = ["Composite", "check_opened", "is_composite", "may_open", "repacked", "runnable", "traced"]

_MOST, _TOGETHER = 16, 2  # combinations of numbers in a config that are tried, and how many numbers are in one
_SAMPLES, _LENGTH = 3, 5  # with which a graph that is to stand for a layer is tried
_NO_NUMBER = (
    "has no number in its config for how many of these channels there are, and its `call` does not work on symbolic "
    "inputs of open sizes"
)


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
    >>> from keras_sparse.graph.composites import is_composite
    >>> is_composite(block), is_composite(block.inner)
    (True, False)
    """
    if not isinstance(operation, keras.layers.Layer) or of_keras(operation) or type(operation).__name__ == "L0":
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
    >>> from keras_sparse.graph.composites import traced
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
    >>> from keras_sparse.graph.composites import runnable
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
    >>> from keras_sparse.graph.composites import check_opened, traced
    >>> layer, args = keras.layers.ReLU(), [Tensor((None, 4), "float32")]
    >>> check_opened(layer, traced(layer, args, {}, full=False)[0], args, {})
    """
    rng, values = np.random.default_rng(0), {}

    def value(tensor):
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in values:
            shape = (_SAMPLES, *(_LENGTH if n is None else n for n in tensor.shape[1:]))
            values[id(tensor)] = keras.ops.convert_to_tensor(_drawn(shape, tensor.dtype, rng))
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


def _drawn(shape, dtype, rng):
    kind = keras.backend.standardize_dtype(dtype)
    return rng.normal(size=shape).astype(kind) if kind.startswith("float") else np.ones(shape, kind)


def may_open(layer, args, kwargs):
    """Whether a functional model may stand for the layer: it is called as Keras does it, and casts no inputs.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.calls import Tensor
    >>> from keras_sparse.graph.composites import may_open
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

    >>> from keras_sparse.graph.composites import repacked
    >>> repacked((1, None, 2), ["a", "b"])
    ('a', None, 'b')
    """
    left = iter(outputs)
    return keras.tree.map_structure(lambda x: None if x is None else next(left), structure)


class Composite(Call):
    """The call of a layer of layers.

    Attributes:
        inner: The calls of the layers and operations inside, deeper ones too.
        nested: The calls of layers of layers inside.
        graph: The functional model of them that can stand for it, or `None`.
        outermost: Whether it is in no other one for which no model can stand.

    Example:

    >>> import keras, keras_sparse as ks
    >>> class Block(keras.layers.Layer):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.wide, self.narrow = keras.layers.Dense(8), keras.layers.Dense(4)
    ...
    ...     def build(self, shape):
    ...         self.wide.build(shape)
    ...         self.narrow.build((None, 8))
    ...
    ...     def call(self, x):
    ...         return x + self.narrow(keras.ops.relu(self.wide(x)))
    >>> model = keras.Sequential([keras.Input((4,)), Block()])
    >>> report = ks.prune(model, 0.5, pattern="channel")
    >>> ks.shrink(model, verbose=0).count_params(), model.count_params()
    (40, 76)
    """

    def __init__(self, operation, args, kwargs, inputs, structure, classes, inner, nested, graph):
        super().__init__(operation, args, kwargs, inputs, structure, classes)
        self.inner, self.nested, self.graph, self.outermost = inner, nested, graph, True

    def reconfigured(self, kept):
        """What is different in the config of a layer that does the same with fewer channels; `None` if none does."""
        found = self._found(kept)
        return None if found is None or not self._is_same(found[1], kept) else found[0]

    def own_weights(self):
        inside = IdentityDict.fromkeys(v for call in [*self.inner, *self.nested] for v in call.own_weights())
        return [v for v in self.operation.weights if v not in inside]

    def settle(self, known):
        """Fix the channels inside that no config of the layer is without.

        Args:
            known: Dict in which what is found out is kept for layers of the same config.
        """
        fixed, places = self.classes.reasons(), {}
        for variable, part in self._parts().items():
            for axis, labels in part.axes.items():
                for root in np.unique(self.classes.find(labels)).tolist():
                    if root and root not in fixed:
                        places.setdefault(root, set()).add((variable.path, axis))
        groups = {}
        for root, where in places.items():
            groups.setdefault(frozenset(where), []).append(root)
        for roots in groups.values():
            if len(roots) > 1:
                reason = self._why_not(roots[0], known)
                if reason:
                    self.classes.fix(np.array(roots), f"{self._name} {reason}")

    @property
    def _name(self):
        return f"{self.operation.name} ({type(self.operation).__name__})"

    def _parts(self):
        """The parts of all weights inside, `{variable: part}`."""
        own = IdentityDict.fromkeys(self.operation.weights)
        return IdentityDict((p.variable, p) for call in self.inner for p in call.parts if p.variable in own)

    def _rules(self):
        """The first call of each layer inside that has weights."""
        found = IdentityDict()
        for call in self.inner:
            if getattr(call.operation, "weights", None):
                found.setdefault(call.operation, call)
        return found

    def _why_not(self, root, known):
        """Why a class cannot be removed, or `None`."""

        def kept(labels):
            return self.classes.find(labels) != root

        wanted = self._shapes(kept)
        config = {key: value for key, value in config_of(self.operation).items() if key != "name"}
        key = type(self.operation), json.dumps(config, sort_keys=True, default=repr), tuple(wanted)
        if key not in known:
            found = self._found(kept)
            if found is None:
                known[key] = _NO_NUMBER
            else:
                known[key] = None if self._is_same(found[1], kept) else "computes something else with fewer channels"
        return known[key]

    def _shapes(self, kept):
        parts = self._parts()
        return [
            tuple(
                int(kept(parts[v].axes[axis]).sum()) if v in parts and axis in parts[v].axes else int(n)
                for axis, n in enumerate(v.shape)
            )
            for v in self.operation.weights
        ]

    def changes(self, kept):
        """What is different in the config of a layer that has the weights that are left; `None` if none has."""
        found = self._found(kept)
        return None if found is None else found[0]

    def _found(self, kept):
        """These changes, and a layer of such a config."""
        wanted, present = self._shapes(kept), [tuple(int(n) for n in v.shape) for v in self.operation.weights]
        if wanted == present:
            return {}, self.operation
        inner = [value for rule in self._rules().values() for value in rule.changes(kept).values()]
        if any(isinstance(value, float) for value in inner):
            return None  # the epsilon of a normalization, which is inside
        sizes = [pair for old, new in zip(present, wanted, strict=True) for pair in zip(old, new, strict=True)]
        config, numbers = config_of(self.operation), {}
        for key, value in config.items():
            if type(value) is int and value > 0:
                # The size itself, or a multiple of it, or a part.
                found = {value * new // old for old, new in sizes if old != new and value * new % old == 0}
                if found:
                    numbers[key] = sorted(found - {value})
        choices = (
            dict(zip(keys, values, strict=True))
            for count in range(1, _TOGETHER + 1)
            for keys in itertools.combinations(numbers, count)
            for values in itertools.product(*(numbers[key] for key in keys))
        )
        for changes in itertools.islice(choices, _MOST):
            made = self._made(changes, kept)
            if made is not None and [tuple(v.shape) for v in made.weights] == wanted:
                return changes, made
        return None

    def _made(self, changes, kept):
        """A layer of such a config, built; `None` if there is none."""
        shapes = {id(x): self._left(x, kept) for x in self.inputs}

        def symbol(value):
            return keras.KerasTensor(shapes[id(value)], value.dtype) if isinstance(value, Tensor) else value

        args, kwargs = keras.tree.map_structure(symbol, [list(self.args), self.kwargs])
        try:
            new = remade(self.operation, changes)
            spec = spec_of(new, args, kwargs) if new.built else new(*args, **kwargs)
            outputs = [x for x in keras.tree.flatten(spec) if x is not None]
        except Exception:  # numbers that do not go together
            return None
        left = [self._left(x, kept) for x in self.outputs]
        return new if [tuple(x.shape) for x in outputs] == left else None

    def _left(self, tensor, kept):
        """The shape for one sample of what is left of a tensor."""
        return self.shapes_left([Tensor(tensor.full, tensor.dtype, tensor.labels)], kept)[0]

    def weights(self, kept):
        """The layer's weights without what is removed, a list of arrays."""
        found = IdentityDict()
        for layer, rule in self._rules().items():
            found.update(IdentityDict(zip(layer.weights, rule.weights(kept), strict=True)))
        return [found[v] if v in found else as_array(v) for v in self.operation.weights]

    def _is_same(self, made, kept):
        """Whether a smaller layer computes the same, if all is zero that is about to leave."""
        if made is self.operation:
            return True
        silent = IdentityDict()
        for variable, part in self._parts().items():
            value = as_array(variable)
            for axis, labels in part.axes.items():
                value = np.where(along(axis, kept(labels), value.ndim), value, 0)
            silent[variable] = keras.ops.convert_to_tensor(value, variable.dtype)
        rng = np.random.default_rng(0)
        full = {id(x): _drawn(x.full, x.dtype, rng) for x in self.inputs}
        less = {
            id(x): full[id(x)][np.ix_(*(_alive(x, kept, axis) for axis in range(len(x.full))))] for x in self.inputs
        }
        try:
            with keras.StatelessScope(list(silent.items())):
                before = self._run(self.operation, full)
                made_weights = self.weights(kept)
            made.set_weights(made_weights)
            after = self._run(made, less)
        except Exception:  # whatever it wants that random numbers are not
            return False
        for tensor, one, other in zip(self.outputs, before, after, strict=True):
            picked = one[np.ix_(*(_alive(tensor, kept, axis) for axis in range(one.ndim)))]
            if picked.shape != other.shape or not np.allclose(picked, other, 1e-4, 1e-5):
                return False
        return True

    def _run(self, layer, values):
        def value_of(argument):
            return keras.ops.convert_to_tensor(values[id(argument)]) if isinstance(argument, Tensor) else argument

        args, kwargs = keras.tree.map_structure(value_of, [list(self.args), self.kwargs])
        outputs = keras.tree.flatten(layer(*args, **kwargs))
        return [np.asarray(keras.ops.convert_to_numpy(x)) for x in outputs if x is not None]


def _alive(tensor, kept, axis):
    """The indices along an axis of a tensor for one sample that are left."""
    alive = kept(tensor.labels)
    own = alive.any(axis=tuple(i for i in range(alive.ndim) if i != axis))
    return np.flatnonzero(np.broadcast_to(own, tensor.full[axis]) if own.size == 1 else own)
