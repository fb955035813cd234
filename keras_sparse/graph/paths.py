"""A path leads from an input of a model to an output of it, through weights that are not zero."""

import functools

import numpy as np

from keras_sparse.graph.kinds import DEPTHWISE
from keras_sparse.graph.labels import Labelled
from keras_sparse.graph.weights import along, as_array
from keras_sparse.graph.weights import weights as weights_of
from keras_sparse.identity import IdentityDict

__all__ = ["Paths"]


class Paths:
    """Which weights of a model lie on a path from its inputs to its outputs, and which on dead ones.

    A weight into a unit that nothing reads, or out of a unit that reads nothing, leads nowhere. Units are the channels
    that the rows of the table of kinds make, so that convolutions, attention, recurrent layers, residual sums, moved
    axes and your own layers with a row (`ks.graph.register_kind`) are followed, too. What is dead is so for sure, but
    not all of it is found: the partners of a sum count as one channel, which is alive if one of them is; so are units
    that feed each other in a recurrent layer, channels that no kernel reads because an operation drops them, and all
    channels of layers that are not known. Biases are no path: a unit that reads nothing is a constant.

    Args:
        model: A built functional or Sequential model.

    Raises:
        ValueError: If the graph of the model cannot be seen.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    >>> first, last = model.layers[0].kernel, model.layers[1].kernel
    >>> _ = last.assign(np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))  # nobody reads the third unit
    >>> alive = ks.graph.Paths(model).alive()
    >>> alive[first][0].tolist(), int(alive[last].sum())
    ([True, True, False], 4)
    """

    def __init__(self, model):
        if not getattr(model, "inputs", None):
            raise ValueError(
                "Dead paths are seen in the graph of a model: build it with `keras.Model(inputs, outputs)`. "
                f"Received: {type(model).__name__} {model.name!r}"
            )
        labelled = Labelled(model)
        roots = labelled.classes.find(np.arange(len(labelled.classes)))
        # Depthwise kernels pass on what they get: they neither make a channel nor read one for others.
        edges = IdentityDict((w.variable, w.role != DEPTHWISE) for w in weights_of(model) if w.kernel)
        self._edges = []  # triples: variable, {axis: classes} of what it reads, the same of what it makes
        fed, used = np.zeros(len(roots), bool), np.zeros(len(roots), bool)
        self._ends = IdentityDict()
        for rule in labelled.rules.values():
            for part in rule.parts:
                if part.variable not in edges:
                    continue
                axes = {axis: roots[labels] for axis, labels in part.axes.items()}
                read = {axis: own for axis, own in axes.items() if axis not in part.made}
                made = {axis: own for axis, own in axes.items() if axis in part.made}
                self._ends.setdefault(part.variable, []).append(axes)
                if edges[part.variable]:
                    self._edges.append((part.variable, read, made))
                    _mark(fed, made)
                    _mark(used, read)
        fixed = np.isin(np.arange(len(roots)), list(labelled.classes.reasons()))
        # What no kernel makes, or reads, is there all the same, or needed.
        self._always_fed, self._always_used = fixed | ~fed, fixed | ~used

    def alive(self, masks=()):
        """Return which weights are not zero and lie on a path.

        Args:
            masks: Mapping from variables to what stays of them, arrays of booleans of their shapes; of others, what is
                not zero now.

        Returns:
            `IdentityDict` from each kernel that has channels to an array of booleans of its shape.
        """
        masks = self._complete(masks)
        units = self._units(masks)
        return IdentityDict((variable, mask & self._between(variable, units)) for variable, mask in masks.items())

    def places(self, masks=()):
        """Return where weights would lie on a path, whether they are zero or not: between units that are on one.

        Args:
            masks: As in `alive`.
        """
        units = self._units(self._complete(masks))
        return IdentityDict((variable, self._between(variable, units)) for variable in self._ends)

    def _complete(self, masks):
        given = IdentityDict(masks)
        return IdentityDict((v, given[v] if v in given else as_array(v) != 0) for v in self._ends)

    def _units(self, masks):
        """For each class whether it is made of something and read by something, in the end by inputs and outputs."""
        fed, used = np.ones(len(self._always_fed), bool), np.ones(len(self._always_fed), bool)
        while True:
            more_fed, more_used = self._always_fed.copy(), self._always_used.copy()
            for variable, read, made in self._edges:
                live = masks[variable] & _across(read, fed, masks[variable].ndim)
                _mark(more_fed, _touched(made, live))
                live = masks[variable] & _across(made, used, masks[variable].ndim)
                _mark(more_used, _touched(read, live))
            more_fed, more_used = more_fed & fed, more_used & used
            if np.array_equal(more_fed, fed) and np.array_equal(more_used, used):
                return fed & used
            fed, used = more_fed, more_used

    def _between(self, variable, units):
        shape = tuple(variable.shape)
        ends = [np.broadcast_to(_across(axes, units, len(shape)), shape) for axes in self._ends[variable]]
        return functools.reduce(np.logical_or, ends)


def _mark(found, axes):
    """Set `found` for all classes of `{axis: classes}`."""
    for classes in axes.values():
        found[classes] = True


def _across(axes, units, rank):
    """Whether the units along all of these axes are marked, an array that broadcasts to the weight."""
    marks = [along(axis, units[classes], rank) for axis, classes in axes.items()]
    return functools.reduce(np.logical_and, marks, np.ones([1] * rank, bool))


def _touched(axes, live):
    """`{axis: classes}` of those that a live weight touches."""
    others = {axis: tuple(i for i in range(live.ndim) if i != axis) for axis in axes}
    return {axis: classes[live.any(axis=others[axis])] for axis, classes in axes.items()}
