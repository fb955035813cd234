"""Labels say of every channel of every tensor of a model which class it is in: what can only be removed together.

Operations without weights are not known one by one. What only moves data is run on the numbers of its input's elements;
others are probed: some channels are perturbed, and where the output changes is the map. What has weights has a rule in
`keras_sparse.graph.mixing`.
"""

import keras
import numpy as np

from keras_sparse.graph.calls import Call, Elementwise, Tensor, spec_of, takes_training
from keras_sparse.graph.classes import Classes
from keras_sparse.graph.composites import Composite
from keras_sparse.graph.contractions import Contraction
from keras_sparse.graph.keeping import Masked
from keras_sparse.graph.kinds import JOINS, KEEPS, kind_of
from keras_sparse.graph.mixing import rule_of
from keras_sparse.graph.probing import Moves, is_elementwise
from keras_sparse.graph.rebuilding import packed, replay
from keras_sparse.graph.tracing import check_opened, is_composite, may_open, repacked, runnable, traced
from keras_sparse.graph.weights import layers as layers_of
from keras_sparse.identity import IdentityDict

__all__ = ["OUTPUT", "Labelled"]

# How the reason begins for which what a model returns stays.
OUTPUT = "an output of the model"


class Labelled:
    """A functional or Sequential model with a label for each channel of each tensor.

    Args:
        model: The built model.

    Attributes:
        classes: The `Classes` that the labels are in.
        calls: The calls of all layers and operations, in order; those of nested models are in the place of these.
        graphs: The calls of each model, `{model: [call]}`: of a model that is called several times, the first ones.
        composites: The calls of layers of layers; their own calls are in `calls`, too.
        closed: Why nobody can look into some layers of layers, `{layer: reason}`.
        rules: The rule of each layer with weights, `{layer: rule}`, of its first call; those inside of others, too.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.graph.labels import Labelled
    >>> x = keras.Input((4,))
    >>> a, b = keras.layers.Dense(3, name="a")(x), keras.layers.Dense(3, name="b")(x)
    >>> model = keras.Model(x, keras.layers.Dense(1)(keras.layers.add([a, b])))
    >>> labelled = Labelled(model)
    >>> roots = [labelled.classes.find(call.outputs[0].labels).tolist() for call in labelled.calls[:2]]
    >>> roots[0] == roots[1]
    True
    """

    def __init__(self, model):
        self.model = model
        self.classes = Classes()
        self.calls, self.graphs, self.rules = [], IdentityDict(), IdentityDict()
        self.composites, self.closed = [], IdentityDict()
        self._depth = 0  # how deep we are in layers of layers that a graph cannot stand for
        every = layers_of(model)
        self._may_open = not any(isinstance(x, keras.layers.Masking) or getattr(x, "mask_zero", False) for x in every)
        self.inputs = [self._outside(x, f"the input {x.name!r} of the model") for x in model.inputs]
        self.outputs = self._replay(model, self.inputs)
        for output, name in zip(self.outputs, _output_names(model), strict=True):
            self.classes.fix(output.labels, f"{OUTPUT} ({name})")
        self._make_rectangular()
        self._check_forms()
        known = {}
        for composite in self.composites:
            if composite.outermost and composite.graph is None:
                composite.settle(known)

    def _outside(self, tensor, reason):
        axes = [1] * len(tensor.shape)
        found = Tensor(tuple(tensor.shape), tensor.dtype)
        size = found.full[-1] if len(axes) > 1 else 1
        axes[-1] = size
        found.labels = self.classes.new(size).reshape(axes)
        self.classes.fix(found.labels, reason)
        return found

    def _replay(self, model, tensors):
        own = []

        def call(operation, args, kwargs):
            if isinstance(operation, keras.Model) and getattr(operation, "inputs", None):
                outputs = self._replay(operation, keras.tree.flatten(args))
                made = packed(operation, outputs)
                own.append(Nested(operation, args, kwargs, keras.tree.flatten(args), made, self.classes))
                return made
            operation, kwargs = runnable(operation), _taken(operation, kwargs)
            made = self._composite(operation, args, kwargs) if is_composite(operation) else None
            if made is None:
                made = self._call(operation, args, kwargs)
                self.calls.append(made)
            own.append(made)
            return made.structure

        outputs = list(replay(model, tensors, call))
        self.graphs.setdefault(model, own)
        return outputs

    def _composite(self, layer, args, kwargs):
        """The call of a layer of layers, whose own calls are in `calls`; `None` if it cannot be looked into."""
        structure = outputs_of(layer, args, kwargs, bool(self._depth))
        ways = (False, True) if not self._depth and self._may_open and may_open(layer, args, kwargs) else (True,)
        for full in ways:
            start, rules, known = len(self.calls), IdentityDict(self.rules.items()), len(self.composites)
            self._depth += full
            try:
                graph, tensors = traced(layer, args, kwargs, full)
                if not full:
                    check_opened(layer, graph, args, kwargs)
                outputs = self._replay(graph, tensors)
                _check_shapes(outputs, [x for x in keras.tree.flatten(structure) if x is not None])
                self.closed.pop(layer, None)
                break
            except Exception as error:  # a `call` that is not for symbolic inputs, or arguments that have no config
                self.closed[layer] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                self.calls, self.rules, self.composites = self.calls[:start], rules, self.composites[:known]
            finally:
                self._depth -= full
        else:
            return None
        inside, nested = self.calls[start:], self.composites[known:]
        for call in inside:
            call.inside |= full
        if full and not self._depth and None in keras.tree.flatten(structure):
            raise ValueError(f"{layer.name} returns `None` beside tensors, so that it is no layer of a graph")
        structure = repacked(structure, outputs)
        arguments = layer, args, kwargs, tensors, structure, self.classes
        made = Composite(*arguments, inside, nested, None if full else graph)
        first = self.rules.setdefault(layer, made)
        first.shared = made.shared = first is not made
        made.outermost = not self._depth
        self.composites.append(made)
        return made

    def _call(self, operation, args, kwargs):
        mask = _mask_of_steps(args, kwargs)
        inputs = [x for x in keras.tree.flatten([args, kwargs]) if isinstance(x, Tensor) and x is not mask]
        structure = outputs_of(operation, args, kwargs, bool(self._depth))
        arguments = operation, args, kwargs, inputs, structure, self.classes
        if getattr(operation, "weights", None):
            return self._with_weights(operation, arguments)
        kind = kind_of(operation)
        fixed = self.classes.reasons()
        present = np.unique(np.concatenate([self.classes.find(x.labels).reshape(-1) for x in inputs] or [[0]]))
        if all(root in fixed for root in present.tolist() if root):
            made = Elementwise(*arguments)
            made.stay(fixed.get(int(present[-1]), f"{operation.name} has no input of channels"))
            return made
        if isinstance(operation, keras.layers.Masking):
            made = Masked(*arguments)
            made.label()
            return made
        if kind.channels in (KEEPS, JOINS) and is_elementwise(operation, kind, inputs, structure):
            made = Elementwise(*arguments)
            made.product = kind.product
            made.label()
            return made
        made = Moves.of(*arguments)
        if made is None:
            made = Contraction(*arguments)
            made.label()
        return made

    def _with_weights(self, operation, arguments):
        made = rule_of(operation)(*arguments)
        made.closed = self.closed.get(operation)
        made.label()
        first = self.rules.setdefault(operation, made)
        if first is not made:
            first.shared = made.shared = True
            # What its weights are for the one call, they are for the other.
            if len(first.parts) != len(made.parts):
                made.stay(f"{operation.name} is called in different ways")
                first.stay(f"{operation.name} is called in different ways")
            for one, other in zip(first.parts, made.parts, strict=False):
                for axis in one.axes.keys() & other.axes.keys():
                    self.classes.join(one.axes[axis], other.axes[axis])
        return made

    def tensors(self):
        """All tensors, those of nested models included."""
        return [*self.inputs, *(tensor for call in self.calls for tensor in call.outputs)]

    def _make_rectangular(self):
        """Join labels until those of each tensor vary along one axis at most: the last that they varied along."""
        arrays = [tensor.labels for tensor in self.tensors() if tensor.labels.size > 1]
        again = True
        while again:
            again = False
            for labels in arrays:
                axes = self.classes.varying(labels)
                if len(axes) > 1:
                    self.classes.join_along(labels, axes[-1])
                    again = True

    def _check_forms(self):
        """Fix the channels of operations that nothing can stand for when some of their channels are gone."""
        for call in self.calls:
            if isinstance(call, (Moves, Contraction)) and not (call.fixed or call.inside):
                fixed = self.classes.reasons()
                free = [root for root in call.roots().tolist() if root and root not in fixed]
                for gone in (free[::2], free[1::2]):
                    if gone and not call.can_lose(np.isin(np.arange(len(self.classes)), gone)):
                        call.stay(f"{call.operation.name} computes something else with fewer channels")
                        break


