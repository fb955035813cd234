"""A channel group is a set of channels of the same layers, each of which can only be removed in all of them at once."""

import contextlib
import dataclasses
import functools

import keras
import numpy as np

from keras_sparse.graph.calls import Part
from keras_sparse.graph.labels import Labelled
from keras_sparse.graph.macs import uses
from keras_sparse.graph.mixing import array
from keras_sparse.graph.weights import weights as weights_of

__all__ = ["ChannelGroup", "Channels"]


@dataclasses.dataclass(eq=False)
class ChannelGroup:
    """Channels that lie in the same weights, along the same axes.

    Attributes:
        members: List of `(layer, part)`: the weights, and where the channels lie in them.
        channels: The representatives of the classes of labels: one for each channel, a vector.
        removable: Which channels can be removed without a trace, a boolean for each.
        dead: Which are zero in all kernels that make them, whatever their biases are, or removable.
        reasons: Why channels must stay that are dead, or all of them, a list of sentences.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layers = [keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
    >>> group = ks.graph.Channels(keras.Sequential([keras.Input((4,)), *layers])).groups[1]
    >>> group.layers, len(group.channels)
    (['a', 'b'], 3)
    """

    members: list
    channels: np.ndarray
    removable: np.ndarray = None
    dead: np.ndarray = None
    reasons: list = dataclasses.field(default_factory=list)

    @property
    def layers(self):
        """The names of the layers, in the order of the model."""
        return list(dict.fromkeys(layer.name for layer, _ in self.members))


