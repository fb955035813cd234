"""Contractions sum over channels: queries and keys that are multiplied by each other, norms, sums along the last axis.

A channel of zeros adds nothing to a sum. What is summed together can only leave together: channel 3 of the queries goes
with channel 3 of the keys. Nothing is known by name; operations are run with channels at zero, and without them.
"""

import keras
import numpy as np

from keras_sparse.graph.calls import Condition, run
from keras_sparse.graph.probing import Probed, alike
from keras_sparse.identity import IdentityDict

__all__ = ["Contraction"]

# A maximum takes a channel of zeros for one where all others are negative; products show in the sum of positive ones.
_RANGES = ((-3, 3), (-3, -1), (1, 3))


class Contraction(Probed):
    """An operation of which some inputs are summed over channels, and others pass; of most operations, all pass.

    Attributes:
        summed: For each input that is summed over channels, its axis of these, `{place in inputs: axis}`.
        alone: Whether a channel counts for nothing where one of these inputs is zero, as a factor.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.labels import Labelled
    >>> x = keras.Input((5, 3))
    >>> q, k = keras.layers.Dense(4)(x), keras.layers.Dense(4)(x)
    >>> made = Labelled(keras.Model(x, keras.ops.matmul(q, keras.ops.transpose(k, (0, 2, 1))))).calls[-1]
    >>> type(made).__name__, made.summed, made.alone
    ('Contraction', {0: 2, 1: 1}, True)
    """

    def label(self):
        self.inputs = list(IdentityDict.fromkeys(self.inputs))  # who attends to himself takes one tensor twice
        self.summed, self.alone, name = {}, False, self.operation.name
        varying = [self.classes.varying(x.labels) for x in self.inputs]
        own = [
            i
            for i, (x, axes) in enumerate(zip(self.inputs, varying, strict=True))
            if axes and "float" in keras.backend.standardize_dtype(x.dtype)
        ]
        try:
            passing = {i: self.dependence(i) for i in own}
        except Exception:  # whatever it wants that random numbers are not
            passing = {}
        mixing = [i for i, each in passing.items() if each is None]
        if not passing or (len(own) == len(self.inputs) and not mixing):
            super().label()
            return
        for together in (mixing, own) if len(own) > len(mixing) > 0 else (mixing,):
            self.summed = {i: varying[i][-1] for i in together}
            places = self._places()
            if places is not None:
                break
        else:
            if len(mixing) == len(own):
                super().label()
                return
            for i in mixing:
                self.classes.fix(self.inputs[i].labels, f"{name} computes something else with fewer channels")
            self.summed, places = {}, [None] * len(self.outputs)
        for i, tensor in enumerate(self.inputs):
            if i not in own:
                self.classes.fix(tensor.labels, f"{name} spreads it over channels")
        vectors = [self.classes.join_along(self.inputs[i].labels, axis) for i, axis in self.summed.items()]
        for vector in vectors:
            self.classes.join(vectors[0], vector)
        apart = [each for i, each in passing.items() if i not in mixing and i not in self.summed]
        for number, (output, axis) in enumerate(zip(self.outputs, places, strict=True)):
            parts = [each[number] for each in apart]
            if axis is not None:
                parts.append(vectors[0].reshape([-1 if i == axis else 1 for i in range(len(output.shape))]))
            output.labels = self.joined(output, parts)
            if not output.labels.any():
                output.labels = self.classes.new(1).reshape([1] * len(output.shape))
                self.classes.fix(output.labels, f"{name} sums over channels")
        if any((output.labels == 0).any() for output in self.outputs):
            self.stay(f"{name} makes channels of its own")
            return
        self.conditions = [Condition(vector, self._can_lose, f"{name} reads it") for vector in vectors]

    def _places(self):
        """The axis of the summed channels in each output, or `None` in it; `None` if zeros do not stand for less."""
        counts = {self.inputs[i].full[axis] for i, axis in self.summed.items()}
        if len(counts) > 1:
            return None
        count, self.alone, found = max(counts, default=0), True, [None] * len(self.outputs)
        kept = [np.arange(start, count, 2) for start in (0, 1)] if count else []
        try:
            for seed, (low, high) in enumerate(_RANGES * 2):
                rng, size = np.random.default_rng(seed), 1 if seed < len(_RANGES) else count**-0.25
                drawn = [size * rng.uniform(low, high, x.full) for x in self.inputs]
                values = [v if x is None else x for v, x in zip(drawn, self.masks(rng), strict=True)]
                for indices in kept:
                    less = run(self, self._taken(values, indices))
                    every = run(self, self._zeroed(values, indices, self.summed))
                    found = [_changed_axis(one, other) for one, other in zip(every, less, strict=True)]
                    if not (_same(every, less, indices, found) and self._tells(len(indices), found)):
                        return None
                    for i in self.summed if self.alone else ():
                        one = run(self, self._zeroed(values, indices, {i}))
                        self.alone &= _same(one, less, indices, found)
        except Exception:  # sizes that are in its arguments, or weights
            return None
        return found

    def _tells(self, count, places):
        """Whether the operation itself says that so many channels make outputs of such shapes."""
        axes = [self.summed.get(i) for i in range(len(self.inputs))]
        before, after = (
            [tuple(count if i == axis and n is not None else n for i, n in enumerate(x.shape)) for x, axis in pairs]
            for pairs in (zip(self.inputs, axes, strict=True), zip(self.outputs, places, strict=True))
        )
        return self.spec_is(before, after)

    def _taken(self, values, indices):
        return [np.take(v, indices, self.summed[i]) if i in self.summed else v for i, v in enumerate(values)]

    def _zeroed(self, values, indices, places):
        found = list(values)
        for i in places:
            stays = np.isin(np.arange(values[i].shape[self.summed[i]]), indices)
            found[i] = values[i] * stays.reshape([-1 if j == self.summed[i] else 1 for j in range(values[i].ndim)])
        return found

    def silenced(self, values, kept):
        for i, axis in self.summed.items():
            labels = self.inputs[i].labels
            alive = kept(labels).any(axis=tuple(j for j in range(labels.ndim) if j != axis))
            values = self._zeroed(values, np.flatnonzero(alive), {i})
        return values

    def _can_lose(self, kept):
        zero = [self.inputs[i].constants_along(axis, self.inputs[i].full[axis]) == 0 for i, axis in self.summed.items()]
        return np.any(zero, axis=0) if self.alone else np.all(zero, axis=0)


def _changed_axis(one, other):
    """The only axis along which the sizes of two arrays are different, `None` if these are the same."""
    if one.shape == other.shape:
        return None
    (axis,) = (i for i, (n, m) in enumerate(zip(one.shape, other.shape, strict=True)) if n != m)
    return axis


def _same(every, less, indices, axes):
    """Whether outputs are others but for what is left out along an axis."""
    picked = [one if axis is None else np.take(one, indices, axis) for one, axis in zip(every, axes, strict=True)]
    return all(alike(one, other) for one, other in zip(picked, less, strict=True))
