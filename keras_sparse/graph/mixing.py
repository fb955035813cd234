"""A rule says how the weights of a layer are labelled: what its channels are made of, and when they can be removed.

Rules follow the rows of the table of kinds, so that a row that a user registers is followed, too.
"""

import keras
import numpy as np

from keras_sparse.graph.calls import Call, Condition, Part
from keras_sparse.graph.kinds import DEPTHWISE, EMBEDDING, KEEPS, MIXES, Equation, kind_of
from keras_sparse.graph.probing import channelwise, has_weights
from keras_sparse.graph.weights import as_array

__all__ = ["rule_of"]


def rule_of(layer):
    """The class of calls for a layer with weights.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.graph.mixing import rule_of
    >>> rule_of(keras.layers.Conv2D(3, 3)).__name__
    'Linear'
    """
    from keras_sparse.graph import keeping, sequences  # they are made of the rules here

    kind = kind_of(layer)
    if getattr(layer, "lora_enabled", False) or any("int" in str(v.dtype) for v in getattr(layer, "weights", ())):
        return Refused
    for classes, rule in (sequences.rules() | keeping.rules()).items():
        if isinstance(layer, classes):
            return rule
    roles = [kernel.role for kernel in kind.kernels.values()]
    if roles == [EMBEDDING]:
        return keeping.Lookup
    if kind.linear and (roles == [DEPTHWISE] or _one_by_one(layer, kind)):
        return keeping.Depthwise
    if kind.linear and kind.channels == MIXES:
        return Separable if DEPTHWISE in roles else Linear
    if kind.per_channel:
        return keeping.PerChannel
    if kind.channels == KEEPS and not kind.kernels:
        return keeping.Shared
    return Refused


def _one_by_one(layer, kind):
    """Whether it is a grouped convolution whose groups read one channel each."""
    return kind.grouped and layer.groups > 1 and layer.kernel.shape[-2] == 1


def array(variable):
    """A variable's value as float64."""
    return as_array(variable).astype("float64")


class Refused(Call):
    """A layer with weights of which nothing is known: all of its channels stay."""

    def label(self):
        name = type(self.operation).__name__
        if getattr(self.operation, "lora_enabled", False):
            reason = f"{self.operation.name} has LoRA: merge it first"
        elif getattr(self.operation, "has_gates", False):
            reason = f"{self.operation.name} has gates: `ks.bake` the model first"
        elif getattr(self.operation, "quantization_mode", None) is not None:
            reason = f"{self.operation.name} is quantized: remove channels first, then quantize"
        elif isinstance(self.operation, keras.layers.Normalization):
            reason = f"{self.operation.name} (Normalization) shifts each channel by a mean of its own"
        elif "Normalization" in name:
            reason = f"{self.operation.name} ({name}) computes its statistics over the channels of a sample"
        elif self.closed:
            reason = f"{self.operation.name} ({name}) cannot be run on symbolic inputs ({self.closed})"
        else:
            reason = f"{self.operation.name} ({name}) has weights, and no row in the table of kinds says how they lie"
        self.stay(reason)