class Channels:
    """All channels of a model: their groups, which of them are dead, and what the model costs without them.

    Args:
        model: A built functional or Sequential model.
        round_to: Channels of a group stay, dead ones too, until their number is a multiple of this.

    Attributes:
        labelled: The `Labelled` model.
        groups: List of `ChannelGroup`.
        removed: For each label whether it can be removed, a boolean array.
        tied: Sentences about weights that several layers hold.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> report = ks.prune(model, {"/kernel": (0.5, "channel")}, filters=model.layers[0])
    >>> int(ks.graph.Channels(model).groups[1].removable.sum())
    4
    """

    def __init__(self, model, round_to=1):
        self.labelled = labelled = Labelled(model)
        self.classes = labelled.classes
        self._weights = None
        self.calls = labelled.calls
        self._reject_tied()
        self.roots = self.classes.find(np.arange(len(self.classes)))
        self.reasons = self.classes.reasons()
        self._update_constants()
        self.groups = self._grouped()
        self.removed = self._find_removed(round_to)
        zero = self._zero()
        for group in self.groups:
            group.removable = self.removed[group.channels]
            group.dead = zero[group.channels] | group.removable
            group.reasons = self._why(group)

    def _zero(self):
        """For each label whether all kernels that make its class are zero there, if there are any."""
        live, made = np.zeros(len(self.roots), bool), np.zeros(len(self.roots), bool)
        for _, part in self.parts():
            for own in part.made if len(part.variable.shape) > 1 else ():
                nonzero = array(part.variable) != 0
                labels = self.roots[part.axes[own]]
                made[labels] = True
                live[labels[nonzero.any(axis=tuple(axis for axis in range(nonzero.ndim) if axis != own))]] = True
        return (made & ~live)[self.roots]

    def not_silenced(self, stay):
        """`{class: reason}` of channels, but for those of `stay`, that readers see when all that makes them is zero."""
        kept = functools.partial(self._is_of, list(stay))
        found = {}
        with self._with([(p.variable, keras.ops.cast(p.silenced(kept), p.variable.dtype)) for _, p in self.parts()]):
            seen = [(tensor, call.operation.name) for call in self.calls if call.conditions for tensor in call.inputs]
            for tensor, name in [*seen, *((tensor, "the caller") for tensor in self.labelled.outputs)]:
                for root in np.unique(self.roots[tensor.labels][tensor.constants != 0]).tolist():
                    if root not in stay:
                        found.setdefault(root, f"{name} would not see zeros where all that makes the channel is zero")
        return found

    def removable_with(self, values):
        """For each label whether it could be removed if weights had other values.

        Args:
            values: List of `(variable, value)`, tensors.
        """
        with self._with(values):
            return self._unneeded(set(self.classes.reasons()))

    @contextlib.contextmanager
    def _with(self, values):
        """Know the constants that would be there if weights had other values, as long as the context lasts."""
        try:
            with keras.StatelessScope(values):
                self._update_constants()
                yield
        finally:
            self._update_constants()

    def _update_constants(self):
        for call in self.calls:
            call.update_constants()

    def _is_of(self, classes, labels):
        return np.isin(self.roots[labels], classes)

    def _why(self, group):
        found = [self.reasons[c] for c in group.channels.tolist() if c in self.reasons]
        left = group.channels[group.dead & ~group.removable & ~np.isin(group.channels, list(self.reasons))]
        for call in self.calls if left.size else ():
            for condition in call.conditions:
                where = np.isin(self.roots[condition.labels], left)
                if where.any() and not np.broadcast_to(condition.test(self.kept), where.shape)[where].all():
                    found.append(condition.reason() if callable(condition.reason) else condition.reason)
        return list(dict.fromkeys(found))

    def kept(self, labels):
        """Which labels stay, an array of booleans."""
        return ~self.removed[labels]

    def _reject_tied(self):
        owners, self.tied = {}, []
        for call in [*self.calls, *self.labelled.composites]:
            for variable in call.own_weights():
                owner = owners.setdefault(id(variable), call.operation)
                if owner is not call.operation:
                    reason = f"{owner.name} and {call.operation.name} share the weight {variable.path}"
                    self.tied.append(reason)
                    for other in [*self.calls, *self.labelled.composites]:
                        if other.operation in (owner, call.operation):
                            other.stay(reason)

    def parts(self):
        """Yield `(layer, part)` for all weights that have channels, once each."""
        for layer, rule in self.labelled.rules.items():
            yield from ((layer, part) for part in rule.parts)

    def _grouped(self):
        places = {}
        members = list(self.parts())
        for number, (_, part) in enumerate(members):
            for axis, labels in part.axes.items():
                for root in np.unique(self.roots[labels]).tolist():
                    places.setdefault(root, set()).add((number, axis))
        groups = {}
        for root, where in places.items():
            groups.setdefault(frozenset(where), []).append(root)
        return [
            ChannelGroup([members[number] for number in sorted({n for n, _ in where})], np.array(sorted(roots)))
            for where, roots in sorted(groups.items(), key=lambda item: (min(item[0]), item[1]))
        ]

    def _find_removed(self, round_to):
        stay = set(self.reasons)
        while True:
            removed = self._unneeded(stay)
            back = self._last_ones(removed) or self._rounded(removed, round_to) or self._without_form(removed)
            if not back:
                return removed
            stay.update(back)
            self.reasons.update(back)

    def _unneeded(self, stay):
        """What nothing needs that stays: all is removed at first, and comes back if a condition does not hold."""
        removed = ~np.isin(self.roots, sorted(stay))
        removed[0] = False

        def kept(labels):
            return ~removed[labels]

        conditions = [condition for call in reversed(self.calls) for condition in reversed(call.conditions)]
        again = True
        while again:
            again = False
            for condition in conditions:
                labels = condition.labels
                asked = removed[labels]
                if not asked.any():
                    continue
                missed = asked & ~np.broadcast_to(condition.test(kept), asked.shape)
                if missed.any():
                    removed[np.isin(self.roots, self.roots[labels[missed]])] = False
                    again = True
        return removed

    def _last_ones(self, removed):
        """`{class: reason}`: one channel of each tensor or weight that would have none."""
        found = {}
        arrays = [(f"the output of {call.operation.name}", x.labels) for call in self.calls for x in call.outputs]
        arrays += [(part.variable.path, labels) for _, part in self.parts() for labels in part.axes.values()]
        for name, labels in reversed(arrays):  # What comes last may need what comes before it.
            if removed[labels].all():
                found[int(self.roots[labels.reshape(-1)[0]])] = f"the last channel of {name}"
                break
        return found

    def _rounded(self, removed, multiple):
        """`{class: reason}`: dead channels that stay so that a group has a multiple of channels."""
        found = {}
        for group in self.groups if multiple > 1 else ():
            dead = group.channels[removed[group.channels]].tolist()
            living = len(group.channels) - len(dead)
            short = min(len(dead), -living % multiple)
            reason = f"stays so that there are a multiple of {multiple} channels"
            found.update(dict.fromkeys(dead[:short], reason))
        return found

    def _without_form(self, removed):
        """`{class: reason}`: what stays because an operation that nothing can replace would compute something else."""
        found = {}
        for call in self.calls:
            if hasattr(call, "form") and not (call.fixed or call.inside):
                roots = call.roots()
                if removed[roots].any() and not call.can_lose(removed):
                    reason = f"{call.operation.name} computes something else with fewer channels"
                    found.update(dict.fromkeys(roots[removed[roots]].tolist(), reason))
        return found

    def cost(self, kept=None):
        """What the model costs when only what `kept` says stays.

        Args:
            kept: Function from labels to booleans. `None`: what is not dead.

        Returns:
            `{"parameters": int, "macs": int, "bytes": int}`: MACs (multiplications by weights) for one sample, bytes
            of the weights.
        """
        kept = self.kept if kept is None else kept
        total = dict.fromkeys(("parameters", "macs", "bytes"), 0)
        for part, positions, size in self._sizes():
            count = part.count(kept)
            total["parameters"] += count
            total["macs"] += positions * count
            total["bytes"] += size * count
        return total

    def _sizes(self):
        """For each weight its `Part`, how often it is used, and the bytes of an element."""
        if self._weights is None:
            positions, parts = self._positions(), {id(part.variable): part for _, part in self.parts()}
            self._weights = [
                (
                    parts.get(id(weight.variable)) or Part(weight.variable, {}),
                    positions.get(weight.variable, 0),
                    _bytes(weight.variable.dtype),
                )
                for weight in weights_of(self.labelled.model)
            ]
        return self._weights

    @functools.cached_property
    def whole_cost(self):
        """What the model costs as it is, as `cost` counts."""
        return self.cost(lambda labels: np.ones(np.shape(labels), bool))

    def channel_cost(self, group):
        """What one channel of a group costs in the model as it is, as `cost` counts."""
        first = group.channels[0]
        without = self.cost(lambda labels: self.roots[labels] != first)
        return {name: amount - without[name] for name, amount in self.whole_cost.items()}

    def _positions(self):
        model = self.labelled.model
        arrays = [_ones(x) for x in model.inputs]
        sequential = isinstance(model, keras.Sequential)
        return uses(model, arrays[0] if sequential else keras.tree.pack_sequence_as(model.input, arrays))


def _ones(tensor):
    shape = [8 if n is None else n for n in tensor.shape[1:]]
    dtype = keras.backend.standardize_dtype(tensor.dtype).replace("bfloat16", "float32")
    return np.full((1, *shape), "", object) if dtype == "string" else np.zeros((1, *shape), dtype)


def _bytes(dtype):
    digits = "".join(c for c in str(dtype) if c.isdigit())
    return max(1, int(digits or 8) // 8)
