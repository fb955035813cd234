"""Gates on channels: against NumPy, exact when baked and shrunk, one draw for all that a channel goes through."""

import channel_gates
import channel_graphs
import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.graph import as_array
from keras_sparse.layers import ChannelL0, gated_layers

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
VALUES = 5 if BACKEND == "jax" else 3  # Keras computes attention on JAX only with values as wide as keys: one width


def residual():
    """Sums, squeeze-and-excite, a depthwise convolution, a concatenation, and batch normalizations that shift."""
    inputs = keras.Input((6, 6, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same", name="stem")(inputs)))
    y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", name="body")(x))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(layers.Activation("sigmoid")(y))
    y = layers.BatchNormalization()(layers.Conv2D(6, 1, name="project")(y))
    scale = layers.Conv2D(4, 1, activation="relu", name="squeeze")(layers.GlobalAveragePooling2D(keepdims=True)(y))
    y = layers.Multiply()([y, layers.Conv2D(6, 1, activation="sigmoid", name="excite")(scale)])
    x = layers.Concatenate()([layers.Add()([x, y]), layers.Conv2D(5, 1, name="side")(x)])
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(layers.MaxPooling2D()(x))))


def attention():
    """Heads, the widths of keys and values, and a normalization that sums squares."""
    inputs = keras.Input((5, 8))
    x = layers.Dense(6, name="stem")(inputs)
    x = layers.Add()([x, layers.MultiHeadAttention(4, 5, value_dim=VALUES, name="attention")(x, x)])
    x = layers.RMSNormalization(name="norm")(layers.Dense(7, name="in")(x))
    x = layers.Dense(6, name="down")(layers.Dense(9, "gelu", name="up")(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


def recurrent():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both")(x)
    x = layers.GRU(5, return_sequences=True, name="gru")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.SimpleRNN(4, name="simple")(x)))


def nested():
    block = keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu"), layers.Dense(6)], name="block")
    inputs = keras.Input((6,))
    deep = keras.Model(inputs, layers.Add()([block(inputs), inputs]), name="deep")
    return keras.Sequential([keras.Input((4,)), layers.Dense(6), deep, layers.Dropout(0.5), layers.Dense(2)])


# What has gates: the channels that the model can lose, but for those of the embedding, which is left dense.
MODELS = {"residual": (residual, 6 + 8 + 4 + 5), "attention": (attention, 6 + 4 + 5 + VALUES % 5 + 7 + 9 + 6),
          "recurrent": (recurrent, 4 + 5 + 4), "nested": (nested, 6 + 5)}  # fmt: skip


def data(model, n=4):
    shape = (n, *model.input_shape[1:])
    return RNG.integers(0, 7, shape) if model.inputs[0].dtype == "int32" else RNG.normal(size=shape).astype("float32")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.lengthy(2)
def test_closed_gates_leave_without_a_trace(name):
    make, gates = MODELS[name]
    model = make()
    channel_graphs.randomise(model, RNG)
    assert 0 < channel_gates.check_gated(model, data(model), seed=1) < gates
    (layer,) = gated_layers(ks.add_l0(model, 1e-3, "channel"))
    assert [tuple(log_alpha.shape) for log_alpha in layer.log_alphas] == [(gates,)]


def test_what_would_be_a_constant_without_its_makers_has_no_gate():
    """Of a channel of zeros the sigmoid makes 0.5; before the normalization, a gate could only be where it is made."""
    inputs = keras.Input((6,))
    x = layers.Dense(5, name="in", use_bias=False)(inputs)
    y = layers.Activation("sigmoid")(layers.RMSNormalization(name="norm")(x))
    y = layers.Dense(4, "relu", name="up")(y)
    model = keras.Model(inputs, layers.Dense(2, name="head")(y))
    channel_graphs.randomise(model, RNG)
    assert 0 < channel_gates.check_gated(model, data(model), seed=1) <= 4
    gated = ks.add_l0(model, 1e-3, "channel")
    assert [tuple(log_alpha.shape) for log_alpha in gated_layers(gated)[0].log_alphas] == [(4,)]
    reasons = {row["path"]: row["reason"] for row in ks.report(gated).rows}
    assert "would not see zeros" in next(why for path, why in reasons.items() if "in/kernel" in path)


