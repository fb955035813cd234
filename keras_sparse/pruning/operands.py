"""Operands are the vectors that a kernel multiplies: its layer's inputs, laid out as the kernel's matrix view."""

import itertools
import math

import keras
import numpy as np

from keras_sparse import graph, patterns

__all__ = ["Moment", "operands", "sampled"]

# Of each call of a layer, at most as many operands are looked at, or this many for each input, drawn at random.
# Neighbouring positions of an image are much alike.
_ROWS, _ROWS_PER_INPUT = 1 << 13, 16


class Moment:
    """The second moment E[x x^T] of the operands x of a kernel, for each group of output units that share them.

    Args:
        weight: The kernel, a `ks.graph.Weight`.

    Attributes:
        matrices: Float64 array [groups, inputs, inputs]; `None` before the first `add`.
        group_of: The group of each output unit, an array of ints.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> moment = ks.pruning.operands.Moment(ks.graph.weights(model)[0])
    >>> moment.add(ks.pruning.operands.operands(model.layers[0], "kernel", (np.array([[1.0, 0.0], [3.0, 2.0]]),)))
    >>> moment.matrices.tolist(), moment.group_of.tolist()
    ([[[5.0, 3.0], [3.0, 2.0]]], [0, 0, 0])
    """

    def __init__(self, weight):
        self._rows, self._inputs = patterns.to_matrix(weight.numpy(), weight.output_axes).shape
        self._sums, self._count, self.group_of = None, 0, None
        self._rng = np.random.default_rng(0)

    def add(self, pieces):
        """Take in operands, as `operands` returns them."""
        groups = max(group for group, _, _ in pieces) + 1
        if self._sums is None:
            self._sums = np.zeros((groups, self._inputs, self._inputs))
            self.group_of = np.arange(self._rows) * groups // self._rows
        for group, columns, matrix in pieces:
            rows, share = sampled([matrix], self._inputs, self._rng)
            square = (rows[0].T @ rows[0]) / share
            self._sums[group][slice(None) if columns is None else np.ix_(columns, columns)] += square
        self._count += len(pieces[0][2])

    @property
    def matrices(self):
        return None if self._sums is None else self._sums / max(self._count, 1)

    @property
    def finite(self):
        """Whether all numbers are."""
        return bool(np.isfinite(self.matrices).all())


def sampled(matrices, inputs, rng):
    """Some rows of matrices with as many, the same of each, as float64, and the share of all that they are.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.operands import sampled
    >>> rows, share = sampled([np.ones((20_000, 2))], 2, np.random.default_rng(0))
    >>> rows[0].shape, share
    ((8192, 2), 0.4096)
    """
    count, most = len(matrices[0]), max(_ROWS, _ROWS_PER_INPUT * inputs)
    if count > most:
        chosen = np.sort(rng.choice(count, most, replace=False))
        matrices = [matrix[chosen] for matrix in matrices]
    return [matrix.astype(np.float64) for matrix in matrices], min(1.0, most / max(count, 1))


