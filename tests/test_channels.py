import channel_graphs
import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks


@pytest.mark.parametrize("seed", range(6))
def test_generated_graphs(seed):
    channel_graphs.check(seed, 3)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 200, 20))
def test_more_generated_graphs(start):
    removed = sum(channel_graphs.check(seed)[0] for seed in range(start, start + 20))
    assert removed > 100


def test_the_generator_leaves_nothing_behind():
    # What was killed by zeros alone and can leave has left, and channels that cannot are named.
    model, _ = channel_graphs.graph_of(2)
    report = ks.channel_groups(model)
    assert report.totals["removable"] > 0
    assert all(row["reason"] for row in report.rows if row["dead"] > row["removable"])


def dense(units, **arguments):
    return layers.Dense(units, bias_initializer="random_normal", **arguments)


def zero(layer, units, bias=True):
    for v in layer.weights if bias else layer.weights[:1]:
        v.assign(np.where(np.isin(np.arange(v.shape[-1]), units), 0, ks.graph.as_array(v)))


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


X = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")


def test_a_constant_goes_into_the_next_bias():
    model = keras.Sequential([keras.Input((6,)), dense(5, activation="sigmoid"), dense(3)])
    zero(model.layers[0], [1, 3], bias=False)
    small = ks.shrink(model, verbose=0)
    assert isinstance(small, keras.Sequential)
    assert small.layers[0].units == 3
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


def test_a_constant_stays_where_a_padding_shows_it():
    stack = [keras.Input((6, 6, 2)), layers.Conv2D(4, 1, bias_initializer="ones"), layers.Conv2D(2, 3, padding="same")]
    model = keras.Sequential(stack)
    zero(model.layers[0], [0], bias=False)
    row = ks.channel_groups(model).rows[1]
    assert (row["dead"], row["removable"]) == (1, 0)
    assert "constant" in row["reason"]


def test_units_that_nobody_reads_leave_in_chains():
    model = keras.Sequential([keras.Input((6,)), dense(5), dense(4), dense(2)])
    last = model.layers[2].kernel
    last.assign(np.where(np.arange(4)[:, None] < 3, 0, ks.graph.as_array(last)))
    middle = model.layers[1].kernel
    middle.assign(np.where((np.arange(5)[:, None] < 2) & (np.arange(4) == 3), 0, ks.graph.as_array(middle)))
    small = ks.shrink(model, verbose=0)
    assert [layer.units for layer in small.layers] == [3, 1, 2]
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


def test_one_channel_is_left():
    model = keras.Sequential([keras.Input((6,)), dense(5), dense(3)])
    zero(model.layers[0], range(5))
    report = ks.channel_groups(model)
    assert report.rows[1]["removable"] == 4
    assert "last channel" in report.rows[1]["reason"]


def test_nothing_to_remove_is_said(capsys):
    model = keras.Sequential([keras.Input((6,)), dense(5), dense(3)])
    small = ks.shrink(model)
    assert "No channel is dead" in capsys.readouterr().out
    np.testing.assert_array_equal(outputs(small, X), outputs(model, X))


def test_round_to_puts_dead_channels_back():
    model = keras.Sequential([keras.Input((6,)), dense(32), dense(3)])
    zero(model.layers[0], range(11))
    small = ks.shrink(model, round_to=8, verbose=0)
    assert small.layers[0].units == 24
    again = ks.shrink(small, round_to=8, verbose=0)
    assert again.layers[0].units == 24
    with pytest.raises(ValueError, match="round_to=64"):
        ks.shrink(model, round_to=64)
    with pytest.raises(ValueError, match="whole number"):
        ks.shrink(model, round_to=0)


def optimizers():
    wrapped = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    return [
        keras.optimizers.Adam(0.01),
        keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5),
        keras.optimizers.RMSprop(0.01),
        wrapped,
    ]


