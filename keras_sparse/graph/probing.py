"""Probing finds out where an operation without weights puts channels, by running it."""

import keras
import numpy as np

from keras_sparse.graph.calls import Call, run
from keras_sparse.graph.kinds import KEEPS

__all__ = ["alike", "channelwise", "has_weights", "is_elementwise"]


def has_weights(function):
    """Whether an activation is a layer with weights, or one that has yet to be built: called, it would be changed.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.probing import has_weights
    >>> has_weights(keras.layers.PReLU()), has_weights(keras.layers.ReLU()), has_weights(keras.activations.relu)
    (True, False, False)
    """
    return isinstance(function, keras.layers.Layer) and (bool(function.weights) or not function.built)


def channelwise(function):
    """Whether a function of an array does the same to each channel, the last axis, whatever the others are.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.probing import channelwise
    >>> channelwise(keras.activations.relu), channelwise(keras.activations.softmax)
    (True, False)
    """
    if has_weights(function):
        return False
    x = np.random.default_rng(0).normal(0, 2, (8, 6)).astype("float32")
    try:
        whole, half = (
            keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(np.ascontiguousarray(value))))
            for value in (x, x[:, ::2])
        )
    except Exception:  # a function of the user's that wants another shape
        return False
    return whole.shape == x.shape and half.shape == whole[:, ::2].shape and np.allclose(whole[:, ::2], half, 1e-6)


def is_elementwise(operation, kind, inputs, structure):
    """Whether the table of kinds says all there is to know of where an operation puts channels.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.graph.calls import Tensor
    >>> from keras_sparse.graph.probing import is_elementwise
    >>> layer, x = keras.layers.ReLU(), Tensor((None, 3), "float32", labels=[[1, 2, 3]])
    >>> is_elementwise(layer, ks.graph.kind_of(layer), [x], x)
    True
    """
    outputs = keras.tree.flatten(structure)
    if len(outputs) != 1:
        return False
    (output,) = outputs
    if kind.activates and isinstance(operation, keras.layers.Layer):
        activation = getattr(operation, "activation", None)
        if kind.zero is None and not channelwise(operation if activation is None else activation):
            return False
    if len(inputs) > 1 or kind.channels != KEEPS:
        return len(inputs) > 1
    if inputs[0].shape == output.shape and (kind.activates or kind.inert or kind.zero is None):
        return True
    if kind.inert:
        return inputs[0].shape == output.shape
    # Of an image, one channel at a time.
    first = getattr(operation, "data_format", "channels_last") == "channels_first"
    own, rank = inputs[0].labels.shape, len(output.shape)
    axis = 1 if first else len(own) - 1
    apart = all(size == 1 for i, size in enumerate(own) if i != axis)
    return apart and (rank == len(own) or rank == 2) and (rank == 2 or output.full[axis] == inputs[0].full[axis])


def alike(one, other):
    """Whether two arrays are the same but for rounding.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.graph.probing import alike
    >>> alike(np.float32([100, 1e-5]), np.float32([100.0001, 0])), alike(np.float32([1.0]), np.float32([1.1]))
    (True, False)
    >>> alike(np.float32([1, -1e9]), np.float32([1.1, -1e9]))
    False
    """
    if one.shape != other.shape:
        return False
    near, sizes = 1e-2 if one.dtype.itemsize < 4 else 1e-5, np.abs(one).astype("float64")
    apart = sizes[one != other]
    if not apart.size:
        return True
    # What a mask puts in the place of scores, such as -1e9, says nothing of how exact the others are.
    usual = sizes[sizes <= 1e3 * max(1, np.quantile(apart, 0.1))]
    return bool(np.allclose(one, other, near, near * usual.max(initial=0)))


