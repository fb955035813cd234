import channel_graphs
import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.thorough(1)
def test_generated_graphs(seed):
    channel_graphs.check_shrunk(seed, 3)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="channels first are drawn on other backends")
def test_a_generated_graph_that_once_cost_more_than_promised():
    channel_graphs.check_shrunk(20009)  # ConvLSTM2D with channels first


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 180, 20))
@pytest.mark.thorough(2)
def test_more_generated_graphs(start):
    removed = sum(channel_graphs.check_shrunk(seed)[0] for seed in range(start, start + 20))
    assert removed > 40


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


def optimizer(number):
    if number == 1:
        return keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5)
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))


@pytest.mark.parametrize("number", [1, 3])
def test_training_goes_on(number):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="x")
    body = layers.BatchNormalization(name="norm")(dense(8, name="body", kernel_regularizer="l2")(inputs))
    model = keras.Model(inputs, dense(2, name="head", trainable=number != 1)(layers.ReLU()(body)))
    model.compile(optimizer(number), "mse", metrics=["mae"], run_eagerly=keras.backend.backend() != "jax")
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
        return self.two(h if self.traced or keras.ops.convert_to_numpy(keras.ops.sum(h)) > 0 else -h)


def test_subclassed_models_are_traced():
    model = Net()
    model(X)
    zero(model.one, [2])
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("one").units == 7
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


def test_subclassed_models_that_cannot_be_traced_are_refused():
    model = Net(traced=False)
    model(X)
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


class Tied(layers.Dense):
    """Multiplies by another layer's kernel."""

    def __init__(self, other, **arguments):
        super().__init__(other.units, **arguments)
        self.other = other

    def build(self, shape):
        self._kernel = self.other.kernel
        self.bias = self.add_weight(shape=(self.units,), name="bias")
        self.built = True

    @property
    def kernel(self):
        return self._kernel


def test_a_shared_weight_is_named():
    one, x = dense(6, name="one"), keras.Input((6,))
    hidden = one(x)
    model = keras.Model(x, dense(2)(Tied(one, name="two")(layers.ReLU()(hidden))))
    assert any("one and two share the weight" in row["reason"] for row in ks.channel_groups(model).rows)


def test_key_width_and_heads():
    rng = np.random.default_rng(0)
    x = keras.Input((5, 6))
    layer = layers.MultiHeadAttention(4, 6, bias_initializer="random_normal", name="attention")
    model = keras.Model(x, dense(2)(layer(x, x)))
    together = keras.backend.backend() == "jax"  # there keys and values must have the same width
    widths = ((layer.query_dense, 2, [1, 4]), *([(layer.value_dense, 2, [1, 4])] if together else []))
    for inner, axis, gone in (*widths, (layer.value_dense, 1, [0])):
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


def residual():
    inputs = keras.Input((6,))
    stem = dense(12, activation="relu", name="stem")(inputs)
    body = dense(20, activation="relu", name="body")(stem)
    body = layers.BatchNormalization(name="norm")(dense(12, name="project")(body))
    model = keras.Model(inputs, dense(3, activation="softmax", name="head")(layers.add([stem, body])))
    channel_graphs.randomise(model, np.random.default_rng(0))
    return model


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_pruned_channels_go_in_all_layers_of_a_group(criterion):
    model = residual()
    ks.prune(model, 0.5, pattern="channel", criterion=criterion)
    report = ks.channel_groups(model)
    assert {row["group"]: row["removable"] for row in report.rows if row["removable"]} == {"stem": 6, "body": 10}
    dead = [~ks.graph.as_array(model.get_layer(n).kernel).any(axis=0) for n in ("stem", "project")]
    np.testing.assert_array_equal(dead[0], dead[1])
    assert not ks.graph.as_array(model.get_layer("norm").beta)[dead[0]].any()
    small = ks.shrink(model, verbose=0)
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


