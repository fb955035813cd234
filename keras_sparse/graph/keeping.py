"""Layers that keep channels apart: depthwise convolutions, normalizations, slopes; and the width of embeddings."""

import keras
import numpy as np

from keras_sparse.graph.calls import Call, Condition, Elementwise, Part, filled_with, run, uniform
from keras_sparse.graph.kinds import kind_of
from keras_sparse.graph.mixing import Refused, array
from keras_sparse.graph.probing import channelwise

__all__ = ["Masked", "rules"]


def rules():
    """The rules of this module for classes of layers, `{class of layers: class of calls}`.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.keeping import rules
    >>> rules()[keras.layers.PReLU].__name__
    'Slopes'
    """
    return {
        keras.layers.PReLU: Slopes,
        keras.layers.RMSNormalization: Normalized,
        keras.layers.GroupNormalization: Normalized,
        keras.layers.LayerNormalization: Refused,
    }


class Depthwise(Call):
    """A convolution of each channel for itself: its outputs are of the class of its inputs."""

    def label(self):
        layer = self.operation
        self.kind = kind_of(layer)
        (x,), (y,) = self.inputs, self.outputs
        first = getattr(layer, "data_format", "channels_last") == "channels_first"
        self.axis = 1 if first else len(x.shape) - 1
        labels = self.classes.join_along(x.labels, self.axis)
        self.kernel = next(v for v in layer.weights if v.name == next(iter(self.kind.kernels)))
        rank = len(self.kernel.shape)
        grouped = self.kernel.shape[-2] == 1 and self.kind.grouped
        channels = layer.groups if grouped else self.kernel.shape[-2]
        labels = np.broadcast_to(labels, channels) if labels.size == 1 else labels
        self.multiplier = y.full[1 if first else -1] // channels
        self.read, self.made = labels, np.repeat(labels, self.multiplier)
        self.grouped = grouped
        axis, own = (rank - 1, self.made) if grouped else (rank - 2, labels)
        self.parts = [Part(self.kernel, {axis: own}, (axis,))]
        self.bias = getattr(layer, self.kind.bias, None)
        if self.bias is not None:
            self.parts.append(Part(self.bias, {0: self.made}, (0,)))
        shape = [1] * len(y.shape)
        shape[1 if first else -1] = len(self.made)
        y.labels = self.made.reshape(shape)
        if getattr(layer, "activation", None) is not None and not channelwise(layer.activation):
            self.stay(f"the activation of {layer.name} looks at all channels")

    def find_constants(self):
        if self.fixed:
            return
        (x,), (y,) = self.inputs, self.outputs
        known = np.repeat(x.constants_along(self.axis, len(self.read)), self.multiplier)
        zero = ~(array(self.kernel) != 0).any(axis=tuple(range(len(self.kernel.shape) - 2))).reshape(-1) | (known == 0)
        value = np.where(zero, 0.0 if self.bias is None else array(self.bias), np.nan)
        if zero.any() and self.operation.activation is not None:
            values = keras.ops.convert_to_tensor(np.nan_to_num(value)[None].astype("float32"))
            found = keras.ops.convert_to_numpy(self.operation.activation(values))[0]
            value = np.where(zero, found, np.nan)
        others = ~np.isnan(known) & ~zero
        if others.any():
            filled = filled_with(x, np.nan_to_num(x.constants, nan=0.7))
            found = uniform(run(self, [filled])[0], y.labels, others.reshape(y.labels.shape))
            value = np.where(others, value if found is None else found.reshape(-1), value)
        y.constant = None if np.isnan(value).all() else value.reshape(y.labels.shape)

    def changed(self, kept):
        count = int(kept(self.read).sum())
        if not self.grouped or count == len(self.read):
            return {}
        return {"groups": count, self.kind.width: count * self.multiplier}


