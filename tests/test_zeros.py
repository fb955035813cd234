"""Which zeros count as pruned, and which are an initializer's."""

import gc

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks


@keras.saving.register_keras_serializable("tests_zeros")
class Dirac(keras.initializers.Initializer):
    """A convolution that passes on its input."""

    def __call__(self, shape, dtype=None):
        value = np.zeros(shape)
        value[tuple(size // 2 for size in shape[:-2])] = np.eye(*shape[-2:])
        return keras.ops.convert_to_tensor(value, dtype)


@keras.saving.register_keras_serializable("tests_zeros")
class Gates(keras.initializers.Initializer):
    """An identity for each gate."""

    def __call__(self, shape, dtype=None):
        return keras.ops.tile(keras.ops.eye(shape[0], dtype=dtype), (1, shape[1] // shape[0]))


class Inline(layers.Layer):
    """A weight whose initializer nobody keeps."""

    def __init__(self, shape, initializer):
        super().__init__()
        self.size, self.start = shape, [initializer]

    def build(self, shape):
        self.w = self.add_weight(shape=self.size, initializer=self.start.pop(), name="w")

    def call(self, x):
        return x + keras.ops.sum(self.w)


class Kept(layers.Layer):
    """A weight whose initializer has a name of its own."""

    def build(self, shape):
        self.how = keras.initializers.Constant(np.arange(64).reshape(8, 8) % 3)
        self.w = self.add_weight(shape=(8, 8), initializer=self.how, name="w")

    def call(self, x):
        return x + keras.ops.sum(self.w)


def delta(shape, dtype=None):
    value = np.zeros(shape)
    value[tuple((size - 1) // 2 for size in shape[:-2])] = np.linalg.qr(np.random.normal(size=shape[-2:]))[0]
    return keras.ops.convert_to_tensor(value, dtype)


def stacked(shape, dtype=None):
    return keras.ops.convert_to_tensor(np.broadcast_to(np.eye(*shape[-2:]), shape), dtype)


INITIAL = {
    "identity": (lambda: layers.Dense(8, kernel_initializer="identity"), (8,)),
    "wide identity": (lambda: layers.Dense(12, kernel_initializer="identity"), (8,)),
    "zeros": (lambda: layers.Dense(8, kernel_initializer="zeros"), (8,)),
    "scale of zero": (lambda: layers.Dense(8, kernel_initializer=keras.initializers.RandomNormal(0.0, 0.0)), (8,)),
    "IRNN": (lambda: layers.SimpleRNN(8, recurrent_initializer=keras.initializers.Identity(0.5)), (5, 8)),
    "gates": (lambda: layers.LSTM(8, recurrent_initializer=Gates()), (5, 8)),
    "Dirac": (lambda: layers.Conv2D(8, 3, kernel_initializer=Dirac()), (5, 5, 8)),
    "Dirac, separable": (lambda: layers.SeparableConv1D(8, 3, depthwise_initializer=Dirac()), (5, 8)),
    "Dirac, depthwise": (lambda: layers.DepthwiseConv2D(3, depthwise_initializer=Dirac()), (5, 5, 8)),
    "delta-orthogonal": (lambda: layers.Conv2D(8, 3, kernel_initializer=delta), (5, 5, 8)),
    "table": (lambda: layers.Embedding(8, 4, embeddings_initializer=keras.initializers.Constant(np.eye(8, 4))), (5,)),
    "attention": (lambda: layers.EinsumDense("abc,cde->abde", (3, 2, 4), kernel_initializer=keras_eye), (3, 8)),
    "inline identity": (lambda: Inline((8, 8), "identity"), (8,)),
    "inline gates": (lambda: Inline((8, 32), Gates()), (8,)),
    "inline zeros": (lambda: Inline((8, 32), "zeros"), (8,)),
    "inline Dirac": (lambda: Inline((3, 3, 8, 8), Dirac()), (8,)),
    "inline delta": (lambda: Inline((3, 8, 8), delta), (8,)),
    "inline stack": (lambda: Inline((3, 8, 8), stacked), (8,)),
    "kept": (Kept, (8,)),
}


def keras_eye(shape, dtype=None):
    return keras.ops.reshape(keras.ops.eye(shape[0], dtype=dtype), shape)


def zero_kernels(model):
    return [w for w in ks.selection.weights(model) if w.kernel and (w.numpy() == 0).any()]


@pytest.mark.parametrize("name", INITIAL)
def test_zeros_of_an_initializer_are_not_pruned(name):
    make, shape = INITIAL[name]
    model = keras.Sequential([keras.Input(shape), make()])
    [weight] = zero_kernels(model)
    assert not weight.pruned_zeros().any()
    assert ks.selection.pruned_weights(model) == []
    assert ks.report(model).notes == []
    # One zero more or less, and pruning has been there.
    value = weight.numpy()
    if value.any():
        value[tuple(np.argwhere(value)[0])] = 0
        weight.variable.assign(value)
        np.testing.assert_array_equal(weight.pruned_zeros(), value == 0)


@pytest.mark.parametrize("name", INITIAL)
def test_what_pruning_takes_of_them_is_known(name):
    make, shape = INITIAL[name]
    model = keras.Sequential([keras.Input(shape), make()])
    [weight] = zero_kernels(model)
    report = ks.prune(model, 0.5, filters=lambda variable: variable is weight.variable)
    assert [w.path for w in ks.selection.pruned_weights(model)] == [weight.path]
    assert weight.pruned_zeros().sum() == round(0.5 * weight.size)
    assert report.notes == []
    ks.prune(model, 0.75, filters=lambda variable: variable is weight.variable)
    assert weight.pruned_zeros().sum() == round(0.75 * weight.size)
    weight.variable.assign(np.ones(weight.variable.shape))
    assert not weight.pruned_zeros().any()


def test_an_irnn_is_pruned_to_what_was_asked():
    model = keras.Sequential(
        [keras.Input((6, 3)), layers.SimpleRNN(12, recurrent_initializer="identity"), layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).random((64, 6, 3)).astype("float32")
    model.fit(x, x.sum((1, 2)), epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])
    recurrent = model.layers[0].cell.recurrent_kernel
    assert (ks.selection.as_array(recurrent) == 0).sum() == 72
    # What came of it is pruned, also for those who did not see it.
    assert len(ks.selection.pruned_weights(keras.models.clone_model(model))) == 0
    assert recurrent.path in [w.path for w in ks.selection.pruned_weights(model)]


def test_kernels_that_lost_all_weights_are_pruned(tmp_path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(8)])
    model.layers[0].kernel.assign(np.zeros((8, 8)))
    model.save(tmp_path / "model.keras")
    for found in (model, keras.saving.load_model(tmp_path / "model.keras")):
        assert [w.layer.name for w in ks.selection.pruned_weights(found)] == [found.layers[0].name]


def test_emptied_by_pruning_in_spite_of_its_initializer():
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, kernel_initializer="zeros", name="a"), layers.Dense(8)]
    )
    model.layers[0].kernel.assign(np.full((8, 8), 1e-6))
    with pytest.warns(UserWarning, match="a/kernel has no weight left"):
        ks.prune(model, 0.6, allocation="global")
    assert model.layers[0].kernel.path in [w.path for w in ks.selection.pruned_weights(model)]


def test_pruned_weights_of_depthwise_kernels_embeddings_and_frozen_layers_by_filters():
    model = keras.Sequential(
        [keras.Input((6,)), layers.Embedding(9, 4, name="table"), layers.DepthwiseConv1D(3, name="d"), layers.Dense(4)]
    )
    ks.prune(model, 0.5, filters=model)
    model.layers[2].trainable = False
    found = ks.selection.pruned_weights(model)
    assert [w.layer.name for w in found] == ["table", "d", model.layers[2].name]
    assert [w.skipped for w in found] == [None] * 3 and [w.trainable for w in found] == [True, True, False]
    assert [w.layer.name for w in ks.selection.pruned_weights(model, ["d/", layers.Embedding])] == ["table", "d"]
    with pytest.raises(ValueError, match="matches no weight"):
        ks.selection.pruned_weights(model, "nothing")


def test_random_initializers_are_asked_without_a_trace():
    seed = keras.random.SeedGenerator(1)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, kernel_initializer=keras.initializers.HeNormal(seed=seed))]
    )
    state = ks.selection.as_array(seed.state)
    ks.prune(model, 0.5)
    assert len(ks.selection.pruned_weights(model)) == 1
    np.testing.assert_array_equal(ks.selection.as_array(seed.state), state)


def test_initializers_that_fail_are_not_asked():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
    ks.prune(model, 0.5)
    model.layers[0].kernel_initializer = lambda shape, dtype: 1 / 0
    assert ks.report(model).rows[0]["status"] == "pruned"


def test_memory_ends_with_the_variable():
    variable = keras.Variable(np.zeros(64))
    ks.zeros.remember(variable, np.arange(64) > 3)
    layer = layers.Layer()
    assert ks.zeros.pruned(np.zeros(64), variable, layer).sum() == 4
    value = np.zeros(64)
    value[0] = 1.0
    assert ks.zeros.pruned(value, variable, layer).sum() == 63  # It has got other values.
    gone = keras.Variable(np.zeros(64))
    key = id(gone)
    ks.zeros.remember(gone, np.zeros(64, bool))
    del gone
    gc.collect()
    assert key not in vars(ks.zeros)["_KEPT"]
