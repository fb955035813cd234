"""Which weights are selected, in every kind of layer and model."""

import keras
import numpy as np
import pytest
from keras import layers
from selected_models import OwnDense, Subclassed, selected, sequential

import keras_sparse as ks


@keras.saving.register_keras_serializable("tests")
class Custom(layers.Layer):
    """A rank-2 weight called `w`, a vector, a rank-2 bias, an embedding table, and a weight that is not trained."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 5), name="w")
        self.scale = self.add_weight(shape=(5,), name="scale")
        self.bias = self.add_weight(shape=(2, 5), name="bias")
        self.table = self.add_weight(shape=(7, 5), name="position_embedding")
        self.state = self.add_weight(shape=(5, 5), name="state", trainable=False)

    def call(self, x):
        return keras.ops.matmul(x, self.w) * self.scale + self.bias[0] + self.table[0]


LAYERS = {
    "Dense": (lambda: layers.Dense(4), (8,), ["kernel"]),
    "OwnDense": (lambda: OwnDense(4), (8,), ["kernel"]),
    "Conv1D": (lambda: layers.Conv1D(4, 3), (8, 2), ["kernel"]),
    "Conv2D": (lambda: layers.Conv2D(4, 3), (8, 8, 2), ["kernel"]),
    "Conv3D": (lambda: layers.Conv3D(4, 2), (4, 4, 4, 2), ["kernel"]),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 3), (8, 2), ["kernel"]),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 3), (8, 8, 2), ["kernel"]),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(4, 2), (4, 4, 4, 2), ["kernel"]),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(4, 3), (8, 2), ["pointwise_kernel"]),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(4, 3), (8, 8, 2), ["pointwise_kernel"]),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3), (8, 2), []),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3), (8, 8, 2), []),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (3, 5), bias_axes="d"), (3, 4), ["kernel"]),
    "MultiHeadAttention": (lambda: SelfAttention(), (3, 4), ["kernel"] * 4),
    "GroupQueryAttention": (lambda: SelfAttention(grouped=True), (3, 4), ["kernel"] * 4),
    "SimpleRNN": (lambda: layers.SimpleRNN(4), (3, 2), ["kernel", "recurrent_kernel"]),
    "LSTM": (lambda: layers.LSTM(4), (3, 2), ["kernel", "recurrent_kernel"]),
    "GRU": (lambda: layers.GRU(4), (3, 2), ["kernel", "recurrent_kernel"]),
    "Bidirectional": (lambda: layers.Bidirectional(layers.LSTM(4)), (3, 2), ["kernel", "recurrent_kernel"] * 2),
    "StackedRNN": (
        lambda: layers.RNN([layers.GRUCell(4), layers.LSTMCell(3)]),
        (3, 2),
        ["kernel", "recurrent_kernel"] * 2,
    ),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(4)), (3, 2), ["kernel"]),
    "ConvLSTM1D": (lambda: layers.ConvLSTM1D(4, 2), (3, 6, 2), ["kernel", "recurrent_kernel"]),
    "ConvLSTM2D": (lambda: layers.ConvLSTM2D(4, 2), (3, 6, 6, 2), ["kernel", "recurrent_kernel"]),
    "SpectralNormalization": (
        lambda: layers.SpectralNormalization(layers.Conv2DTranspose(4, 3)),
        (8, 8, 2),
        ["kernel"],
    ),
    "BatchNormalization": (layers.BatchNormalization, (4,), []),
    "LayerNormalization": (lambda: layers.LayerNormalization(axis=(1, 2)), (4, 3), []),
    "GroupNormalization": (lambda: layers.GroupNormalization(2), (4, 4), []),
    "PReLU": (lambda: layers.PReLU(), (4, 3), []),
    "Custom": (Custom, (8,), ["w"]),
}


class SelfAttention(layers.Layer):
    def __init__(self, grouped=False, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.GroupQueryAttention(2, 4, 2) if grouped else layers.MultiHeadAttention(2, 3)

    def build(self, shape):
        self.inner.build(shape, shape)

    def call(self, x):
        return self.inner(x, x)


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer(name):
    make, shape, expected = LAYERS[name]
    model = keras.Sequential([keras.Input(shape), make(), layers.Flatten(), layers.Dense(2, name="head")])
    found = selected(model)
    assert [w.variable.name for w in found] == [*expected, "kernel"]
    assert len(ks.selection.weights(model)) == len(model.weights)
    kernel = [w for w in found if "head" not in w.path]
    before = [v.numpy() for v in model.weights]
    if kernel:
        ks.prune(model, 0.5, filters=lambda variable: any(variable is w.variable for w in kernel))
    for weight in kernel:
        assert (weight.numpy() == 0).sum() == round(0.5 * weight.size)
    others = {id(w.variable) for w in kernel}
    for variable, value in zip(model.weights, before, strict=True):
        if id(variable) not in others:
            np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.thorough(8)
def test_training_with_each_kind_of_layer(name):
    make, shape, _ = LAYERS[name]
    model = keras.Sequential([keras.Input(shape), make(), layers.Flatten(), layers.Dense(2, name="head")])
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
    y = np.ones((8, 2), "float32")
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.6, begin=0, end=3)])
    for weight in selected(model):
        assert (weight.numpy() == 0).sum() == round(0.6 * weight.size)


def test_embeddings_and_depthwise_kernels_only_where_a_filter_names_them():
    table, depthwise = layers.Embedding(9, 4, name="table"), layers.DepthwiseConv1D(3, name="d")
    model = keras.Sequential([keras.Input((6,)), table, depthwise])
    reasons = {w.variable.name: w.skipped for w in ks.selection.weights(model)}
    assert "left dense unless a filter names it" in reasons["embeddings"]
    assert "left dense unless a filter names it" in reasons["kernel"]
    with pytest.raises(ValueError, match="nothing to prune"):
        ks.selection.select(model)
    assert [w.variable.name for w in selected(model, filters="table")] == ["embeddings"]
    assert [w.variable.name for w in selected(model, filters=["table", "d/"])] == ["embeddings", "kernel"]
    ks.prune(model, 0.5, filters=lambda variable: True)
    assert [(w.numpy() == 0).sum() for w in selected(model, filters=".")] == [18, 6]


OUTPUTS = {
    "Dense": (1,),
    "Conv2D": (3,),
    "Conv3D": (4,),
    "Conv1DTranspose": (1,),
    "Conv2DTranspose": (2,),
    "SpectralNormalization": (2,),
    "DepthwiseConv2D": (2, 3),
    "DepthwiseConv1D": (1, 2),
    "EinsumDense": (1,),
    "GRU": (1,),
    "ConvLSTM2D": (3,),
    "Custom": (1,),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_dead_units_are_units_whose_output_no_longer_depends_on_the_input(name):
    make, shape, _ = LAYERS[name]
    model = keras.Sequential([keras.Input(shape), make()])
    weight = next(w for w in ks.selection.weights(model) if w.kernel)
    assert weight.output_axes == OUTPUTS[name]
    value = weight.numpy() + 1.0
    index = [slice(None)] * value.ndim
    for axis in weight.output_axes:
        index[axis] = 0
    value[tuple(index)] = 0
    weight.variable.assign(value)
    assert weight.dead_units() == 1


# How many inputs a kernel has: of convolutions the channels, each group's own; of rank 2 the rows.
INPUTS = {
    "Dense": (lambda: layers.Dense(3), (4,), 4),
    "Conv1D": (lambda: layers.Conv1D(3, 2), (5, 4), 4),
    "Conv2D": (lambda: layers.Conv2D(6, 3), (5, 5, 4), 4),
    "Conv2D in groups": (lambda: layers.Conv2D(6, 3, groups=2), (5, 5, 4), 4),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), (5, 5, 4), 4),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2, depth_multiplier=3), (5, 5, 4), 4),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(3, 2), (5, 5, 4), 4),
    "SpectralNormalization": (lambda: layers.SpectralNormalization(layers.Conv2D(3, 2)), (5, 5, 4), 4),
    "EinsumDense": (lambda: layers.EinsumDense("abc,bcd->ad", (3,)), (2, 2), 4),
    "GRU": (lambda: layers.GRU(3), (5, 4), 4),
    "ConvLSTM2D": (lambda: layers.ConvLSTM2D(3, 2), (3, 5, 5, 4), 4),
}


@pytest.mark.parametrize("name", INPUTS)
def test_dead_inputs_are_inputs_on_which_no_output_depends(name):
    make, shape, inputs = INPUTS[name]
    model = keras.Sequential([keras.Input(shape), make()])
    weight = next(w for w in ks.selection.weights(model) if w.kernel)
    assert weight.dead_inputs() == 0
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    before = keras.ops.convert_to_numpy(model(x))
    value = weight.numpy()
    if name == "Conv2D in groups":
        value[:, :, 1, 3:] = 0  # What the second group reads as its channel 1 is channel 3,
        value[:, :, 0, 0] = 0  # and one filter of two that leaves a channel out leaves it alive.
        dead = 3
    else:
        axes = weight.input_axes
        assert np.prod([value.shape[axis] for axis in axes]) == inputs
        value[tuple(1 if axis in axes else slice(None) for axis in range(value.ndim))] = 0
        dead = np.s_[1, 1] if name == "EinsumDense" else 1
    weight.variable.assign(value)
    assert weight.dead_inputs() == 1
    index = (..., *dead) if isinstance(dead, tuple) else (..., dead)
    y = keras.ops.convert_to_numpy(model(x))
    x[index] += 10
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(x)), y)
    x[..., 0] += 10
    assert not np.allclose(keras.ops.convert_to_numpy(model(x)), before)
    value[:] = 0
    weight.variable.assign(value)
    assert weight.dead_inputs() == inputs


def test_biases_have_no_units():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    assert [(w.dead_units(), w.dead_inputs()) for w in ks.selection.weights(model)] == [(0, 0), (None, None)]


def test_dead_heads_of_attention():
    model = keras.Sequential([keras.Input((3, 4)), SelfAttention()])
    query, output = (next(w for w in ks.selection.weights(model) if key in w.path) for key in ("query/k", "output/k"))
    assert (query.output_axes, output.output_axes) == ((1, 2), (2,))
    assert (query.input_axes, output.input_axes) == ((0,), (0, 1))


def functional():
    inputs = keras.Input((12,))
    x = layers.Dense(6, activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Add()([x, layers.Dense(6)(x)])))


def nested():
    inner = keras.Sequential([keras.Input((12,)), layers.Dense(6), layers.Dense(6)])
    return keras.Sequential([keras.Input((12,)), keras.Sequential([keras.Input((12,)), inner]), layers.Dense(3)])


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 12), "float32"))
    return model


MODELS = {"sequential": sequential, "functional": functional, "nested": nested, "subclassed": subclassed}


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_models(name):
    model = MODELS[name]()
    model.compile("adam", "mse")
    x, y = np.random.default_rng(0).normal(size=(32, 12)).astype("float32"), np.ones((32, 3), "float32")
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.75)])
    assert [(w.numpy() == 0).sum() for w in selected(model)] == [54, 27, round(0.75 * 18)]
    assert history.history["sparsity"][-1] == pytest.approx((54 + 27 + 14) / 126, abs=0.01)
    assert len(ks.report(model).rows) == 6


def test_shared_layer_counts_once():
    shared = layers.Dense(4, name="shared")
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], layers.Dense(2, name="head")(layers.Add()([shared(a), shared(shared(b))])))
    assert [w.path for w in selected(model)] == ["shared/kernel", "head/kernel"]
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model.fit([x, x], np.ones((16, 2)), verbose=0, epochs=4, callbacks=[ks.callbacks.Pruning(0.5)])
    assert [(w.numpy() == 0).sum() for w in selected(model)] == [8, 4]


def test_repeated_paths_are_told_apart_by_the_variable():
    def branch():
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(4, name="same")(inputs))

    inputs = keras.Input((4,))
    model = keras.Model(inputs, branch()(branch()(inputs)))
    assert len({w.path for w in selected(model)}) == 1
    ks.prune(model, 0.5)
    assert [(w.numpy() == 0).sum() for w in selected(model)] == [8, 8]


def test_tied_weights_belong_to_the_layer_that_made_them():
    class Tied(layers.Layer):
        def __init__(self, embedding):
            super().__init__()
            self.embedding = embedding
            self.dense = layers.Dense(4)

        def call(self, x):
            return keras.ops.matmul(self.dense(self.embedding(x)), keras.ops.transpose(self.embedding.embeddings))

    model = keras.Sequential([keras.Input((3,), dtype="int32"), Tied(layers.Embedding(9, 4))])
    model(np.zeros((1, 3), "int32"))
    assert [w.variable.name for w in selected(model)] == ["kernel"]
