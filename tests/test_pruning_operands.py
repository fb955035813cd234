"""What kernels multiply: operands times the kernel's matrix view are the layer's outputs, for each kind of layer."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.pruning.operands import Moment, operands

L = keras.layers
LAYERS = {
    "dense": (lambda: L.Dense(5), (3, 4)),
    "dense on sequences": (lambda: L.Dense(5), (3, 6, 4)),
    "einsum": (lambda: L.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="de"), (3, 6, 4)),
    "einsum over two letters": (lambda: L.EinsumDense("abcd,cde->abe", (None, 5)), (3, 6, 2, 4)),
    "einsum that keeps a letter": (lambda: L.EinsumDense("abc,bcd->abd", (6, 5)), (3, 6, 4)),
    "einsum that sums a letter": (lambda: L.EinsumDense("abc,cd->ad", (5,)), (3, 6, 4)),
    "einsum with dots": (lambda: L.EinsumDense("...x,xy->...y", (6, 5)), (3, 6, 4)),
    "convolution": (lambda: L.Conv2D(5, (3, 2)), (2, 6, 7, 4)),
    "same": (lambda: L.Conv2D(5, (3, 2), padding="same"), (2, 6, 7, 4)),
    "strides": (lambda: L.Conv2D(5, 3, strides=(2, 3), padding="same"), (2, 8, 7, 4)),
    "dilation": (lambda: L.Conv2D(5, (3, 2), dilation_rate=(2, 3), padding="same"), (2, 8, 9, 4)),
    "groups": (lambda: L.Conv2D(6, 3, groups=2), (2, 6, 7, 4)),
    "1d, causal": (lambda: L.Conv1D(5, 3, padding="causal", dilation_rate=2), (2, 9, 4)),
    "3d": (lambda: L.Conv3D(5, (1, 3, 2), strides=(1, 2, 1)), (2, 4, 5, 3, 2)),
    "transposed": (lambda: L.Conv2DTranspose(5, 3, strides=2, padding="same"), (2, 4, 5, 3)),
    "transposed, valid": (lambda: L.Conv2DTranspose(5, (2, 3), strides=(3, 2)), (2, 4, 5, 3)),
    "1d, transposed": (lambda: L.Conv1DTranspose(5, 4, strides=2, padding="same"), (2, 4, 3)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, strides=2, depth_multiplier=2, padding="same"), (2, 6, 6, 4)),
    "1d, depthwise": (lambda: L.DepthwiseConv1D(3), (2, 6, 4)),
    "pointwise of separable": (lambda: L.SeparableConv2D(5, 3, padding="same", depth_multiplier=2), (2, 6, 7, 4)),
}


def linear_outputs(weight, pieces):
    """The outputs that operands make with a kernel, [positions, units]."""
    matrix = ks.patterns.to_matrix(weight.numpy(), weight.output_axes)
    groups = max(group for group, _, _ in pieces) + 1
    units = np.split(np.arange(len(matrix)), groups)
    parts = []
    for group, columns, x in pieces:
        part = matrix[units[group]]
        parts.append(x @ (part if columns is None else part[:, columns]).T)
    apart = pieces[0][1] is not None  # each position of a letter that kernel and outputs have in common
    return np.stack(parts, 1).reshape(-1, len(matrix)) if apart else np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", LAYERS)
def test_operands_times_kernel_are_the_outputs(name):
    make, shape = LAYERS[name]
    rng, layer = np.random.default_rng(0), make()
    x = rng.normal(size=shape).astype("float32")
    layer.build(shape)
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.get_weights()])
    expected = ks.selection.as_array(layer(x)) - (0 if layer.bias is None else ks.selection.as_array(layer.bias))
    weight = next(w for w in reversed(ks.graph.weights(layer)) if w.kernel)
    pieces = operands(layer, weight.variable.name, (keras.ops.convert_to_tensor(x),))
    found = linear_outputs(weight, pieces)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-3, atol=1e-4)

    moment = Moment(weight)
    moment.add(pieces)
    moment.add(pieces)
    slow = np.zeros_like(moment.matrices)
    for group, columns, x in pieces:
        place = np.zeros((len(x), slow.shape[1]))
        place[:, slice(None) if columns is None else columns] = x
        slow[group] += place.T @ place / len(pieces[0][2])
    np.testing.assert_allclose(moment.matrices, slow, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layer", [L.Conv2D(3, 2, data_format="channels_first")], ids=["convolution"])
def test_channels_first_is_channels_last_of_the_transposed_input(layer):
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6))
    layer.build(x.shape)
    last = L.Conv2D(3, 2)
    last.build(x.transpose(0, 2, 3, 1).shape)
    for (_, _, one), (_, _, other) in zip(
        operands(layer, "kernel", (x,)), operands(last, "kernel", (x.transpose(0, 2, 3, 1),)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_patches_are_those_of_keras():
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype("float32")
    layer = L.Conv2D(4, 3, strides=2, padding="same")
    layer.build(x.shape)
    patches = keras.ops.convert_to_numpy(keras.ops.image.extract_patches(x, 3, 2, padding="same"))
    np.testing.assert_allclose(operands(layer, "kernel", (x,))[0][2], patches.reshape(-1, 27), rtol=1e-6)


def test_rows_of_users_count_as_dense_and_unknown_layers_are_unknown():
    class Turned(L.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(5, shape[-1]), name="w")

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.w))

    layer, x = Turned(), np.ones((2, 4))
    layer.build(x.shape)
    assert operands(layer, "w", (x,)) is None
    kind = ks.graph.Kind("mixes", {"w": ks.graph.Kernel(outputs=(0,), inputs=(1,))}, linear=True)
    ks.graph.register_kind(Turned, kind)
    np.testing.assert_array_equal(operands(layer, "w", (x,))[0][2], x)
    cell = L.GRUCell(3, reset_after=False)
    cell.build((2, 4))
    assert operands(cell, "recurrent_kernel", (x, [np.ones((2, 3))])) is None
    assert operands(cell, "kernel", (x, [np.ones((2, 3))])) is not None


def test_a_part_of_many_positions_stands_for_all():
    layer = L.Conv2D(4, 1)
    x = np.random.default_rng(0).normal(size=(4, 128, 128, 3)).astype("float32")
    layer.build(x.shape)
    moment = Moment(ks.graph.weights(layer)[0])
    moment.add(operands(layer, "kernel", (x,)))
    rows = x.reshape(-1, 3)
    np.testing.assert_allclose(moment.matrices[0], rows.T @ rows / len(rows), atol=0.05)
