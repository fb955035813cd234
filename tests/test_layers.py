"""Gates around layers: the loss against NumPy, every kind of layer, every way to train."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparse as ks
from keras_sparse.layers import L0

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)

# Each: how to make the layer, the shape of its input, and the gates of "unit" for each kernel.
KINDS = {
    "Dense": (lambda: layers.Dense(5), (7,), [(7, 1)]),
    "Dense of rank 3": (lambda: layers.Dense(5), (3, 7), [(7, 1)]),
    "Conv1D": (lambda: layers.Conv1D(4, 3), (8, 3), [(1, 1, 4)]),
    "Conv2D": (lambda: layers.Conv2D(4, 3), (6, 6, 3), [(1, 1, 1, 4)]),
    "Conv2D groups": (lambda: layers.Conv2D(4, 3, groups=2), (6, 6, 2), [(1, 1, 1, 4)]),
    "Conv3D": (lambda: layers.Conv3D(4, 2), (4, 4, 4, 2), [(1, 1, 1, 1, 4)]),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 3), (4, 4, 3), [(1, 1, 4, 1)]),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 3), [(1, 1, 3, 2)]),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(4, 3), (6, 6, 3), [(1, 1, 1, 4)]),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cde->abde", (3, 2, 5), bias_axes="e"), (3, 7), [(7, 1, 1)]),
    "LSTM": (lambda: layers.LSTM(4), (5, 3), [(3, 1), (4, 1)]),
    "GRU": (lambda: layers.GRU(4, return_sequences=True), (5, 3), [(3, 1), (4, 1)]),
    "SimpleRNN": (lambda: layers.SimpleRNN(4), (5, 3), [(3, 1), (4, 1)]),
    "Bidirectional": (lambda: layers.Bidirectional(layers.GRU(2)), (5, 3), [(3, 1), (2, 1)] * 2),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(4)), (5, 3), [(3, 1)]),
}


def logistic(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


def numpy_penalty(layer):
    """The expected L0 norm times the price, from the definition: a gate for each weight, one by one."""
    total = 0.0
    for weight, log_alpha in zip(layer.kernels, layer.log_alphas, strict=True):
        value = np.broadcast_to(ks.selection.as_array(log_alpha), tuple(weight.variable.shape))
        total += logistic(value - 2 / 3 * math.log(0.1 / 1.1)).sum()
    return total * float(ks.selection.as_array(layer.penalty))


def scatter(layer, scale=3.0):
    """Spread the gates: some closed, some open, some between."""
    for log_alpha in layer.log_alphas:
        log_alpha.assign(np.clip(RNG.normal(0, scale, tuple(log_alpha.shape)), -4.6, 4.6))


def check_trains(model, x, y, gated):
    """Train, and check the noise: there in training, not in inference."""
    before = [ks.selection.as_array(v) for v in gated.log_alphas]
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    for old, new in zip(before, gated.log_alphas, strict=True):
        assert np.abs(ks.selection.as_array(new) - old).max() > 1e-4
    inference = [ops.convert_to_numpy(model(x, training=False)) for _ in range(2)]
    np.testing.assert_array_equal(*inference)
    training = [ops.convert_to_numpy(model(x, training=True)) for _ in range(2)]
    assert np.abs(training[0] - training[1]).max() > 1e-4


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thorough(6)
def test_every_kind_of_layer(kind, granularity, tmp_path):
    make, shape, units = KINDS[kind]
    gated = L0(make(), 1e-3, granularity, seed=1)
    model = keras.Sequential([keras.Input(shape), gated])
    expected = units if granularity == "unit" else [tuple(w.variable.shape) for w in gated.kernels]
    assert [tuple(v.shape) for v in gated.log_alphas] == expected
    assert float(ops.convert_to_numpy(sum(model.losses))) == pytest.approx(numpy_penalty(gated), rel=1e-6)
    assert gated.expected_l0() * 1e-3 == pytest.approx(numpy_penalty(gated), rel=1e-6)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = RNG.normal(size=(16, *shape)).astype("float32")
    y = RNG.normal(size=(16, *model.output_shape[1:])).astype("float32")
    check_trains(model, x, y, gated)
    scatter(gated)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(model.predict(x, verbose=0), loaded.predict(x, verbose=0), atol=1e-6)
    baked = ks.bake(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), baked.predict(x, verbose=0), atol=1e-5)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "SimpleRNNCell"])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_gates_around_a_cell_are_one_sample_for_all_time_steps(cell):
    gated = L0(getattr(layers, cell)(4), 1e-3, seed=1)
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layers.RNN(gated, return_sequences=True)(inputs))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = RNG.normal(size=(16, 5, 3)).astype("float32"), np.ones((16, 5, 4), "float32")
    assert float(ops.convert_to_numpy(sum(model.losses))) == pytest.approx(numpy_penalty(gated), rel=1e-6)
    state = ks.selection.as_array(gated.seed_generator.state)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert (ks.selection.as_array(gated.seed_generator.state) != state).any()
    inference = [ops.convert_to_numpy(model(x, training=False)) for _ in range(2)]
    np.testing.assert_array_equal(*inference)
    scatter(gated)
    np.testing.assert_allclose(model.predict(x, verbose=0), ks.bake(model).predict(x, verbose=0), atol=1e-5)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.lengthy(0)
def test_attention(granularity, tmp_path):
    gated = L0(layers.MultiHeadAttention(2, 3), 1e-3, granularity, seed=1)
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, gated(inputs, inputs))
    assert len(gated.log_alphas) == 4
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = RNG.normal(size=(16, 5, 6)).astype("float32"), np.ones((16, 5, 6), "float32")
    check_trains(model, x, y, gated)
    scatter(gated)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(model.predict(x, verbose=0), loaded.predict(x, verbose=0), atol=1e-6)
    np.testing.assert_allclose(model.predict(x, verbose=0), ks.bake(model).predict(x, verbose=0), atol=1e-5)


def test_sampled_count_of_nonzeros_is_the_expectation():
    gated = L0(layers.Dense(50, use_bias=False), 1.0, seed=3)
    gated.build((None, 40))
    scatter(gated)
    p = logistic(ks.selection.as_array(gated.log_alphas[0]) - 2 / 3 * math.log(0.1 / 1.1))
    gated.layer.kernel.assign(np.ones((40, 50)))
    samples = [next(value for _, value in gated.gated(True)) for _ in range(50)]
    counts = [np.count_nonzero(ops.convert_to_numpy(sample)) for sample in samples]
    assert abs(np.mean(counts) - gated.expected_l0()) <= 4 * np.sqrt((p * (1 - p)).sum() / 50)
    assert np.std(counts) > 0


def test_gradient_of_the_penalty_is_that_of_differences():
    gated = L0(layers.Dense(3), 0.5, "unit")
    gated.build((None, 4))
    start = np.array([[-2.0], [0.0], [1.0], [3.0]])
    gated.log_alphas[0].assign(start)
    p = logistic(start - 2 / 3 * math.log(0.1 / 1.1))
    # One SGD step of rate 1 on the penalty alone shows its gradient.
    model = keras.Sequential([keras.Input((4,)), gated])
    model.compile(keras.optimizers.SGD(1.0), "mse", loss_weights=0.0)
    model.fit(np.zeros((1, 4)), np.zeros((1, 3)), verbose=0)
    gradient = start - ks.selection.as_array(gated.log_alphas[0])

    def loss(value):
        gated.log_alphas[0].assign(value)
        return numpy_penalty(gated)

    for index in range(4):
        step = 1e-2 * np.eye(4)[:, [index]]
        difference = (loss(start + step) - loss(start - step)) / 2e-2
        assert gradient[index, 0] == pytest.approx(difference, rel=1e-3)
    np.testing.assert_allclose(gradient, 0.5 * 3 * p * (1 - p), rtol=1e-4)


def test_a_layer_used_twice_pays_once():
    gated = L0(layers.Dense(4, activity_regularizer=None), 1e-2)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, gated(gated(inputs)))
    assert len(model.losses) == 1
    model.compile("sgd", "mse")
    x = np.zeros((8, 4), "float32")
    assert model.evaluate(x, x, verbose=0) == pytest.approx(numpy_penalty(gated), rel=1e-6)


@pytest.mark.parametrize("twice", [False, True])
def test_regularizers_of_the_wrapped_layer_count_as_in_keras(twice):
    regularizers = {"kernel_regularizer": keras.regularizers.L2(0.1), "activity_regularizer": "l1"}
    gated, plain = L0(layers.Dense(4, **regularizers), 1e-2, open_probability=0.99), layers.Dense(4, **regularizers)
    x, losses = RNG.normal(size=(8, 4)).astype("float32"), []
    for layer in (gated, plain):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layer(layer(inputs)) if twice else layer(inputs))
        if layer is plain:
            plain.set_weights(gated.layer.get_weights())
        model.compile("sgd", "mse", loss_weights=0.0)
        losses.append(model.evaluate(x, x, verbose=0))
    assert losses[0] == pytest.approx(losses[1] + numpy_penalty(gated), rel=1e-5)


def test_filters_take_their_bias_along():
    gated = L0(layers.Conv2D(3, 2, bias_initializer="ones"), 1e-3, "unit")
    gated.build((None, 4, 4, 2))
    gated.log_alphas[0].assign(np.reshape([-4.6, 4.6, -4.6], (1, 1, 1, 3)))
    outputs = ops.convert_to_numpy(gated(np.zeros((1, 4, 4, 2), "float32")))
    np.testing.assert_array_equal(outputs[0, 0, 0], [0, 1, 0])


def test_log_alpha_is_clamped():
    gated = L0(layers.Dense(3), 100.0)
    model = keras.Sequential([keras.Input((4,)), gated])
    model.compile(keras.optimizers.SGD(10.0), "mse")
    model.fit(np.zeros((8, 4)), np.zeros((8, 3)), batch_size=1, verbose=0)
    np.testing.assert_allclose(ks.selection.as_array(gated.log_alphas[0]), -math.log(100), rtol=1e-6)
    assert (gated.gates()[0] == 0).all()


WAYS = {
    "plain": {},
    "jit": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "steps_per_execution": {"steps_per_execution": 2},
    "accumulation": {"optimizer": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)},
    "ema": {"optimizer": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)},
    "mixed_float16": {"policy": "mixed_float16"},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
}


def small_model(seed=1, granularity="unit"):
    inputs = keras.Input((6, 6, 2))
    x = L0(layers.Conv2D(4, 3, activation="relu", name="conv"), 1e-3, granularity, seed=seed)(inputs)
    x = L0(layers.Dense(6, "relu", name="body"), 1e-3, granularity, seed=seed)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(2, dtype="float32", name="head")(x))


X, Y = RNG.normal(size=(32, 6, 6, 2)).astype("float32"), RNG.normal(size=(32, 2)).astype("float32")


def train(how, seed=1):
    arguments = dict(WAYS[how])
    if BACKEND == "torch" and how in ("jit", "steps_per_execution"):
        pytest.skip("Keras compiles torch models for minutes, and has no steps_per_execution there")
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(arguments.pop("policy", "float32"))
    try:
        model = small_model(seed)
        optimizer = arguments.pop("optimizer", lambda: keras.optimizers.Adam(0.01))()
        model.compile(optimizer, "mse", **arguments)
        losses = model.fit(X, Y, batch_size=8, epochs=3, verbose=0, shuffle=False).history["loss"]
        return model, losses
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_ways_to_train(how, tmp_path):
    model, losses = train(how)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    gated = [layer for layer in model.layers if isinstance(layer, L0)]
    assert all(keras.backend.standardize_dtype(v.dtype) == "float32" for layer in gated for v in layer.log_alphas)
    tolerance = 2e-2 if "mixed" in how else 1e-5
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(ks.bake(model).predict(X, verbose=0), expected, atol=tolerance)
    if (how, BACKEND) != ("ema", "jax"):  # There Keras cannot: "Array has been deleted" (3.15), with no L0 either.
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras", compile=False)
        np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, atol=tolerance)
    same = train(how)[1]
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    if how == "plain":
        assert train(how, seed=2)[1] != losses


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_in_a_distribution_strategy(two_replicas):
    with two_replicas.scope():
        model = small_model()
        model.layers[1].penalty.assign(10.0)
        model.compile(keras.optimizers.Adam(1.0), "mse", jit_compile=False)
        model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
        gated = model.layers[1]
        assert (gated.gates()[0] == 0).all()
        for value in gated.log_alphas[0].value.values:
            np.testing.assert_allclose(value.numpy(), -math.log(100), rtol=1e-5)
        np.testing.assert_allclose(ks.bake(model).predict(X, verbose=0), model.predict(X, verbose=0), atol=1e-5)


def test_masks_pass_through():
    ids = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    inputs = keras.Input((4,), dtype="int32")
    gated = L0(layers.LSTM(3), 1e-3)
    model = keras.Model(inputs, gated(layers.Embedding(5, 4, mask_zero=True)(inputs)))
    gated.log_alphas[0].assign(np.full((4, 12), 4.6))
    gated.log_alphas[1].assign(np.full((3, 12), 4.6))
    plain = keras.Sequential([layers.Embedding(5, 4, mask_zero=True), layers.LSTM(3)])
    plain.build((None, 4))
    plain.set_weights([ks.selection.as_array(v) for v in (model.layers[1].weights[0], *gated.layer.weights[:3])])
    np.testing.assert_allclose(model.predict(ids, verbose=0), plain.predict(ids, verbose=0), atol=1e-6)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras keeps no states on JAX, with no L0 either")
def test_stateful_layer_keeps_its_state():
    gated = L0(layers.GRU(3, stateful=True), 1e-3)
    model = keras.Sequential([keras.Input(batch_shape=(2, 4, 3)), gated])
    scatter(gated)
    baked = ks.bake(model)
    x = RNG.normal(size=(2, 4, 3)).astype("float32")
    first, second = (model.predict(x, verbose=0) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_allclose([baked.predict(x, verbose=0) for _ in range(2)], [first, second], atol=1e-5)


@pytest.mark.lengthy(0)
def test_resume(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def fit(folder, *callbacks):
        keras.utils.set_random_seed(0)
        model = small_model()
        model.compile(keras.optimizers.Adam(0.01), "mse")
        backup = keras.callbacks.BackupAndRestore(tmp_path / folder)
        model.fit(X, Y, batch_size=8, epochs=4, shuffle=False, verbose=0, callbacks=[backup, *callbacks])
        return model

    whole = fit("a")
    with pytest.raises(KeyboardInterrupt):
        fit("b", Break())
    for ours, other in zip(fit("b").weights, whole.weights, strict=True):
        np.testing.assert_allclose(ks.selection.as_array(ours), ks.selection.as_array(other), atol=1e-5)


def test_bad_arguments():
    dense = layers.Dense(3)
    for penalty in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`penalty` must be at least 0 and finite. Received: penalty="):
            L0(dense, penalty)
    with pytest.raises(TypeError, match="`penalty` must be a number. Received: penalty='a'"):
        L0(dense, "a")
    with pytest.raises(ValueError, match="must be 'weight' or 'unit'. Received: granularity='units'"):
        L0(dense, 1, "units")
    for value in (0, 1, "a", True):
        with pytest.raises(ValueError, match="`open_probability` must be between 0 and 1. Received"):
            L0(dense, 1, open_probability=value)
    with pytest.raises(ValueError, match="`limits` must be a pair"):
        L0(dense, 1, limits=(0, 1))
    with pytest.raises(ValueError, match="`temperature` must be a positive"):
        L0(dense, 1, temperature=0)
    with pytest.raises(TypeError, match="`layer` must be a Keras layer. Received: 'dense' of type str"):
        L0("dense", 1)
    with pytest.raises(ValueError, match="`L0` around `L0` is not possible"):
        L0(L0(dense, 1), 1)
    with pytest.raises(ValueError, match="wraps a layer; `ks.add_l0"):
        L0(keras.Sequential([layers.Dense(3)]), 1)
    with pytest.raises(ValueError, match="A cell with dropout cannot be wrapped.*RNN"):
        L0(layers.LSTMCell(3, dropout=0.5), 1)


@pytest.mark.parametrize("layer", [layers.ReLU, layers.BatchNormalization, lambda: layers.Embedding(5, 2)])
def test_layers_without_a_kernel(layer):
    with pytest.raises(ValueError, match="`L0` needs a layer with a kernel.*Received"):
        L0(layer(), 1).build((None, 4))