def _taken(operation, kwargs):
    """The keyword arguments that a layer's `call` takes: `training` is passed to all layers, and kept from some."""
    if "training" in kwargs and isinstance(operation, keras.layers.Layer) and not takes_training(operation):
        return {key: value for key, value in kwargs.items() if key != "training"}
    return kwargs


def _mask_of_steps(args, kwargs):
    """The argument that says which steps count, as Keras passes it on from `mask_zero` and `Masking`, or `None`.

    It does the same to all channels: it has fewer axes than what it masks, and no channels itself.
    """
    mask, masked = kwargs.get("mask"), args[0] if args else None
    if not (isinstance(mask, Tensor) and isinstance(masked, Tensor)):
        return None
    return mask if len(mask.shape) < len(masked.shape) else None


class Nested(Call):
    """The call of a model in a model; its own calls are in `Labelled.graphs`."""


def _check_shapes(inner, outer):
    """Raise unless tensors are of the shapes that the layer around them tells, and give them what is open of these."""
    for one, other in zip(inner, outer, strict=True):
        known = len(one.shape) == len(other.shape)
        if not (known and all(n in (None, m) for n, m in zip(other.shape[1:], one.full[1:], strict=True))):
            raise ValueError(f"it returns the shape {one.shape}, not {other.shape}")
        if one.full == other.full:
            one.shape = other.shape


def outputs_of(operation, args, kwargs, full=False):
    """The outputs of a call, for one sample if `full`, as `Tensor` without labels, in their structure."""

    def symbolic(value):
        if not isinstance(value, Tensor):
            return value
        return keras.KerasTensor(value.full if full else value.shape, value.dtype)

    args, kwargs = keras.tree.map_structure(symbolic, [list(args), kwargs])
    spec = spec_of(operation, args, kwargs)
    return keras.tree.map_structure(lambda x: None if x is None else Tensor(tuple(x.shape), x.dtype), spec)


def _output_names(model):
    names = list(getattr(model, "output_names", ()))
    count = len(keras.tree.flatten(model.outputs))
    return names if len(names) == count else [f"output {i}" for i in range(count)]