class Moves(Call):
    """An operation that only moves elements of its input: its outputs are elements of it, or zeros."""

    @classmethod
    def of(cls, *arguments):
        """The call, if the operation only moves elements, else `None`."""
        made = cls(*arguments)
        if not made.inputs or any(np.prod(x.full) > 1 << 24 for x in made.inputs):
            return None
        ends = np.cumsum([0, *(int(np.prod(x.full)) for x in made.inputs)])
        numbers = [
            np.arange(start + 1, end + 1, dtype="int32").reshape(x.full)
            for x, start, end in zip(made.inputs, ends[:-1], ends[1:], strict=True)
        ]
        try:
            made.sources = run(made, numbers)
            if not all(made.agrees(numbers, np.random.default_rng(seed)) for seed in range(2)):
                return None
        except Exception:  # not made for integers
            return None
        made.label()
        return made

    def agrees(self, numbers, rng):
        """Whether numbers of both signs and of all magnitudes come out where `sources` say."""
        count = sum(x.size for x in numbers)
        values = np.concatenate([[0.0], rng.normal(size=count) * 10 ** rng.uniform(-3, 3, count)]).astype("float32")
        kinds = [_float(x.dtype) for x in self.inputs]
        inputs = [
            values[x] > 0 if kind == "bool" else values[x].astype(kind) for x, kind in zip(numbers, kinds, strict=True)
        ]
        for source, output, expected in zip(self.sources, run(self, inputs), self.outputs, strict=True):
            if source.dtype.kind not in "iu" or source.shape[1:] != expected.full[1:]:
                return False
            if output.dtype.kind != "f" or source.min() < 0 or source.max() > count:
                return False
            if not np.allclose(values[source], output, 1e-2 if output.dtype.itemsize < 4 else 1e-6):
                return False
        return True

    def label(self):
        every = [np.broadcast_to(x.labels, x.full).reshape(-1) for x in self.inputs]
        labels = np.concatenate([[0], *every])
        for output, source in zip(self.outputs, self.sources, strict=True):
            output.labels = self._compressed(labels[source])
            if (output.labels == 0).any():
                new = self.classes.new(1)
                self.classes.fix(new, f"{self.operation.name} puts zeros there")
                output.labels = np.where(output.labels == 0, new[0], output.labels)

    def _compressed(self, labels):
        """Labels of size 1 along axes that do not matter; zeros in between are of the channel that they pad."""
        for axis, size in enumerate(labels.shape):
            highest = labels.max(axis=axis, keepdims=True)
            if size > 1 and ((labels == highest) | (labels == 0)).all():
                labels = highest
        if labels.shape[0] > 1:  # several samples out of one: they are not told apart
            labels = self.classes.join_along(labels.reshape(labels.shape[0], -1), 1).reshape(1, *labels.shape[1:])
        return labels

    def fill_constants(self):
        every = [np.broadcast_to(x.constants, x.full).reshape(-1) for x in self.inputs]
        values = np.concatenate([[0.0], *every])
        for output, source in zip(self.outputs, self.sources, strict=True):
            value = values[source]
            axes = tuple(axis for axis, size in enumerate(output.labels.shape) if size == 1)
            low, high = value.min(axis=axes, keepdims=True), value.max(axis=axes, keepdims=True)
            found = np.where(low == high, low, np.nan)  # NaN, if any is
            output.constant = None if np.isnan(found).all() else found

    def can_lose(self, gone):
        """Whether something can stand for it without the classes that `gone` says."""
        return self.form(lambda labels: ~gone[self.classes.find(labels)]) is not None

    def form(self, kept):
        """What stands for it when only some channels stay.

        Returns:
            `"same"`: the operation as it is. A list with, for each output, `("reshape", shape)` or `("take", axis,
            indices)`: these of the input. `None`: there is no such thing.
        """
        before = [self._kept(x, kept) for x in self.inputs]
        after = [self._kept(x, kept) for x in self.outputs]
        ends = np.cumsum([0, *(int(np.prod(x.full)) for x in self.inputs)])
        numbers, new_index = [], np.zeros(ends[-1] + 1, "int32")
        for x, indices, start, end in zip(self.inputs, before, ends[:-1], ends[1:], strict=True):
            part = np.arange(start + 1, end + 1, dtype="int32").reshape(x.full)[np.ix_(*indices)]
            numbers.append(part)
            new_index[part.reshape(-1)] = part.reshape(-1)
        wanted = [source[np.ix_(*indices)] for source, indices in zip(self.sources, after, strict=True)]
        try:
            found = run(self, numbers)
            same = all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
            if same and self.spec_is(self.shapes_left(self.inputs, kept), self.shapes_left(self.outputs, kept)):
                return "same"
        except Exception:  # the sizes in its arguments are no longer those
            pass
        forms = [_form(numbers[0], one) for one in wanted] if len(self.inputs) == 1 else [None]
        return None if any(form is None for form in forms) else forms

    def _kept(self, tensor, kept):
        """The indices that stay, for each axis of the full shape."""
        alive = kept(tensor.labels)
        found = []
        for axis, size in enumerate(tensor.full):
            others = tuple(i for i in range(alive.ndim) if i != axis)
            own = alive.any(axis=others)
            found.append(np.flatnonzero(np.broadcast_to(own, size) if own.size == 1 else own))
        if tensor.labels.shape[0] == 1 and self.sources and tensor in self.outputs:
            source = self.sources[self.outputs.index(tensor)]
            found[0] = np.arange(source.shape[0])
        return found


def _form(before, after):
    """How one array of numbers becomes another: by a reshape, or by picking along one axis."""
    if before.size == after.size and np.array_equal(before.reshape(-1), after.reshape(-1)):
        return "reshape", after.shape
    if before.ndim != after.ndim:
        return None
    for axis in range(1, before.ndim):
        same = [n for i, n in enumerate(before.shape) if i != axis] == [
            n for i, n in enumerate(after.shape) if i != axis
        ]
        if not same:
            continue
        rows, wanted = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)[:, 0].tolist() for x in (before, after))
        index = {number: i for i, number in enumerate(rows)}
        if all(number in index for number in wanted):
            indices = [index[number] for number in wanted]
            if np.array_equal(np.take(before, indices, axis), after):
                return "take", axis, indices
    return None


