"""A place is an axis of a weight along which channels lie that have gates, and which of them stands where."""

import dataclasses

import keras
import numpy as np

from keras_sparse import graph
from keras_sparse.identity import IdentityDict

__all__ = ["Place", "find_places"]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """An axis of a weight.

    Attributes:
        weight: The index of the weight in `model.weights`.
        axis: The axis.
        numbers: The gate of each index along the axis, counted from 1; 0 for what has none. A vector.
        multiplies: Whether gates are factors here. Else weights are zeros where a gate is closed, and only there: they
            make what nobody reads then, or read what is zero.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.layers.places import Place
    >>> Place(0, 1, np.array([1, 2, 0]), True).axis
    1
    """

    weight: int
    axis: int
    numbers: np.ndarray
    multiplies: bool


def find_places(model, chosen):
    """Find where gates of channels belong, one gate for each channel that can leave.

    A gate multiplies the weights that read its channel: a network with a closed gate is exactly the one without the
    channel, whatever normalizations, activations and paddings made of it before. What no kernel alone reads, such as
    heads, the width of queries and keys, or what goes into a normalization that sums squares, has its gate where it is
    made. A gate goes nowhere if a channel with weights of zeros there could not be removed: this is tried, on random
    weights.

    Args:
        model: A built functional or Sequential model.
        chosen: List of `ks.graph.Weight`, kernels. A channel that another kernel makes, too, stays without a gate;
            depthwise kernels leave with the channels that they keep apart.

    Returns:
        `(places, reasons)`: a list of `Place`, and why channels that a weight makes have none, `{variable: reason}`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.layers.places import find_places
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    >>> places, reasons = find_places(model, ks.selection.select(model).chosen)
    >>> [(place.weight, place.axis, place.numbers.tolist()) for place in places if place.multiplies]
    [(2, 0, [1, 2, 3])]
    """
    return _Search(model, chosen).found()


class _Search:
    def __init__(self, model, chosen):
        self._model = model
        self._channels = channels = graph.Channels(model)
        self._roots = channels.roots
        self._kernels = IdentityDict((w.variable, w) for w in graph.weights(model) if w.kernel)
        self._parts = list(channels.parts())
        self._reasons = dict(channels.labelled.classes.reasons())
        selected = IdentityDict.fromkeys(w.variable for w in chosen)
        for _, part in self._parts:
            weight = self._kernels.get(part.variable)
            if weight is not None and weight.role != graph.DEPTHWISE and part.variable not in selected:
                why = f"{part.variable.path} makes them, too, and is left dense"
                for axis in part.made:
                    self._reasons = dict.fromkeys(self._roots[part.axes[axis]].tolist(), why) | self._reasons
        free = [[c for c in group.channels.tolist() if c and c not in self._reasons] for group in channels.groups]
        self._free = [classes for classes in free if len(classes) > 1]

    def found(self):
        read = self._gateable(self._reads)
        made = self._gateable(self._makes, read) & ~read & ~self._with_statistics()
        # A sigmoid makes a constant of a channel of zeros, which those who read it would miss.
        seen = self._channels.not_silenced(set(np.flatnonzero(~made[self._roots]).tolist()))
        self._reasons = seen | self._reasons
        made[list(seen)] = False
        classes = [c for own in self._free for c in own if read[c] or made[c]]
        numbers = np.zeros(len(self._roots), int)
        numbers[classes] = 1 + np.arange(len(classes))
        numbers = numbers[self._roots]
        read = read[self._roots]
        index = IdentityDict((v, i) for i, v in enumerate(self._model.weights))
        places = []
        for _, part in self._parts:
            for axis, labels in sorted(part.axes.items()):
                multiplied = np.where(read[labels], self._reads(part, axis), self._makes(part, axis))
                leaves = part.variable in self._kernels or axis in part.made
                for factor in (True, False):
                    own = np.where(multiplied if factor else ~multiplied & leaves, numbers[labels], 0)
                    if own.any():
                        places.append(Place(index[part.variable], axis, own, factor))
        return places, self._why(numbers)

    def _reads(self, part, axis):
        """Whether gates of channels that kernels read are factors there."""
        weight = self._kernels.get(part.variable)
        return weight is not None and weight.role not in (graph.DEPTHWISE, graph.EMBEDDING) and axis not in part.made

    def _makes(self, part, axis):
        """Whether gates of channels that are silenced where they are made are factors there."""
        return axis in part.made

    def _gateable(self, is_factor, known=None):
        """For each class whether it can be removed when weights are zero where gates are factors: boolean array.

        Args:
            is_factor: Function from a part and an axis to a boolean.
            known: Classes that need not be tried.
        """
        rng, found = np.random.default_rng(0), np.zeros(len(self._roots), bool)
        drawn = [(v, rng.uniform(0.5, 1.5, v.shape)) for v in self._model.weights if "float" in v.dtype]
        for half in (0, 1):  # Of each group half of the channels go, so that the others show what needs them.
            tried = np.zeros(len(self._roots), bool)
            for classes in self._free:
                tried[[c for c in classes if known is None or not known[c]][half::2]] = True
            if not tried.any():
                continue
            values = IdentityDict(drawn)
            for _, part in self._parts:
                for axis, labels in part.axes.items():
                    if is_factor(part, axis) and tried[self._roots[labels]].any():
                        alive = graph.along(axis, ~tried[self._roots[labels]], len(part.variable.shape))
                        values[part.variable] = values[part.variable] * alive
            pairs = [(v, keras.ops.convert_to_tensor(value, v.dtype)) for v, value in values.items()]
            found |= tried & self._channels.removable_with(pairs)
        return found

    def _with_statistics(self):
        """Classes that a layer normalizes by moving statistics: it would undo a factor, and remember it."""
        found = np.zeros(len(self._roots), bool)
        for layer, part in self._parts:
            if graph.kind_of(layer).per_channel and not part.made:
                for labels in part.axes.values():
                    found[self._roots[labels]] = True
        return found

    def _why(self, numbers):
        """`{variable: reason}` for kernels that make channels without a gate."""
        found = IdentityDict()
        for _, part in self._parts:
            for axis in part.made if part.variable in self._kernels else ():
                left = self._roots[part.axes[axis]][numbers[part.axes[axis]] == 0].tolist()
                reasons = [self._reasons.get(c, "what reads them needs them all") for c in left]
                if reasons:
                    found.setdefault(part.variable, f"channels: {reasons[0]}")
        return found
