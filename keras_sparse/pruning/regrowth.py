"""Channels that live, die and grow again while a model trains: those of a group do so in all of its layers at once."""

import numpy as np

from keras_sparse import graph
from keras_sparse.identity import IdentityDict

__all__ = ["MovingChannels"]


class MovingChannels:
    """Channels of which as many are live at any time, chosen by groups.

    What grows gets random weights, as large as those of the channels that live, where it is made: a channel that is
    zero behind a ReLU would never get a gradient. What reads it starts at zero, so that the network computes the same
    as before and the gradient says how the channel is used: Evci et al., "GradMax" (2022), section 3, grows neurons so.
    Channels are ranked by the weights that make them alone: by those that read it, what grew last would leave first.

    Args:
        model: The model.
        choice: Its `ChannelChoice`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> plan = ks.pruning.Plan(model, 0.5, pattern="channel", removable=True)
    >>> moving = ks.pruning.MovingChannels(model, plan.channels)
    >>> (mask,) = moving.first(plan.present_masks(), np.random.default_rng(0))
    >>> int(mask.any(axis=0).sum())
    4
    """

    def __init__(self, model, choice):
        self._choice, self._parts = choice, [part for _, part in choice.parts()]
        self._weights = IdentityDict((weight.variable, weight) for weight in graph.weights(model))

    def first(self, masks, generator):
        """Masks at the start: the dead channels stay dead, and chance makes their number that of the target.

        Args:
            masks: What is not zero in each goal's weight.
            generator: A NumPy random generator.
        """
        gone = self._choice.gone(masks)
        for free, share in zip(self._choice.groups, self._choice.targets, strict=True):
            count = min(round(share * len(free)), len(free) - 1)
            order = np.argsort(generator.random(len(free)) + ~gone[free], kind="stable")
            gone[self._choice.spread(free[order])] = False
            gone[self._choice.spread(free[order[:count]])] = True
        return self._choice.masks_without(gone, masks)

    def settled(self, masks):
        """Masks of whole channels that keep what is live in `masks`."""
        return self._choice.masks_without(self._choice.gone(masks), masks)

    def next(self, masks, magnitudes, growth, fraction, generator):
        """Masks of which `fraction` of each group's live channels is dropped, and as many dead ones grow.

        Args:
            masks: The present masks.
            magnitudes: An array for each goal's weight: the lowest channels are dropped.
            growth: The same: the highest dead ones grow. Chance decides among equals.
            fraction: The share of live channels that move, in [0, 1]; no more can move than are dead.
            generator: A NumPy random generator.
        """
        gone = self._choice.gone(masks)
        low, high = self._choice.made(magnitudes), self._choice.made(growth)
        for free in self._choice.groups:
            live, dead = free[~gone[free]], free[gone[free]]
            count = min(round(fraction * len(live)), len(dead))
            dropped = live[np.argsort(low[live], kind="stable")[:count]]
            dead = generator.permutation(dead)
            grown = dead[np.argsort(-high[dead], kind="stable")[:count]]
            gone[self._choice.spread(dropped)] = True
            gone[self._choice.spread(grown)] = False
        return self._choice.masks_without(gone, masks)

    def moved(self, before, after):
        """How many channels are live in one of two lists of masks and not in the other."""
        other = self._choice.gone(before) ^ self._choice.gone(after)
        return sum(int(other[free].sum()) for free in self._choice.groups)

    def grow(self, before, after, generator):
        """Give the channels that `after` has and `before` had not their first weights.

        Args:
            before: The masks that were.
            after: Those that are, zeros put in place.
            generator: A NumPy random generator.

        Returns:
            `{variable: boolean array}`: the positions at which another weight begins, in these and in dropped channels.
        """
        old, new = self._choice.gone(before), self._choice.gone(after)
        grown, changed = old & ~new, IdentityDict()
        for part in self._parts:
            weight, shape = self._weights[part.variable], tuple(part.variable.shape)
            mixes = weight.kernel and weight.role != graph.DEPTHWISE
            value, fresh = weight.numpy(), np.zeros(shape, bool)
            for axis, labels in part.axes.items():
                born = _along(axis, grown[labels], shape)
                outputs = not mixes or axis in weight.output_axes
                if axis in part.made:
                    fresh |= born | _along(axis, (new & ~old)[labels], shape)
                    if outputs:
                        value = np.where(born, self._first_values(weight, part, new, generator), value)
                elif not outputs:
                    value, fresh = np.where(born, 0, value), fresh | born
            if fresh.any():
                part.variable.assign(value.astype("float32"))
                changed[part.variable] = fresh
        return changed

    def _first_values(self, weight, part, gone, generator):
        """What a channel that grows has in a weight that makes it."""
        value = weight.numpy()
        live = value != 0
        for axis in part.made:
            live &= ~_along(axis, gone[part.axes[axis]], value.shape)
        if weight.kernel:
            return generator.normal(0, value[live].std() if live.any() else 0.05, value.shape)
        scale = getattr(weight.layer, (*graph.kind_of(weight.layer).per_channel, "gamma")[0], None)
        mean = value[live].mean() if live.any() else 1.0
        return np.full(value.shape, mean if part.variable is scale else 0.0)


def _along(axis, flags, shape):
    """Flags for the places along an axis as flags for each number of an array."""
    return np.broadcast_to(graph.along(axis, flags, len(shape)), shape)