class Probed(Call):
    """An operation that is asked by perturbing some of its channels and looking where its outputs change."""

    def label(self):
        name = f"{self.operation.name} ({type(self.operation).__name__})"
        try:
            found = [self.dependence(i) for i in range(len(self.inputs))]
        except Exception:  # whatever it wants that random numbers are not
            found = [None]
        if not self.inputs or any(each is None for each in found):
            self.stay(f"{name} mixes channels, or cannot be run on its own")
            return
        for number, output in enumerate(self.outputs):
            labels = self.joined(output, [each[number] for each in found])
            if (labels == 0).any():
                self.stay(f"{name} makes channels of its own")
                return
            output.labels = labels

    def joined(self, output, parts):
        """The labels of an output of which each element belongs to those of several arrays; 0 belongs to none."""
        labels = np.zeros(output.full, "int64")
        for each in parts:
            self.classes.join(labels, each)
            labels = np.maximum(labels, each)
        for axis in range(labels.ndim):
            highest = labels.max(axis=axis, keepdims=True)
            if ((labels == highest) | (labels == 0)).all():
                labels = highest
        return labels

    def masks(self, rng):
        """Random booleans for each input that is a mask, `None` for each that is of floats."""
        kinds = [keras.backend.standardize_dtype(x.dtype) for x in self.inputs]
        if not all("float" in kind or kind == "bool" for kind in kinds):
            raise TypeError("integers cannot be perturbed")
        return [
            rng.random(x.full) < 0.7 if kind == "bool" else None for x, kind in zip(self.inputs, kinds, strict=True)
        ]

    def _values(self, rng):
        masks = self.masks(rng)
        return [
            rng.normal(0, 2, x.full).astype("float32") if mask is None else mask
            for x, mask in zip(self.inputs, masks, strict=True)
        ]

    def _evaluated(self):
        """What the known constants of its inputs make, whatever the others are."""
        found = []
        for seed in range(2):
            values = self._values(np.random.default_rng(seed))
            known = [x.constants for x in self.inputs]
            found.append(
                run(
                    self,
                    [
                        v if v.dtype == bool else np.where(np.isnan(c), v, c).astype(v.dtype)
                        for v, c in zip(values, known, strict=True)
                    ],
                )
            )
        return [
            np.where(one == other, one, np.asarray(np.nan, one.dtype)) if one.dtype.kind == "f" else one
            for one, other in zip(*found, strict=True)
        ]

    def dependence(self, which):
        """For each output the label in one input that each element depends on, 0 for none; `None` if on several."""
        tensor = self.inputs[which]
        roots, codes = np.unique(self.classes.find(tensor.labels), return_inverse=True)
        codes = np.broadcast_to(codes.reshape(tensor.labels.shape), tensor.full)
        bits = max(1, int(len(roots) - 1).bit_length())
        changed = [np.zeros((bits, 2, *x.full), bool) for x in self.outputs]
        for seed in range(4):
            rng = np.random.default_rng(seed)
            values = self._values(rng)
            if values[which].dtype == bool:
                raise TypeError("booleans cannot be perturbed")
            base = run(self, values)
            for bit in range(bits):
                for side in (0, 1):
                    where = (codes >> bit & 1) == side
                    moved = values[which] + where * rng.uniform(1, 4, tensor.full).astype("float32")
                    other = run(self, [*values[:which], moved, *values[which + 1 :]])
                    for each, one, two in zip(changed, base, other, strict=True):
                        each[bit, side] |= one != two
                if any((each[:, 0] & each[:, 1]).any() for each in changed):
                    return None
        found = []
        for each in changed:
            some, every = each.any(axis=(0, 1)), each.any(axis=1).all(axis=0)
            if (some != every).any():
                return None
            code = sum((each[bit, 1].astype(int) << bit) for bit in range(bits))
            found.append(np.where(some, roots[np.minimum(code, len(roots) - 1)], 0))
        return found

    def silenced(self, values, kept):
        """The inputs as they are when it may lose all but what `kept` says: `values`, if it keeps channels apart."""
        return values

    def can_lose(self, gone):
        """Whether it does the same to the channels that stay without the classes that `gone` says."""

        def kept(labels):
            return ~gone[self.classes.find(labels)]

        return self.form(kept) is not None

    def form(self, kept):
        """`"same"`, or `None` if the operation computes something else when only some channels stay."""
        values = self._values(np.random.default_rng(9))
        try:
            whole, part = (
                run(self, self.silenced(values, kept)),
                run(self, [_picked(x, v, kept) for x, v in zip(self.inputs, values, strict=True)]),
            )
            for output, one, other in zip(self.outputs, whole, part, strict=True):
                picked = _picked(output, one, kept)
                if not alike(picked, other):
                    return None
            same = self.spec_is(self.shapes_left(self.inputs, kept), self.shapes_left(self.outputs, kept))
        except Exception:  # the sizes in its arguments are no longer those
            return None
        return "same" if same else None


def _picked(tensor, value, kept):
    alive = kept(tensor.labels)
    for axis, size in enumerate(alive.shape):
        if size > 1:
            own = alive.any(axis=tuple(i for i in range(alive.ndim) if i != axis))
            value = np.compress(own, value, axis=axis)
    return value


def _float(dtype):
    return "float32" if "float" in keras.backend.standardize_dtype(dtype) else keras.backend.standardize_dtype(dtype)