class Linear(Call):
    """A layer whose units are `activation(inputs times their slice of the kernel, plus their bias)`."""

    def label(self):
        layer, classes = self.operation, self.classes
        self.kind = kind_of(layer)
        name, row = list(self.kind.kernels.items())[-1]
        self.kernel = next((v for v in layer.weights if v.name == name), None)
        if self.kernel is None or len(self.inputs) != 1 or len(self.outputs) != 1:
            self.stay(f"{layer.name} is not called as its kind says")
            return
        activation = getattr(layer, "activation", None)
        if has_weights(activation):
            self.stay(f"the activation of {layer.name} has weights: call it as a layer of its own")
            return
        (x,), (y,) = self.inputs, self.outputs
        self.bias = getattr(layer, self.kind.bias, None)
        rank = len(self.kernel.shape)
        self.groups = layer.groups if self.kind.grouped else 1
        in_axis, out_axis, self.in_kernel, self.out_kernel = self._axes(row, rank)
        self.axis = in_axis
        sources = self._sources(x, in_axis)
        units = self.kernel.shape[self.out_kernel]
        self.made = classes.new(units)
        if self.groups > 1:
            classes.join(self.made.reshape(self.groups, -1), self.made.reshape(self.groups, -1)[:1])
            classes.join(sources.reshape(self.groups, -1), sources.reshape(self.groups, -1)[:1])
        self.read = sources
        width = self.kernel.shape[self.in_kernel]
        self.parts = [
            Part(self.kernel, {self.in_kernel: sources[:width], self.out_kernel: self.made}, (self.out_kernel,))
        ]
        if self.bias is not None:
            axis = self._bias_axis()
            if axis is None:
                classes.fix(self.made, f"{layer.name} shares its bias among channels")
            else:
                self.parts.append(Part(self.bias, {axis: self.made}, (axis,)))
        shape = [1] * len(y.shape)
        shape[out_axis] = units
        y.labels = self.made.reshape(shape)
        self._apart = activation is None or channelwise(activation)
        if not self._apart:
            classes.fix(self.made, f"the activation of {layer.name} looks at all channels")
        self._activation, self._nonzero = activation, None
        self.conditions = [Condition(self.read, self._can_lose, self._why)]

    def _axes(self, row, rank):
        """The axes of channels: of the input, the output, and of inputs and outputs in the kernel."""
        layer = self.operation
        if isinstance(layer, keras.layers.EinsumDense):
            equation = self.equation = Equation(layer.equation)
            inner = [c for c in equation.inputs if c in equation.kernel and c not in equation.outputs]
            (x,), (y,) = self.inputs, self.outputs
            axes = {c: _axis_of(equation.inputs, c, len(x.shape)) for c in inner}
            varying = self.classes.varying(x.labels)
            letter = next((c for c in reversed(inner) if axes[c] in varying), inner[-1])
            self.unit = next(c for c in reversed(equation.outputs) if c in equation.units)
            out_axis = _axis_of(equation.outputs, self.unit, len(y.shape))
            return axes[letter], out_axis, equation.kernel.index(letter), equation.kernel.index(self.unit)
        first = getattr(layer, "data_format", "channels_last") == "channels_first"
        axis = 1 if first else len(self.inputs[0].shape) - 1
        out_axis = 1 if first else len(self.outputs[0].shape) - 1
        return axis, out_axis, row.input_axes(layer, rank)[-1], row.output_axes(layer, rank)[-1]

    def _bias_axis(self):
        if not isinstance(self.operation, keras.layers.EinsumDense):
            return 0 if len(self.bias.shape) == 1 else None
        letters = [c for c in self.equation.outputs if c in (self.operation.bias_axes or "")]
        return letters.index(self.unit) if self.unit in letters else None

    def _sources(self, x, axis):
        width = self.kernel.shape[self.in_kernel] * self.groups
        labels = self.classes.join_along(x.labels, axis)
        return np.broadcast_to(labels, width) if labels.size == 1 else labels

    def _matrix(self):
        """The kernel as (groups, positions, inputs, units): other axes of inputs and units are positions."""
        value = np.moveaxis(array(self.kernel), [self.in_kernel, self.out_kernel], [-2, -1])
        value = value.reshape(-1, *value.shape[-2:])
        return np.moveaxis(value.reshape(*value.shape[:2], self.groups, -1), 2, 0)

    def _known(self):
        """The constant of each input channel, NaN where it is none."""
        return self.inputs[0].constants_along(self.axis, len(self.read))

    def _everywhere(self):
        """Whether each position of the output sees all of the kernel, so that constants may go into the bias."""
        layer = self.operation
        if isinstance(layer, keras.layers.EinsumDense):
            return np.prod(self.kernel.shape) == self.kernel.shape[self.in_kernel] * self.kernel.shape[self.out_kernel]
        size = getattr(layer, "kernel_size", None)
        plain = size is None or (isinstance(size, tuple) and all(n == 1 for n in size))
        return (plain and self.kind.positions == "outputs") or (
            self.kind.grouped and getattr(layer, "padding", "same") == "valid"
        )

    def _foldable(self):
        """Constants of the inputs that can go into the bias, 0 where they can not; zeros need not."""
        known = np.nan_to_num(self._known(), nan=0.0)
        possible = not self.shared and self.bias is not None and self._bias_axis() is not None and self._everywhere()
        return known if possible else np.zeros(len(known))

    def _gone(self):
        """Which input channels need not be multiplied: zeros, and constants that the bias can hold."""
        known = self._known()
        return (known == 0) | (~np.isnan(known) & (self._foldable() == known))

    def _can_lose(self, kept):
        if self._nonzero is None:
            self._nonzero = (self._matrix() != 0).any(axis=1)  # groups, inputs, units
        units = kept(self.made).reshape(self.groups, 1, -1)
        return ~(self._nonzero & units).any(axis=2).reshape(-1) | self._gone()

    def _why(self):
        known = self._known()
        if (~np.isnan(known) & (known != 0)).any():
            return f"{self.operation.name} has no place for a constant (no bias, or padding it would stand out from)"
        return f"{self.operation.name} reads it"

    def update_constants(self):
        self._nonzero = None
        super().update_constants()

    def find_constants(self):
        if self.fixed or self._bias_axis_missing():
            return
        gone, fold = self._gone(), self._foldable()
        matrix = self._matrix()
        units = []
        for g in range(self.groups):
            part = slice(g * matrix.shape[2], (g + 1) * matrix.shape[2])
            still = ~(matrix[g][:, ~gone[part]] != 0).any(axis=(0, 1))
            units.append(np.where(still, np.einsum("pio,i->o", matrix[g], fold[part]), np.nan))
        value = np.concatenate(units)
        if np.isnan(value).all():
            return
        if self.bias is not None:
            value = value + _along(array(self.bias), self._bias_axis())
        value = self._activated(value)
        self.outputs[0].constant = value.reshape(self.outputs[0].labels.shape)

    def _bias_axis_missing(self):
        return self.bias is not None and self._bias_axis() is None

    def _activated(self, value):
        if self._activation is None:
            return value
        if not self._apart:  # what is constant before it is none behind it
            return np.full(value.shape, np.nan)
        x = keras.ops.convert_to_tensor(np.nan_to_num(value)[None].astype("float32"))
        found = keras.ops.convert_to_numpy(self._activation(x))[0].astype("float64")
        return np.where(np.isnan(value), np.nan, found)

    def changed(self, kept):
        count = int(kept(self.made).sum())
        if count == len(self.made):
            return {}
        layer = self.operation
        if isinstance(layer, keras.layers.EinsumDense):
            shape = list(layer.get_config()["output_shape"])
            position = self.equation.outputs.index(self.unit) - len(self.equation.outputs)
            shape[position] = count
            return {"output_shape": tuple(shape)}
        return {} if self.kind.width is None else {self.kind.width: count}

    def weights(self, kept):
        values = super().weights(kept)
        if self.fixed or self.bias is None or self._bias_axis() is None:
            return values
        gone = ~kept(self.read) & self._gone()
        fold = np.where(gone, self._foldable(), 0.0)
        if fold.any():
            matrix = self._matrix()
            added = np.concatenate([
                np.einsum("pio,i->o", matrix[g], fold[g * matrix.shape[2] : (g + 1) * matrix.shape[2]])
                for g in range(self.groups)
            ])  # fmt: skip
            index = next(i for i, v in enumerate(self.operation.weights) if v is self.bias)
            shape = [1] * len(self.bias.shape)
            shape[self._bias_axis()] = -1
            added = added[kept(self.made)].reshape(shape)
            values[index] = (values[index].astype("float64") + added).astype(values[index].dtype)
        return values