@pytest.mark.parametrize("seed", [0, 6, 9])
@pytest.mark.thorough(1)
def test_generated_graphs(seed):
    model, x = channel_graphs.graph_of(seed, 3)
    assert channel_gates.check_gated(model, x, seed) > 0


@pytest.mark.slow
@pytest.mark.parametrize("start", [200, 210])
def test_more_generated_graphs(start):
    pairs = ((*channel_graphs.graph_of(seed), seed) for seed in range(start, start + 10))
    assert sum(channel_gates.check_gated(*one) for one in pairs) > 40


def numbers(layer):
    """The parameters of the gates, P(gate != 0) and the gates of inference, by the paper's formulas."""
    (log_alpha,) = (as_array(x).astype("float64") for x in layer.log_alphas)
    some = 1 / (1 + np.exp(-(log_alpha - 2 / 3 * np.log(0.1 / 1.1))))
    return log_alpha, some, np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1)


def joined():
    """Two layers of one group, of which the second also reads it: two axes of its kernel have the same gates."""
    inputs = keras.Input((3,))
    x = layers.Dense(4, name="a")(inputs)
    x = layers.Add()([x, layers.Dense(4, "relu", name="b")(x)])
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def test_penalty_and_its_gradient_against_numpy():
    gated = ks.add_l0(joined(), 0.25, "channel", seed=3)
    channel_gates.close(gated, np.random.default_rng(2))
    (layer,) = gated_layers(gated)
    log_alpha, some, _ = numbers(layer)

    def expected(p):  # weights: 3 x 4 of a, those of b from one channel to another or the same, 4 x 2 of head
        return 3 * p.sum() + p.sum() ** 2 + (p - p**2).sum() + 2 * p.sum()

    assert layer.expected_l0() == pytest.approx(expected(some), rel=1e-5)
    assert float(keras.ops.convert_to_numpy(gated.losses[0])) == pytest.approx(0.25 * expected(some), rel=1e-5)
    slope = 0.25 * (5 + 2 * some.sum() + 1 - 2 * some) * some * (1 - some)
    optimizer = keras.optimizers.SGD(1.0)
    gated.compile(optimizer, loss=lambda y, out: 0.0 * keras.ops.mean(out, axis=-1))
    gated.fit(np.zeros((2, 3)), np.zeros((2, 2)), verbose=0)
    after = np.clip(log_alpha - slope, -np.log(100), np.log(100))
    np.testing.assert_allclose(as_array(layer.log_alphas[0]), after, rtol=1e-4, atol=1e-5)


def test_one_draw_for_all_readers_of_a_channel():
    inputs = keras.Input((3,))
    x = layers.Dense(40, kernel_initializer="ones", name="stem")(inputs)
    ends = [layers.Dense(40, kernel_initializer="identity", name=name)(x) for name in ("a", "b")]
    last = [layers.Dense(40, kernel_initializer="identity", name=f"last_{i}")(end) for i, end in enumerate(ends)]
    model = keras.Model(inputs, last)
    gated = ks.add_l0(model, 1e-3, "channel", filters="stem", seed=1)
    draws = [[keras.ops.convert_to_numpy(y) for y in gated(np.ones((2, 3)), training=True)] for _ in range(2)]
    for one, other in draws:
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[0], one[1])
        assert 0 < (one == 0).mean() < 0.5
    assert (draws[0][0] != draws[1][0]).any()
    assert [y.shape for y in gated.outputs] == [(None, 40)] * 2


def test_filters_and_reasons():
    model = residual()
    (layer,) = gated_layers(ks.add_l0(model, 1e-3, "channel", filters=["body", "side"]))
    assert layer.log_alphas[0].shape == (8 + 5,)
    rows = {row["path"]: row for row in ks.report(ks.add_l0(model, 1e-3, "channel", filters="body")).rows}
    assert rows["stem/kernel"]["reason"].endswith("/kernel makes them, too, and is left dense")
    assert rows["head/kernel"]["reason"].startswith("channels: an output of the model")
    (layer,) = gated_layers(ks.add_l0(recurrent(), 1e-3, "channel", filters=[".*"]))
    assert layer.log_alphas[0].shape == (4 + 4 + 5 + 4,)  # with the width of the embedding