def operands(layer, name, inputs):
    """Return what a kernel multiplies in one call of its layer.

    Args:
        layer: The layer.
        name: The kernel's name.
        inputs: The positional arguments of the call, tensors or arrays.

    Returns:
        List of `(group, columns, matrix)`: the output units of each group (as many in each, one group after the other)
        multiply these columns of their weights, all of them for `None`, by each row of the matrix. `None` if nobody
        knows what a layer of this kind multiplies.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layer = keras.layers.Conv1D(4, 2)
    >>> layer.build((None, 3, 1))
    >>> ks.pruning.operands.operands(layer, "kernel", (np.array([[[1.0], [2.0], [3.0]]]),))[0][2].tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    reads = next((_READS[one] for one in type(layer).__mro__ if one in _READS), {}).get(name)
    kind = graph.kind_of(layer)
    if reads is None and kind.linear and name in kind.kernels and kind.positions == "outputs":
        variable = getattr(layer, name, None)  # A row that a user has written, of a layer like Dense.
        reads = _dense if variable is not None and len(variable.shape) == 2 else None
    return None if reads is None else reads(layer, inputs)


def _array(value):
    array = keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)
    return array if array.dtype in (np.float32, np.float64) else array.astype("float32")


def _dense(layer, inputs):
    x = _array(inputs[0])
    return [(0, None, x.reshape(-1, x.shape[-1]))]


def _einsum(layer, inputs):
    """Letters that kernel, inputs and outputs have in common keep apart what is summed over the other ones."""
    equation, x = graph.Equation(layer.equation), _array(inputs[0])
    names, missing = equation.inputs, x.ndim - len(equation.inputs.replace("...", ""))
    if "..." in names:
        start = names.index("...")
        x = x.reshape(*x.shape[:start], -1, *x.shape[start + missing :])
        names = names.replace("...", ".")
    columns = [letter for letter in equation.kernel if letter in names]
    apart = [letter for letter in columns if letter in equation.outputs]
    summed = [letter for letter in columns if letter not in apart]
    alone = [letter for letter in names if letter not in equation.kernel and letter not in (*equation.outputs, ".")]
    x = x.sum(axis=tuple(names.index(letter) for letter in alone))
    names = [letter for letter in names if letter not in alone]
    free = [letter for letter in names if letter not in columns]
    sizes = {letter: x.shape[i] for i, letter in enumerate(names)}
    x = x.transpose([names.index(letter) for letter in (*apart, *free, *summed)])
    x = x.reshape(math.prod(sizes[i] for i in apart), -1, math.prod(sizes[i] for i in summed))
    if not apart:
        return [(0, None, x[0])]
    index = np.arange(x.shape[0] * x.shape[2]).reshape([sizes[letter] for letter in columns])
    index = index.transpose([columns.index(letter) for letter in (*apart, *summed)]).reshape(x.shape[0], -1)
    return [(0, index[i], x[i]) for i in range(len(x))]


def _convolution(layer, inputs):
    """The patches under the filters, those of each group of channels on their own."""
    return _by_channels(_patches(layer, _padded(layer, _channels_last(layer, inputs[0]))), layer.groups)


def _depthwise(layer, inputs):
    patches = _patches(layer, _padded(layer, _channels_last(layer, inputs[0])))
    return _by_channels(patches, patches.shape[-1])


def _pointwise(layer, inputs):
    between = keras.ops.depthwise_conv(
        keras.ops.convert_to_tensor(inputs[0], layer.compute_dtype),
        keras.ops.cast(layer.depthwise_kernel, layer.compute_dtype),
        strides=layer.strides,
        padding=layer.padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )
    x = _channels_last(layer, between)
    return [(0, None, x.reshape(-1, x.shape[-1]))]


def _transposed(layer, inputs):
    """Patches of the input with zeros in between, under filters that are turned round."""
    x = _channels_last(layer, inputs[0])
    reach = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    spread = np.zeros(
        (len(x), *((n - 1) * s + 1 for n, s in zip(x.shape[1:-1], layer.strides, strict=True)), x.shape[-1]), x.dtype
    )
    spread[(slice(None), *(slice(None, None, s) for s in layer.strides))] = x
    shape = layer.compute_output_shape(tuple(inputs[0].shape))
    sizes = shape[2:] if layer.data_format == "channels_first" else shape[1:-1]
    full = [n + r for n, r in zip(spread.shape[1:-1], reach, strict=True)]
    # Filters that are smaller than their strides leave some outputs out.
    pads = [(r, r + max(0, size - n)) for r, size, n in zip(reach, sizes, full, strict=True)]
    spread = np.pad(spread, [(0, 0), *pads, (0, 0)])
    windows = _windows(spread, layer.kernel_size, [1] * len(reach), layer.dilation_rate)
    cuts = [max(0, n - size) // 2 if layer.padding == "same" else 0 for n, size in zip(full, sizes, strict=True)]
    windows = windows[(slice(None), *(slice(cut, cut + n) for cut, n in zip(cuts, sizes, strict=True)))]
    rank = len(reach)
    return _by_channels(np.flip(windows, axis=tuple(range(1 + rank, 1 + 2 * rank))), 1)


def _by_channels(patches, groups):
    """Operands from patches [samples, *positions, *window, channels]."""
    rank = (patches.ndim - 2) // 2
    rows = math.prod(patches.shape[: 1 + rank])
    parts = np.split(patches, groups, axis=-1)
    return [(group, None, part.reshape(rows, -1)) for group, part in enumerate(parts)]


def _channels_last(layer, x):
    x = _array(x)
    return np.moveaxis(x, 1, -1) if layer.data_format == "channels_first" else x


def _padded(layer, x):
    if layer.padding == "valid":
        return x
    pads = []
    sizes = zip(x.shape[1:-1], layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for size, kernel, stride, dilation in sizes:
        reach = (kernel - 1) * dilation
        total = max(0, (-(-size // stride) - 1) * stride + reach + 1 - size)
        pads.append((reach, 0) if layer.padding == "causal" else (total // 2, total - total // 2))
    return np.pad(x, [(0, 0), *pads, (0, 0)])


def _patches(layer, x):
    return _windows(x, layer.kernel_size, layer.strides, layer.dilation_rate)


def _windows(x, kernel, strides, dilation):
    """Windows of an array [samples, *sizes, channels], [samples, *positions, *window, channels], without a copy."""
    rank = len(kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(1, 1 + rank)))
    view = np.moveaxis(view, 1 + rank, -1)
    steps = [slice(None, None, step) for step in itertools.chain(strides, dilation)]
    return view[(slice(None), *steps)]


def _state(cell, inputs):
    states = inputs[1]
    return _dense(cell, [states[0] if isinstance(states, (list, tuple)) else states])


def _gru_state(cell, inputs):
    # Else the last third of the columns multiplies a state that the reset gate has been at.
    return _state(cell, inputs) if cell.reset_after else None


_L = keras.layers
_READS = {
    _L.Dense: {"kernel": _dense},
    _L.EinsumDense: {"kernel": _einsum},
    **{layer: {"kernel": _convolution} for layer in (_L.Conv1D, _L.Conv2D, _L.Conv3D)},
    **{layer: {"kernel": _transposed} for layer in (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)},
    **{layer: {"kernel": _depthwise} for layer in (_L.DepthwiseConv1D, _L.DepthwiseConv2D)},
    **{
        layer: {"depthwise_kernel": _depthwise, "pointwise_kernel": _pointwise}
        for layer in (_L.SeparableConv1D, _L.SeparableConv2D)
    },
    **{layer: {"kernel": _dense, "recurrent_kernel": _state} for layer in (_L.SimpleRNNCell, _L.LSTMCell)},
    _L.GRUCell: {"kernel": _dense, "recurrent_kernel": _gru_state},
}
