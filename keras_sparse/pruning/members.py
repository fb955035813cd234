"""What a channel is worth: the criterion's scores of all weights that leave with it, as one number.

A channel that leaves takes along the weights that make it and those that read it, also behind a depthwise kernel, a
concatenation or a `Flatten`: Fang et al., "DepGraph: towards any structural pruning" (2023), section 3.3, sums over
all of them.
"""

import numpy as np

from keras_sparse import graph
from keras_sparse.identity import IdentityDict

__all__ = ["Members"]


class Members:
    """The kernels that have channels, and along which axes.

    Args:
        model: The model.
        parts: Its pairs `(layer, part)` of weights that have channels.
        roots: For each label the one that stands for its channel.
        criterion: The `Criterion`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> from keras_sparse.identity import IdentityDict
    >>> from keras_sparse.pruning.members import Members
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    >>> model.set_weights([np.array([[3.0, -1.0]]), np.zeros(2), np.array([[4.0], [2.0]]), np.zeros(1)])
    >>> channels = ks.graph.Channels(model)
    >>> members = Members(model, channels.parts(), channels.roots, ks.criteria.get("magnitude"))
    >>> members.scores(IdentityDict())[channels.groups[1].channels].round(2)
    array([5.  , 2.24])
    """

    def __init__(self, model, parts, roots, criterion):
        kernels = IdentityDict((weight.variable, weight) for weight in graph.weights(model) if weight.kernel)
        self._parts = [(part, kernels[part.variable]) for _, part in parts if part.variable in kernels]
        self._roots, self._criterion = roots, criterion

    def scores(self, known):
        """The score of each channel: a sum over its weights, or where the criterion says so, a norm.

        Args:
            known: `{variable: scores}` of weights that have been scored, -inf where they are masked. Those of other
                kernels are what the criterion says, if it needs nothing but their values; else they do not count.
        """
        criterion, found = self._criterion, IdentityDict(known)
        if criterion.of_scales:  # one number for all weights that make a channel, and nothing that a reader has
            return self.made(known)
        if criterion.statistic is None and not criterion.of_inputs:
            for part, weight in self._parts:
                if part.variable not in found:
                    found[part.variable] = criterion(weight.numpy())
        if not criterion.norm:
            return self._sums(found)
        return np.sqrt(self._sums(IdentityDict((v, np.square(_live(score))) for v, score in found.items())))

    def made(self, known):
        """The sum over the kernels that make each channel and have scores of the mean of its scores there."""
        return self._sums(known, np.mean, only_made=True)

    def _sums(self, scores, pool=np.sum, only_made=False):
        found = np.zeros(len(self._roots))
        for part, _ in self._parts:
            if part.variable not in scores:
                continue
            score = _live(scores[part.variable])
            for axis in part.made if only_made else part.axes:
                others = tuple(i for i in range(score.ndim) if i != axis)
                np.add.at(found, self._roots[part.axes[axis]], pool(score, axis=others))
        return found


def _live(score):
    """Scores of which those of masked weights are 0."""
    return np.where(score == -np.inf, 0, score).astype("float64")