def test_saved_trained_and_loaded_again(tmp_path):
    keras.utils.set_random_seed(0)
    model = residual()
    channel_graphs.randomise(model, RNG)
    x, y = data(model, 32), RNG.normal(size=(32, 3))
    gated = ks.add_l0(model, 1e-3, "channel", seed=0)
    gated.compile(keras.optimizers.Adam(0.05), "mse")
    history = gated.fit(x, y, epochs=3, verbose=0, callbacks=[ks.callbacks.L0Penalty()]).history
    channel_gates.close(gated, RNG)
    (layer,) = gated_layers(gated)
    assert history["expected_l0"][0] > history["expected_l0"][-1] > 0
    inner, first = (next(v for v in m.weights if v.name == "moving_mean") for m in (layer.layer, model))
    assert (as_array(inner) != as_array(first)).all()  # statistics are those of training
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    for copy in (loaded, keras.models.clone_model(gated)):
        copy.set_weights(gated.get_weights())
        assert channel_graphs.difference(gated, copy, x) < 1e-6
    assert channel_graphs.difference(ks.bake(gated), ks.bake(loaded), x) < 1e-6
    before = layer.expected_l0()
    loaded.fit(x, y, verbose=0)
    assert gated_layers(loaded)[0].expected_l0() != before


def test_logs_are_those_of_the_baked_model():
    gated = ks.add_l0(joined(), 1e-9, "channel")
    channel_gates.close(gated, np.random.default_rng(1))
    gated.compile(keras.optimizers.SGD(0.0), "mse")
    log = gated.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[ks.callbacks.L0Penalty()]).history
    closed = int((numbers(gated_layers(gated)[0])[2] == 0).sum())
    zeros = 3 * closed + 16 - (4 - closed) ** 2 + 2 * closed
    assert 0 < closed < 4
    assert log["sparsity"][-1] == pytest.approx(zeros / 36)
    assert ks.report(ks.bake(gated)).totals["zeros"] == zeros
    share = gated_layers(gated)[0].shares(lambda log_alpha: numbers(gated_layers(gated)[0])[2] == 0)
    assert [round(weight.size * one) for weight, one in share] == [3 * closed, 16 - (4 - closed) ** 2, 2 * closed]


def test_several_outputs_keep_their_names():
    inputs = keras.Input((3,), name="x")
    x = layers.Dense(5, "relu")(inputs)
    model = keras.Model({"x": inputs}, {"u": layers.Dense(2, name="u")(x), "v": layers.Dense(1, name="v")(x)})
    model.compile("adam", {"u": "mse", "v": "mae"}, metrics={"v": ["mae"]}, run_eagerly=True)
    gated = ks.add_l0(model, 1e-3, "channel", seed=0)
    x, y = {"x": np.ones((4, 3))}, {"u": np.ones((4, 2)), "v": np.ones((4, 1))}
    assert gated.compiled and gated.output_names == model.output_names
    names = model.fit(x, y, verbose=0).history.keys()
    assert gated.fit(x, y, verbose=0).history.keys() == names
    baked = ks.bake(gated)
    assert baked.fit(x, y, verbose=0).history.keys() == names
    assert [layer.name for layer in baked.layers] == [layer.name for layer in model.layers]
    # Of a part of the outputs the whole is no copy.
    part = ks.bake(keras.Model(gated.inputs, gated.output["u"]))
    assert len(part.outputs) == 1 and not gated_layers(part)


def test_around_it_there_may_be_more():
    gated = ks.add_l0(nested(), 1e-3, "channel", seed=0)
    channel_gates.close(gated, RNG)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(gated(layers.Rescaling(2.0)(inputs))))
    assert channel_graphs.difference(model, ks.bake(model), data(model)) < 1e-6


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.lengthy(0)
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = residual()
        gated = ks.add_l0(model, 1e-3, "channel", seed=0)
        gated.compile("adam", "mse")
        x = data(model)
        loss = gated.fit(x, np.zeros((4, 3)), epochs=2, verbose=0).history["loss"]
        assert np.isfinite(loss).all()
        assert all(v.dtype == "float32" for v in gated.trainable_variables)
        channel_gates.close(gated, RNG)
        assert channel_graphs.difference(gated, ks.bake(gated), x) < 0.02
    finally:
        keras.config.set_dtype_policy("float32")


