"""A composite is the call of a layer of layers, such as the block of a transformer.

It is made of the calls inside (`keras_sparse.graph.tracing`). What stands for it with fewer channels is of the same
class, with other numbers in its config (`keras_sparse.graph.resizing`), where such numbers are found; else a functional
model of the layers inside, if `call` works on inputs of open sizes.
"""

import json

import keras
import numpy as np

from keras_sparse.graph.calls import Call, Tensor
from keras_sparse.graph.rebuilding import config_of
from keras_sparse.graph.resizing import resized
from keras_sparse.graph.tracing import drawn
from keras_sparse.graph.weights import along, as_array
from keras_sparse.identity import IdentityDict

__all__ = ["Composite"]

_NO_NUMBER = (
    "has no number in its config for how many of these channels there are, and its `call` does not work on symbolic "
    "inputs of open sizes"
)
_NOT_THE_SAME = "computes something else with fewer channels"


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
        self._smaller = {}

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
            known[key] = self._resized(kept)[1]
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
        """What is different in the config of a layer that does the same with fewer channels; `None` if none does."""
        return self._resized(kept)[0]

    def _resized(self, kept):
        """These changes, and why there are none; looked for once for the same channels."""
        key = np.packbits(kept(np.arange(len(self.classes)))).tobytes()
        if key not in self._smaller:
            self._smaller[key] = self._search(kept)
        return self._smaller[key]

    def _search(self, kept):
        wanted = self._shapes(kept)
        if wanted == [tuple(int(n) for n in v.shape) for v in self.operation.weights]:
            return {}, None
        inner = [value for rule in self._rules().values() for value in rule.changes(kept).values()]
        if any(isinstance(value, float) for value in inner):
            return None, _NO_NUMBER  # the epsilon of a normalization, which is inside

        def symbol(value):
            return keras.KerasTensor(self._left(value, kept), value.dtype) if isinstance(value, Tensor) else value

        args, kwargs = keras.tree.map_structure(symbol, [list(self.args), self.kwargs])
        outputs = [self._left(x, kept) for x in self.outputs]
        found = resized(self.operation, wanted, args, kwargs, outputs)
        if found is None:
            return None, _NO_NUMBER
        return (found[0], None) if self._is_same(found[1], kept) else (None, _NOT_THE_SAME)

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
        silent = IdentityDict()
        for variable, part in self._parts().items():
            value = as_array(variable)
            for axis, labels in part.axes.items():
                value = np.where(along(axis, kept(labels), value.ndim), value, 0)
            silent[variable] = keras.ops.convert_to_tensor(value, variable.dtype)
        rng = np.random.default_rng(0)
        full = {id(x): drawn(x.full, x.dtype, rng) for x in self.inputs}
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