class PerChannel(Call):
    """A layer that scales and shifts each channel for itself, as batch normalization does in inference."""

    def label(self):
        layer = self.operation
        (x,), (y,) = self.inputs[:1], self.outputs
        rank = len(x.shape)
        axis = getattr(layer, "axis", 1 if getattr(layer, "data_format", None) == "channels_first" else -1)
        axis = axis[-1] % rank if isinstance(axis, (list, tuple)) else axis % rank
        labels = self.classes.join_along(x.labels, axis)
        self.made = np.broadcast_to(labels, x.full[axis])
        shape = [1] * rank
        shape[axis] = x.full[axis]
        y.labels = self.made.reshape(shape)
        scale = kind_of(layer).per_channel[0]
        self.scale = getattr(layer, scale, None)
        self.shift = [v for v in (getattr(layer, n, None) for n in kind_of(layer).per_channel[1:]) if v is not None]
        if any(tuple(v.shape) != (x.full[axis],) for v in layer.weights):
            self.stay(f"{layer.name} has weights of other shapes than one for each channel")
            return
        own = [v for v in (self.scale, *self.shift) if v is not None]
        self.parts = [Part(v, {0: self.made}, (0,) if any(v is w for w in own) else ()) for v in layer.weights]

    def find_constants(self):
        if self.fixed:
            return
        super().find_constants()
        y = self.outputs[0]
        if self.scale is None:
            return
        off = (array(self.scale) == 0).reshape(y.labels.shape)
        if off.any():
            shift = sum((array(v) for v in self.shift), np.zeros(len(self.made))).reshape(y.labels.shape)
            y.constant = np.where(off, shift, y.constants)

    def changed(self, kept):
        width = kind_of(self.operation).width
        count = int(kept(self.made).sum())
        return {} if width is None or count == len(self.made) else {width: count}


class Shared(Elementwise):
    """A layer that keeps channels apart, and whose weights are those of all channels alike."""

    def label(self):
        name, axes = self.operation.name, self.classes.varying(self.inputs[0].labels)
        rank = len(self.inputs[0].shape)
        if len(self.inputs) > 1 or len(self.outputs) > 1 or any(axis != rank - 1 for axis in axes):
            self.stay(f"{name} has weights, and its channels do not lie along the last axis of one tensor")
        elif any(size == self.inputs[0].full[-1] > 1 for v in self.operation.weights for size in v.shape):
            self.stay(f"{name} has weights that may be one for each channel: name them in `per_channel` of its kind")
        else:
            super().label()


class Slopes(Call):
    """PReLU: a slope for each element, or one along shared axes."""

    def label(self):
        (x,), (y,) = self.inputs, self.outputs
        (alpha,) = self.operation.weights
        axes = self.classes.varying(x.labels)
        axis = axes[-1] if axes else len(x.shape) - 1
        labels = self.classes.join_along(x.labels, axis)
        shape = [1] * len(x.shape)
        shape[axis] = labels.size
        y.labels = labels.reshape(shape)
        if axis and alpha.shape[axis - 1] > 1:
            self.parts = [Part(alpha, {axis - 1: np.broadcast_to(labels, alpha.shape[axis - 1])})]


class Masked(Elementwise):
    """Masking: a step in which all channels are of one value counts no more, and is zero.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.labels import Labelled
    >>> model = keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(3), keras.layers.Masking()])
    >>> type(Labelled(model).calls[1]).__name__
    'Masked'
    """

    def label(self):
        (x,) = self.inputs
        if np.any(keras.ops.convert_to_numpy(self.operation.mask_value) != 0):
            self.stay(f"{self.operation.name} looks at all channels")
            return
        super().label()
        self.conditions = [Condition(x.labels, self._can_lose, f"{self.operation.name} looks at all channels")]

    def _can_lose(self, kept):
        return self.inputs[0].constants == 0

    def fill_constants(self):
        known = self.inputs[0].constants
        self.outputs[0].constant = np.where(known == 0, 0.0, np.nan)