def test_masks_reach_the_loss():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.SimpleRNN(5, return_sequences=True)(layers.Embedding(7, 3, mask_zero=True)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile("sgd", "mse")
    gated = ks.add_l0(model, 0.0, "channel", open_probability=1 - 1e-6)
    x, y = np.array([[1, 2, 0, 0], [3, 0, 0, 0]]), np.ones((2, 4, 1))
    y[:, 2:] = 1000
    assert gated.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


def test_bad_arguments():
    model = joined()
    with pytest.raises(ValueError, match="have one price: give `penalty` as a number"):
        ks.add_l0(model, {"a/": 1e-3}, "channel")
    with pytest.raises(ValueError, match="No channel can leave the model.*an output of the model"):
        ks.add_l0(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), 1e-3, "channel")
    with pytest.raises(ValueError, match="`open_probability` must be between"):
        ks.add_l0(model, 1e-3, "channel", open_probability=1)
    with pytest.raises(ValueError, match="`penalty` must be at least 0"):
        ks.add_l0(model, -1e-3, "channel")
    gated = ks.add_l0(model, 1e-3, "channel")
    with pytest.raises(ValueError, match="has `L0` layers already"):
        ks.add_l0(gated, 1e-3, "channel")
    with pytest.raises(ValueError, match="holds a layer with gates already|has gates already"):
        ks.layers.L0(gated_layers(gated)[0], 1e-3)
    assert any("`ks.bake` the model first" in note for note in ks.channel_groups(gated).notes)
    assert isinstance(gated_layers(ks.shrink(gated, verbose=0))[0], ChannelL0)


def test_channels_that_must_stay_have_no_gate():
    inputs = keras.Input((4, 6))
    x = layers.LayerNormalization()(layers.Dense(5, name="stem")(inputs))
    x = layers.Softmax()(layers.Dense(7, name="soft")(x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Dense(3, name="body")(x)))
    gated = ks.add_l0(model, 1e-3, "channel")
    assert gated_layers(gated)[0].log_alphas[0].shape == (3,)
    reasons = {row["path"]: row["reason"] for row in ks.report(gated).rows}
    assert "LayerNormalization" in reasons["stem/kernel"] and "softmax" in reasons["soft/kernel"]
    assert not reasons["body/kernel"]


@pytest.mark.slow
def test_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = images.reshape(-1, 8, 8, 1).astype("float32") / 16, labels
    train, test = (x[:1400], y[:1400]), (x[1400:], y[1400:])
    keras.utils.set_random_seed(0)
    model = digits_network()
    model.compile(keras.optimizers.Adam(0.004), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*train, 50, 10, verbose=0)
    dense = model.evaluate(*test, verbose=0)[1]
    gated = ks.add_l0(model, 1e-4, "channel", open_probability=0.8, seed=0)
    adam = keras.optimizers.Adam
    rates = keras.optimizers.OptimizerMap(adam(0.004), {".*log_alpha": adam(0.15)})
    gated.compile(keras.optimizers.MultiOptimizer(rates), "sparse_categorical_crossentropy")
    gated.fit(*train, 50, 24, verbose=0, callbacks=[ks.callbacks.L0Penalty(target_sparsity=0.65, end=0.7)])
    small, report = ks.shrink(ks.bake(gated), verbose=0, return_report=True)
    free = 8 + 12 + 12
    assert 0.35 * free <= report.totals["removable"] <= 0.65 * free
    small.compile(keras.optimizers.Adam(0.002), "sparse_categorical_crossentropy", metrics=["accuracy"])
    small.fit(*train, 50, 4, verbose=0)
    after = small.evaluate(*test, verbose=0)[1]
    assert dense > 0.9
    assert after > dense - 0.02, (after, dense, report.totals)
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="Fold the gates in first"):
            ks.tflite.export(gated, "never.tflite")


def digits_network():
    inputs = keras.Input((8, 8, 1))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(layers.Conv2D(8, 3, padding="same", name="stem")(inputs)))
    for i in range(2):
        y = layers.Conv2D(12, 3, padding="same", name=f"a{i}")(x)
        y = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(y))
        y = layers.BatchNormalization(momentum=0.9)(layers.Conv2D(8, 3, padding="same", name=f"b{i}")(y))
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.Dense(10, "softmax", name="head")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)