@pytest.mark.parametrize("number", range(4))
def test_training_goes_on(number):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="x")
    body = layers.BatchNormalization(name="norm")(dense(8, name="body", kernel_regularizer="l2")(inputs))
    model = keras.Model(inputs, dense(2, name="head", trainable=number != 1)(layers.ReLU()(body)))
    model.compile(optimizers()[number], "mse", metrics=["mae"], run_eagerly=True)
    ks.prune(model, 0.5, pattern="channel", filters="body")
    y = np.random.default_rng(1).normal(size=(5, 2)).astype("float32")
    model.fit(X, y, verbose=0, epochs=2, callbacks=[ks.callbacks.KeepSparsity()])
    small = ks.shrink(model, verbose=0)
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]
    assert small.get_layer("body").units == 4
    assert small.get_layer("head").trainable == model.get_layer("head").trainable
    assert isinstance(small.get_layer("body").kernel_regularizer, keras.regularizers.L2)
    assert small.optimizer.iterations == model.optimizer.iterations
    for _ in range(2):  # the second step shows the state of the optimizer
        one, other = (m.train_on_batch(X, y, return_dict=True)["loss"] for m in (model, small))
        assert one == pytest.approx(other, rel=1e-4)
        ks.prune(model, {"body": 0.5}, pattern="channel")


def test_nested_and_shared_models():
    inputs = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), dense(8, activation="relu"), dense(6)], name="inner")
    model = keras.Model(inputs, dense(2)(layers.add([inner(inner(inputs)), inputs])))
    zero(inner.layers[0], [0, 5])
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("inner").layers[0].units == 6
    assert isinstance(small.get_layer("inner"), keras.Sequential)
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


class Net(keras.Model):
    def __init__(self, traced=True):
        super().__init__(name="net")
        self.one, self.two, self.traced = dense(8, activation="relu", name="one"), dense(2, name="two"), traced

    def call(self, x):
        h = self.one(x)
        return self.two(h if self.traced or float(keras.ops.sum(h)) > 0 else -h)


def test_subclassed_models_are_traced():
    model = Net()
    model(X)
    zero(model.one, [2])
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("one").units == 7
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


def test_subclassed_models_that_cannot_be_traced_are_refused():
    model = Net(traced=False)
    model.build((None, 6)) if keras.backend.backend() == "none" else model(X)
    with pytest.raises(ValueError, match="symbolic inputs.*'net'"):
        ks.shrink(model)


def test_unknown_layers_keep_their_channels():
    class Mine(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), name="w")

        def call(self, x):
            return x + self.w

    model = keras.Sequential([keras.Input((6,)), dense(4), Mine(name="mine"), dense(2)])
    zero(model.layers[0], [0])
    row = ks.channel_groups(model).rows[1]
    assert (row["dead"], row["removable"]) == (1, 0)
    assert "mine (Mine) has weights" in row["reason"]


def test_gates_are_to_be_baked_first():
    model = keras.Sequential([keras.Input((6,)), ks.layers.L0(dense(4, name="gated"), 1e-6), dense(2)])
    assert "bake" in ks.channel_groups(model).rows[0]["reason"]


def test_a_shared_weight_is_named():
    one, two = dense(6, name="one"), dense(6, name="two")
    x = keras.Input((6,))
    model = keras.Model(x, dense(2)(two(layers.ReLU()(one(x)))))
    two.kernel = one.kernel
    assert "share the weight" in ks.channel_groups(model).rows[0]["reason"]


def test_key_width_and_heads():
    rng = np.random.default_rng(0)
    x = keras.Input((5, 6))
    layer = layers.MultiHeadAttention(4, 6, bias_initializer="random_normal", name="attention")
    model = keras.Model(x, dense(2)(layer(x, x)))
    for inner, axis, gone in ((layer.query_dense, 2, [1, 4]), (layer.value_dense, 1, [0])):
        for v, own in zip(inner.weights, (axis, axis - 1), strict=True):
            index = np.isin(np.arange(v.shape[own]), gone).reshape([-1 if i == own else 1 for i in range(len(v.shape))])
            v.assign(np.where(index, 0, ks.graph.as_array(v)))
    small = ks.shrink(model, verbose=0)
    assert (small.get_layer("attention").num_heads, small.get_layer("attention").key_dim) == (3, 4)
    sample = rng.normal(size=(3, 5, 6)).astype("float32")
    np.testing.assert_allclose(outputs(small, sample), outputs(model, sample), rtol=1e-5, atol=1e-6)


def test_files_load_without_keras_sparse(tmp_path):
    model, x = channel_graphs.graph_of(3)
    small = ks.shrink(model, verbose=0)
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras", safe_mode=False)
    assert channel_graphs.difference(small, loaded, x) < 1e-6
    with pytest.raises(ValueError, match="not built"):
        ks.shrink(keras.Sequential([dense(3)]))
    with pytest.raises(TypeError, match="Keras 3 model"):
        ks.channel_groups("model.keras")