class Lookup(Call):
    """An embedding: its width is made of columns of the table."""

    def label(self):
        layer = self.operation
        tables = [v for v in layer.weights if v.name in kind_of(layer).kernels]
        if len(layer.weights) != 1 or len(self.outputs) != 1 or len(self.inputs) != 1:
            self.stay(f"{layer.name} has other weights than a table")
            return
        (self.table,) = tables
        y = self.outputs[0]
        self.made = self.classes.new(self.table.shape[-1])
        self.classes.fix(self.inputs[0].labels, f"{layer.name} looks it up")
        y.labels = self.made.reshape((1,) * (len(y.shape) - 1) + (-1,))
        self.parts = [Part(self.table, {1: self.made}, (1,))]

    def find_constants(self):
        if not self.fixed:
            value = array(self.table)
            value = np.where(value.min(axis=0) == value.max(axis=0), value[0], np.nan)
            self.outputs[0].constant = None if np.isnan(value).all() else value.reshape(self.outputs[0].labels.shape)

    def changed(self, kept):
        count = int(kept(self.made).sum())
        return {} if count == len(self.made) else {kind_of(self.operation).width: count}


class Normalized(Call):
    """A normalization of which channels of zeros can be removed exactly, because it sums squares or works in groups."""

    def label(self):
        layer, (x,), (y,) = self.operation, self.inputs, self.outputs
        rank = len(x.shape)
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0] if len(layer.axis) == 1 else None
        name = f"{layer.name} ({type(layer).__name__})"
        if axis is None:
            self.stay(f"{name} computes its statistics over several axes")
            return
        self.axis = axis = axis % rank
        if isinstance(layer, keras.layers.RMSNormalization) and axis != rank - 1:
            # Keras 3.15 multiplies it to the last axis all the same, if its size allows that.
            self.stay(f"{name} scales the last axis and normalizes another one")
            return
        self.read = np.broadcast_to(self.classes.join_along(x.labels, axis), x.full[axis])
        self.count = len(self.read)
        shape = [1] * rank
        shape[axis] = self.count
        y.labels = self.read.reshape(shape)
        self.parts = [
            Part(v, {0: self.read}, (0,) if v.name in ("gamma", "scale", "beta") else ()) for v in layer.weights
        ]
        self.groups = None
        if isinstance(layer, keras.layers.GroupNormalization):
            self.groups = self.count if layer.groups == -1 else layer.groups
            own = self.read.reshape(self.groups, -1)
            self.classes.join(own, own[:, :1])
        self.conditions = [Condition(self.read, self._can_lose, f"{name} computes its statistics over it")]

    def _can_lose(self, kept):
        if self.groups is not None:  # a whole group leaves, and what it was nobody sees in the others
            return np.ones(self.count, bool)
        return self.inputs[0].constants_along(self.axis, self.count) == 0

    def fill_constants(self):
        known = self.inputs[0].constants_along(self.axis, self.count)
        value = np.where(known == 0, 0.0, np.nan)
        if self.groups is not None:
            silent = np.repeat((known == 0).reshape(self.groups, -1).all(axis=1), self.count // self.groups)
            value = np.where(silent, self._shift(), np.nan)
        self.outputs[0].constant = None if np.isnan(value).all() else value.reshape(self.outputs[0].labels.shape)

    def find_constants(self):
        super().find_constants()
        scale = next((v for v in self.operation.weights if v.name in ("gamma", "scale")), None)
        if self.fixed or scale is None:
            return
        y, off = self.outputs[0], (array(scale) == 0)
        if off.any():
            y.constant = np.where(off.reshape(y.labels.shape), self._shift().reshape(y.labels.shape), y.constants)

    def _shift(self):
        return next((array(v) for v in self.operation.weights if v.name == "beta"), np.zeros(self.count))

    def changed(self, kept):
        count = int(kept(self.read).sum())
        if count == self.count:
            return {}
        if self.groups is not None:
            return {"groups": self.groups * count // self.count}
        return {"epsilon": self.operation.epsilon * self.count / count} if self.operation.weights else {}

    def weights(self, kept):
        values = super().weights(kept)
        if self.fixed or self.groups is not None:
            return values
        # The mean of squares is over fewer channels now: a factor that the scale takes back.
        factor = (self.count / max(1, int(kept(self.read).sum()))) ** 0.5
        return [(value * factor).astype(value.dtype) if factor != 1 else value for value in values]