def test_global_compares_groups_of_different_scale():
    model = keras.Sequential([keras.Input((6,)), dense(16), dense(16), dense(16), dense(2)])
    for layer, scale in zip(model.layers, (1.0, 1e-3, 1e3, 1.0), strict=True):
        layer.kernel.assign(layer.kernel * scale)
    ks.prune(model, 0.5, pattern="channel", allocation=ks.pruning.Global(floor=3), filters=model.layers[:3])
    gone = [row["removable"] for row in ks.channel_groups(model).rows[1:4]]
    assert sum(gone) == 24
    assert all(4 <= n <= 13 for n in gone)  # none is emptied because its weights are small
    with pytest.raises(ValueError, match="Lower one of them"):
        ks.prune(model, 0.5, pattern="channel", allocation=ks.pruning.Global(floor=12))


def test_groups_of_which_a_part_is_left_dense_lose_zeros_but_no_channels():
    model = residual()
    report = ks.prune(model, {"stem": 0.5}, pattern="channel")
    assert {row["path"].split("/")[0] for row in report.rows if row["status"] == "pruned"} == {"stem"}
    assert ks.channel_groups(model).totals["removable"] == 0
    with pytest.raises(ValueError, match="project/kernel makes them, too, and is left dense"):
        ks.prune(model, ks.Budget(macs=0.5), pattern="channel", filters="stem")


@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("amount", [{"macs": 0.5}, {"parameters": 250}, {"bytes": 0.8, "macs": 0.9}])
def test_budgets_are_met_by_a_channel(allocation, amount):
    model = residual()
    whole = ks.channel_groups(model).totals
    ks.prune(model, ks.Budget(**amount), pattern="channel", allocation=allocation)
    small = ks.shrink(model, verbose=0)
    left = ks.channel_groups(small).totals | {"bytes": 4 * small.count_params()}
    limits = ks.Budget(**amount).limits(whole | {"bytes": 4 * whole["parameters"]})
    assert all(left[name] <= limit for name, limit in limits.items())
    # No channel too many: with the dearest one of each group the budget would be overdrawn.
    room = {"macs": 2 * 38, "parameters": 2 * 42, "bytes": 2 * 168}
    assert any(left[name] > limit - room[name] for name, limit in limits.items())


def test_budgets_that_cannot_be():
    with pytest.raises(ValueError, match=r"with one channel of each group.*macs of at least"):
        ks.prune(residual(), ks.Budget(macs=3), pattern="channel")
    with pytest.raises(ValueError, match="pattern='channel'"):
        ks.prune(residual(), ks.Budget(macs=0.5))
    with pytest.raises(ValueError, match="share in"):
        ks.Budget(macs=1.5)
    with pytest.raises(ValueError, match="needs `macs`"):
        ks.Budget()
    with pytest.raises(TypeError, match="must be a number"):
        ks.Budget(bytes="much")


def test_a_fit_ends_at_its_budget():
    model = residual()
    model.compile("adam", "mse", run_eagerly=keras.backend.backend() != "jax")
    pruning = ks.callbacks.Pruning(ks.Budget(macs=0.5), pattern="channel", allocation="global", frequency=1)
    pruning = ks.callbacks.Pruning.from_config(pruning.get_config())
    y = np.ones((5, 3), "float32")
    model.fit(X, y, batch_size=1, epochs=2, verbose=0, callbacks=[pruning])
    assert pruning.finished
    small, report = ks.shrink(model, verbose=0, return_report=True)
    assert 0.4 < report.totals["macs_left"] / report.totals["macs"] <= 0.5
    np.testing.assert_allclose(outputs(small, X), outputs(model, X), rtol=1e-5, atol=1e-6)


def test_recurrent_units_and_heads_are_pruned():
    x = keras.Input((5, 6))
    y = layers.LSTM(8, return_sequences=True, name="lstm")(x)
    y = layers.MultiHeadAttention(4, 6, name="attention")(y, y)
    model = keras.Model(x, dense(2)(layers.GRU(6, name="gru")(y)))
    ks.prune(model, 0.5, pattern="channel", filters=["lstm", "attention", "gru"])
    small = ks.shrink(model, verbose=0)
    attention = small.get_layer("attention")
    assert (small.get_layer("lstm").units, attention.num_heads, attention.key_dim) == (4, 2, 3)
    assert small.get_layer("gru").units == 3
    sample = np.random.default_rng(0).normal(size=(3, 5, 6)).astype("float32")
    np.testing.assert_allclose(outputs(small, sample), outputs(model, sample), rtol=1e-5, atol=1e-6)
