"""Watching a model means to be told of the calls of its layers while it runs, also of those that a loop repeats."""

import keras

from keras_sparse import graph

__all__ = ["Watch"]


class Watch:
    """Tells of layers' calls while a model runs; what a loop repeats is run step by step, and tells of each.

    Args:
        layers: `IdentityDict` of the layers to watch.
        record: Function `(layer, args)`, called before each use.
        count: Function `(layer)`, called at each use; all steps of a loop are one.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.identity import IdentityDict
    >>> from keras_sparse.pruning.watching import Watch
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="a"), keras.layers.ReLU()])
    >>> watched = IdentityDict([(model.layers[0], None)])
    >>> with Watch(watched, lambda layer, args: print(layer.name, args[0].shape), lambda layer: None).on(model):
    ...     outputs = model(np.ones((4, 2)))
    a (4, 2)
    """

    def __init__(self, layers, record, count):
        self._layers, self._record, self._count = layers, record, count
        self._muted, self._depth, self._rows = False, 0, None

    def on(self, root):
        """Watch the layers in `root` for as long as the block lasts."""
        everything = graph.layers(root) if isinstance(root, keras.layers.Layer) else []
        functions = [(layer, "rematerialized_call", lambda function, *args, **kwargs: function) for layer in everything]
        for layer in everything:
            inside = [one for one in graph.layers(layer) if one in self._layers]
            if inside and graph.kind_of(layer).holder is not None:
                functions.append((layer, "call", self._loop(layer, layer.call, inside)))
            elif layer in self._layers:
                functions.append((layer, "call", self._used(layer, layer.call)))
        return graph.substituted(functions)

    def _used(self, layer, call):
        def run(*args, **kwargs):
            if not self._muted:
                inputs = args or tuple(kwargs[name] for name in kwargs if name not in ("training", "mask"))
                if self._rows is not None:
                    inputs = keras.tree.map_structure(lambda x: graph.as_array(x)[self._rows], inputs)
                self._record(layer, inputs)
                if not self._depth:
                    self._count(layer)
            return call(*args, **kwargs)

        return run

    def _loop(self, layer, call, inside):
        def run(*args, **kwargs):
            before = self._muted
            if not before:
                self._depth += 1
                try:
                    last = self._steps(layer, *args, **kwargs)
                finally:
                    self._depth -= 1
                try:
                    for one in inside if not self._depth else ():
                        self._count(one)
                except BaseException:  # The call is not made, which would have kept the states.
                    for state, value in zip(*map(keras.tree.flatten, last), strict=True):
                        state.assign(value)
                    raise
            self._muted = True
            try:
                return call(*args, **kwargs)
            finally:
                self._muted = before

        return run

    def _steps(self, layer, sequences, *args, **kwargs):
        """Do what the loop does, one step at a time, in Python; return the states to keep, and their last values."""
        if not graph.kind_of(layer).recurrent:
            holder = graph.kind_of(layer).holder(layer)
            holder(keras.ops.reshape(sequences, (-1, *sequences.shape[2:])))
            return (), ()
        given = dict(zip(("initial_state", "mask"), args, strict=False)) | kwargs
        states, mask = given.get("initial_state"), given.get("mask")
        if states is None:
            states = layer.states if layer.stateful else layer.get_initial_state(sequences.shape[0])
        states = list(states) if isinstance(states, (list, tuple)) else [states]
        steps = range(sequences.shape[1])
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        for step in reversed(steps) if layer.go_backwards else steps:
            present = None if mask is None else mask[:, step]
            self._rows = None if present is None else graph.as_array(present)
            try:
                _, new = layer.cell(sequences[:, step], states)
            finally:
                self._rows = None
            new = list(new) if isinstance(new, (list, tuple)) else [new]
            states = new if present is None else keras.tree.map_structure(_where(present), new, states)
        return (layer.states, states) if layer.stateful else ((), ())


def _where(present):
    """The new states of the samples whose step is not masked, the old ones of the others."""
    return lambda new, old: keras.ops.where(keras.ops.expand_dims(present, -1), new, old)
