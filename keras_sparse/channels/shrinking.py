"""Shrinking removes dead channels from a model: what is left is smaller, and computes the same."""

import keras
import numpy as np

from keras_sparse import graph, optimizers
from keras_sparse.channels.listing import listing
from keras_sparse.channels.tracing import functional
from keras_sparse.graph.kinds import of_keras
from keras_sparse.graph.rebuilding import is_loadable
from keras_sparse.graph.tracing import repacked
from keras_sparse.identity import IdentityDict
from keras_sparse.registry import check_whole

__all__ = ["shrink"]


def shrink(model, round_to=1, verbose=1, return_report=False):
    """Return a smaller model without the channels that nothing needs: fewer filters, units, heads; the same outputs.

    A channel can be removed when everything that reads it meets zeros: it is zero (the weights that make it are, and
    what follows keeps it so), or the weights that read it are. A channel that is another constant, such as the bias of
    a unit without weights, goes into the bias of the next layer where that is exact: not behind a padding, which a
    constant stands out from. Channels that are removed may leave others without a reader: these go, too.

    `pattern="channel"`, L0's gates of units and group lasso make such channels. `ks.channel_groups(model)` tells
    beforehand what will go, and what must stay for what reason.

    Args:
        model: A built functional or Sequential model, nested ones included, or a subclassed one whose `call` works on
            symbolic inputs, which becomes a functional one. It is left as it is.
        round_to: Each group keeps a multiple of so many channels, where it has that many: some of the dead ones stay as
            zeros. For targets that compute faster in multiples of 8.
        verbose: `1` prints what was removed, `0` does not.
        return_report: Whether to return `(model, report)`.

    Returns:
        A new plain Keras model of the same layer names. In inference its outputs are those of `model` but for rounding.
        It is compiled like `model`, and the state of its optimizer is that of `model`'s for the weights that are left,
        so that training goes on. The report is that of `ks.channel_groups(model)`.

    Raises:
        ValueError: If the model is not built or cannot be seen as a graph, or `round_to` is not a whole number, or
            larger than all layers are wide; if several layers hold the same weight.
        TypeError: If it is not a Keras 3 model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
    >>> report = ks.prune(model, 0.5, pattern="channel", filters=model.layers[0])
    >>> small = ks.shrink(model, verbose=0)
    >>> [tuple(v.shape) for v in small.weights]
    [(4, 4), (4,), (4, 2), (2,)]
    """
    check_whole("round_to", round_to)
    source = functional(model)
    channels = graph.Channels(source, round_to)
    widest = max((len(group.channels) for group in channels.groups), default=0)
    if round_to > max(widest, 1):
        raise ValueError(
            f"`round_to` is larger than all layers of {model.name!r} are wide: the widest group has {widest} channels. "
            f"Received: round_to={round_to}"
        )
    if channels.tied:
        raise ValueError(
            "Layers are made anew from their configs, which do not tell that they share weights: the new ones would "
            f"not. Use one layer twice, as `keras.layers.ReversibleEmbedding`. Received: {channels.tied[0]}"
        )
    rebuilding = _Shrunk(channels)
    small = rebuilding.model
    report = listing(channels, f"Shrunk {model.name}: dead channels")
    closed = [new for new, _, _ in rebuilding.copies if not (of_keras(new) or is_loadable(new))]
    if closed:
        report.notes.append(
            f"{closed[0].name} ({type(closed[0]).__name__}) has a config of which Keras makes no layer: a `.keras` "
            "file of the model cannot be read. Save its weights, and shrink again."
        )
    report.notes += _copy_compilation(model, small, rebuilding.variables, channels.kept)
    if verbose:
        print(report)
    return (small, report) if return_report else small