def _along(value, axis):
    """A vector along an axis, if the value is the same along the others; NaN where it is not."""
    others = tuple(i for i in range(value.ndim) if i != axis)
    low, high = value.min(axis=others), value.max(axis=others)
    return np.where(low == high, low, np.nan)


def _axis_of(letters, letter, rank):
    """The axis that a letter of an equation stands for in a tensor of `rank` axes."""
    index = letters.index(letter)
    return index if "..." not in letters or index < letters.index(".") else index - len(letters) + rank


class Separable(Linear):
    """A depthwise convolution and a pointwise one in one layer."""

    def _sources(self, x, axis):
        self.depthwise = next(v for v in self.operation.weights if v.name == "depthwise_kernel")
        labels = self.classes.join_along(x.labels, axis)
        channels, self.multiplier = (int(n) for n in self.depthwise.shape[-2:])
        self.channels = np.broadcast_to(labels, channels) if labels.size == 1 else labels
        return np.repeat(self.channels, self.multiplier)

    def label(self):
        super().label()
        if not self.fixed:
            self.parts.insert(0, Part(self.depthwise, {len(self.depthwise.shape) - 2: self.channels}))

    def _known(self):
        return np.repeat(self.inputs[0].constants_along(self.axis, len(self.channels)), self.multiplier)

    def _everywhere(self):
        return False

    def _gone(self):
        silent = ~(array(self.depthwise) != 0).any(axis=tuple(range(len(self.depthwise.shape) - 2)))
        return super()._gone() | silent.reshape(-1)