class _Shrunk:
    """The model in the making.

    Attributes:
        model: The new model.
        copies: List of `(new layer, what it was made from, its weights)`.
        variables: Pairs of an old variable and its `(new variable, part or None)`.
    """

    def __init__(self, channels):
        self._channels = channels
        self._nested, self._opened = IdentityDict(), IdentityDict()
        source = channels.labelled.model
        rules = channels.labelled.rules
        self._first = graph.Rebuilding(source)
        self.model = self._rebuilt(source, self._first)
        parts = IdentityDict((part.variable, part) for rule in rules.values() for part in rule.parts)
        self.variables = IdentityDict()
        self.copies = list(self._first.copies.values())
        for layer, (new, _, _) in self._first.copies.items():
            for old, variable in zip(layer.weights, new.weights, strict=True):
                self.variables[old] = variable, parts.get(old)

    def _rebuilt(self, model, rebuilding):
        steps = [(made, self._form(made)) for made in self._channels.labelled.graphs[model]]
        if isinstance(model, keras.Sequential) and all(self._is_layer(made, form) for made, form in steps):
            for made, form in steps:
                self._copy(rebuilding, made, form)
            return rebuilding.sequential()
        steps = iter(steps)

        def call(operation, args, kwargs):
            made, form = next(steps)
            if self._is_opened(made):
                if operation not in self._nested:
                    shapes = made.shapes_left(made.inputs, self._channels.kept)
                    inner = self._channels.labelled.rules[operation].graph
                    self._nested[operation] = self._rebuilt(inner, graph.Rebuilding(inner, shapes, rebuilding))
                outputs = self._nested[operation](_of_tensors(made, args, kwargs))
                return repacked(made.structure, keras.tree.flatten(outputs))
            if self._is_nested(made):
                if operation not in self._nested:
                    shapes = made.shapes_left(made.inputs, self._channels.kept)
                    self._nested[operation] = self._rebuilt(operation, graph.Rebuilding(operation, shapes, rebuilding))
                return self._nested[operation](*args, **kwargs)
            if form == "same" or self._is_layer(made, form):
                return self._copy(rebuilding, made, form)(*args, **kwargs)
            (x,) = [x for x in keras.tree.flatten([args, kwargs]) if isinstance(x, keras.KerasTensor)]
            outputs = [_moved(x, one, y) for one, y in zip(form, made.outputs, strict=True)]
            return keras.tree.pack_sequence_as(made.structure, outputs)

        return rebuilding.model(graph.replay(model, rebuilding.inputs, call))

    def _is_nested(self, made):
        return made.operation in self._channels.labelled.graphs

    def _is_opened(self, made):
        """Whether a functional model of the layers inside stands for a layer of layers."""
        first = self._channels.labelled.rules.get(made.operation, made)
        if getattr(first, "graph", None) is None:
            return False
        if first.operation not in self._opened:
            alone = None in keras.tree.flatten(first.structure) or not is_loadable(first.operation)
            self._opened[first.operation] = alone or first.changes(self._channels.kept) is None
        return self._opened[first.operation]

    def _is_layer(self, made, form):
        """Whether a layer of the same class stands for the layer."""
        return not (self._is_nested(made) or self._is_opened(made)) and (
            form == "same" or isinstance(made.operation, keras.layers.Reshape)
        )

    def _form(self, made):
        return made.form(self._channels.kept) if hasattr(made, "form") and not made.fixed else "same"

    def _copy(self, rebuilding, made, form):
        """The copy of a layer, with the weights that are left; an operation is its own."""
        layer = made.operation
        first = self._channels.labelled.rules.get(layer, made)
        changes = first.changes(self._channels.kept)
        if changes is None:
            raise ValueError(
                "Dead channels of several widths inside of a layer can leave, each alone, but no config is without all "
                f"of them. Register its kind, or build it of functional models. Received: {layer.name!r} "
                f"({type(layer).__name__})"
            )
        if form != "same":
            changes = {"target_shape": _target(form[0][1], made.outputs[0])}
        weights = first.weights(self._channels.kept) if getattr(layer, "weights", None) else None
        return rebuilding.copy(layer, changes or None, weights)


def _of_tensors(made, args, kwargs):
    """The symbolic tensors among the arguments of a call, in the order of the call's own inputs."""
    values = keras.tree.flatten([list(args), kwargs])
    places = {id(x): i for i, x in reversed(list(enumerate(keras.tree.flatten([list(made.args), made.kwargs]))))}
    return [values[places[id(x)]] for x in made.inputs]


def _target(shape, tensor):
    return tuple(-1 if old is None else n for n, old in zip(shape[1:], tensor.shape[1:], strict=True))


def _moved(x, form, tensor):
    """The operations that stand for one that moves elements."""
    if form[0] == "reshape":
        if form[1][0] == 1 and tensor.shape[0] is None:
            return keras.layers.Reshape(_target(form[1], tensor))(x)
        return keras.ops.reshape(x, (-1, *form[1][1:]))
    _, axis, indices = form
    if indices == list(range(indices[0], indices[0] + len(indices))):
        slices = [slice(None)] * axis + [slice(indices[0], indices[0] + len(indices))]
        return x[tuple(slices)]
    return keras.ops.take(x, np.array(indices), axis=axis)


def _copy_compilation(source, target, variables, kept):
    """Compile `target` like `source`, with the optimizer's state; return sentences about what could not be done."""
    if not source.compiled:
        return []
    try:
        target.compile_from_config(source.get_compile_config())
    except Exception as error:  # an optimizer, loss or metric without a config
        return [f"It is not compiled: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    if source.optimizer is None or target.optimizer is None or not source.optimizer.built:
        return []
    target.optimizer.build(target.trainable_variables)
    old_own, new_own = source.trainable_variables, target.trainable_variables
    positions = {id(variable): i for i, variable in enumerate(new_own)}
    new_slots = {(index, kind): slot for index, kind, slot in optimizers.slots(target.optimizer, new_own)}
    done = set()
    for index, kind, slot in optimizers.slots(source.optimizer, old_own):
        new, part = variables[old_own[index]]
        other = new_slots.get((positions.get(id(new)), kind))
        if other is not None:
            value = graph.as_array(slot)
            other.assign(value if part is None else part.keep(kept, value))
            done |= {id(slot), id(other)}
    rest = {v.path: v for v in target.optimizer.variables if id(v) not in done}
    missed = []
    for old in source.optimizer.variables:
        if id(old) not in done:
            new = rest.get(old.path)
            if new is not None and new.shape == old.shape:
                new.assign(graph.as_array(old))  # by value: on JAX, a training step of one would take the array of both
            else:
                missed.append(old.path)
    return [f"The optimizer begins anew in {len(missed)} of its variables, such as {missed[0]}."] if missed else []
