"""Copies with gates, and copies without: the same names, the same numbers, and nothing of keras_sparse in the file."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.layers import L0, gated_layers

BACKEND = keras.backend.backend()


def functional():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    shared = layers.Dense(16, "tanh", name="shared")
    x = layers.Add()([shared(x), shared(x * 2)])
    return keras.Model(inputs, {"a": layers.Dense(3, "softmax", name="a")(x), "b": layers.Dense(1, name="b")(x) + 1})


def nested():
    block = keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu", name="in"), layers.Dense(6)], name="block")
    inputs = keras.Input((6,))
    deep = keras.Model(inputs, block(block(inputs)) + inputs, name="deep")
    return keras.Sequential([keras.Input((6,)), deep, layers.Dropout(0.5), layers.Dense(2, name="head")])


def recurrent():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="both")(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.TimeDistributed(layers.Dense(4), name="each")(x)
    return keras.Model(inputs, layers.RNN(layers.GRUCell(3), name="last")(x))


MODELS = {"functional": functional, "nested": nested, "recurrent": recurrent}


def data(model, n=16):
    shape = (n, *model.input_shape[1:])
    rng = np.random.default_rng(0)
    return rng.integers(0, 7, shape) if model.inputs[0].dtype == "int32" else rng.normal(size=shape).astype("float32")


def check_same(model, other, x, atol=1e-5):
    ours, theirs = (keras.tree.flatten(m.predict(x, verbose=0)) for m in (model, other))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def close(model, share=0.6, seed=0):
    """Close a share of the gates, let the others be somewhere between, and give all weights some value."""
    rng = np.random.default_rng(seed)
    for layer in gated_layers(model):
        for log_alpha in layer.log_alphas:
            shape = tuple(log_alpha.shape)
            log_alpha.assign(np.where(rng.uniform(size=shape) < share, -4.6, rng.uniform(-2, 4.6, shape)))
        for variable in layer.layer.weights:
            if len(variable.shape) == 1:
                variable.assign(rng.normal(size=variable.shape))


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.thorough(2)
@pytest.mark.lengthy(1)
def test_add_and_bake(name, granularity, tmp_path):
    model = MODELS[name]()
    x = data(model)
    gated = ks.add_l0(model, 1e-3, granularity, open_probability=0.999, seed=2)
    assert [layer.name for layer in gated.layers] == [layer.name for layer in model.layers]
    assert getattr(gated, "output_names", None) == getattr(model, "output_names", None)
    assert gated_layers(gated) and not gated_layers(model)
    check_same(model, gated, x)  # Gates that are open for sure are exactly 1.
    close(gated)
    baked = ks.bake(gated)
    assert not gated_layers(baked)
    check_same(gated, baked, x)
    assert [layer.name for layer in baked.layers] == [layer.name for layer in model.layers]
    assert [v.name for v in baked.weights] == [v.name for v in model.weights]
    for variable in baked.weights:
        value = ks.selection.as_array(variable)
        assert not np.signbit(value[value == 0]).any()
    rows = {row["path"]: row for row in ks.report(baked).rows}
    closed = sum(bool((gate == 0).any()) for layer in gated_layers(gated) for gate in layer.gates())
    assert sum(row["status"] == "pruned" for row in rows.values()) >= closed > 0
    baked.save(tmp_path / "baked.keras")
    np.savez(tmp_path / "io.npz", x, *keras.tree.flatten(baked.predict(x, verbose=0)))
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        assert not name.startswith("keras_sparse"), name
sys.meta_path.insert(0, Block())
import keras, numpy as np
model = keras.saving.load_model({str(tmp_path / "baked.keras")!r})
x, *expected = np.load({str(tmp_path / "io.npz")!r}).values()
for a, b in zip(keras.tree.flatten(model.predict(x, verbose=0)), expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
"""
    if granularity == "unit":
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.lengthy(0)
def test_compiled_models_stay_compiled():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(2, name="head")])
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    x, y = data(model), np.ones((16, 2))
    gated = ks.add_l0(model, 1e-3)
    assert gated.fit(x, y, verbose=0).history.keys() == {"loss", "mean_absolute_error"} or gated.optimizer
    assert float(gated.optimizer.learning_rate) == pytest.approx(0.02)
    baked = ks.bake(gated)
    mae = gated.evaluate(x, y, verbose=0, return_dict=True)
    for name, value in baked.evaluate(x, y, verbose=0, return_dict=True).items():
        if name != "loss":  # That of the gated model has the penalty in it.
            assert value == pytest.approx(mae[name], rel=1e-5)
    baked.fit(x, y, verbose=0)
    uncompiled = ks.bake(ks.add_l0(nested(), 1e-3))
    assert not uncompiled.compiled


def test_prices_and_filters():
    gated = ks.add_l0(nested(), {"in/": 0.1, "head": 0.2, "block": 0.3}, seed=0)
    assert {layer.name: layer.penalty_start for layer in gated_layers(gated)} == {
        "in": 0.1, "head": 0.2, next(x.name for x in gated_layers(gated) if x.penalty_start == 0.3): 0.3
    }  # fmt: skip
    assert [layer.name for layer in gated_layers(ks.add_l0(nested(), 1e-3, filters="head"))] == ["head"]
    assert [layer.name for layer in gated_layers(ks.add_l0(nested(), {"head": 1e-3}))] == ["head"]


def test_kernels_that_are_all_zero_count_as_pruned_and_dead():
    gated = ks.add_l0(keras.Sequential([keras.Input((6,)), layers.Dense(4, name="body"), layers.Dense(2)]), 1e-3)
    gated.layers[0].log_alphas[0].assign(np.full((6, 4), -4.6))
    row = ks.report(ks.bake(gated)).rows[0]
    assert (row["status"], row["zeros"], row["dead_units"]) == ("pruned", 24, 4)


def test_dead_units_are_counted():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, "sigmoid", name="body"), layers.Dense(3)])
    gated = ks.add_l0(model, 1e-3, "unit")
    close(gated)
    gated.layers[0].log_alphas[0].assign(np.full((6, 1), 4.6))
    gated.layers[1].log_alphas[0].assign(np.reshape([-4.6, -4.6, 4.6, 4.6, -4.6], (5, 1)))
    baked = ks.bake(gated)
    rows = ks.report(baked).rows
    assert [row["dead_units"] for row in rows if row["path"].endswith("kernel")] == [3, 0]
    np.testing.assert_array_equal(ks.selection.as_array(baked.layers[0].bias) == 0, [True, True, False, False, True])
    check_same(gated, baked, data(model))


def random_graph(seed):
    """A random functional model of layers that keep channels apart, mix them, join, split or repeat."""
    rng = np.random.default_rng(seed)
    inputs = keras.Input((8, 8, 2))
    layer = layers.Conv2D(4, 3, padding="same")
    pool = [layer(inputs)]
    shared = layers.Conv2D(4, 1, activation=str(rng.choice(["relu", "softmax", "sigmoid"])))
    for _ in range(int(rng.integers(4, 9))):
        x = pool[int(rng.integers(len(pool)))]
        kind = rng.choice(["conv", "shared", "norm", "add", "activation", "pool", "depthwise", "concat"])
        if kind == "conv":
            x = layers.Conv2D(4, 3, padding="same", activation=str(rng.choice(["relu", "sigmoid", "softmax"])))(x)
        elif kind == "shared":
            x = shared(x)
        elif kind == "norm":
            x = layers.BatchNormalization(axis=int(rng.choice([-1, 1])))(x)
        elif kind == "add":
            x = layers.Add()([x, pool[int(rng.integers(len(pool)))]])
        elif kind == "activation":
            x = [layers.ReLU, layers.Softmax, layers.PReLU, lambda: layers.Softmax(1)][int(rng.integers(4))]()(x)
        elif kind == "pool":
            x = layers.AveragePooling2D(3, strides=1, padding="same")(x)
        elif kind == "depthwise":
            x = layers.DepthwiseConv2D(3, padding="same")(x)
        else:
            x = layers.Conv2D(4, 1)(layers.Concatenate()([x, pool[-1]]))
        pool.append(x)
    flat = layers.Flatten() if rng.uniform() < 0.5 else layers.GlobalAveragePooling2D()
    hidden = layers.Dense(6, str(rng.choice(["tanh", "softmax", "relu"])))(flat(pool[-1]))
    outputs = [layers.Dense(2)(hidden)]
    outputs += [pool[int(rng.integers(len(pool)))] for _ in range(int(rng.integers(0, 2)))]
    outputs += [hidden] if rng.uniform() < 0.2 else []
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("granularity", ["weight", "unit", "channel"])
def test_layers_with_several_outputs(granularity):
    inputs = keras.Input((5, 3))
    gru = layers.GRU(4, return_sequences=True, return_state=True)
    sequence, state = gru(layers.Dense(6)(inputs))
    x = layers.Add()([layers.GlobalAveragePooling1D()(sequence), state])
    gated = ks.add_l0(keras.Model(inputs, layers.Dense(2)(x)), 1e-3, granularity)
    for layer in gated_layers(gated):
        for log_alpha in layer.log_alphas:
            log_alpha.assign(np.where(np.arange(np.prod(log_alpha.shape)).reshape(log_alpha.shape) % 2, 4.0, -4.0))
    data = np.random.default_rng(0).normal(size=(7, 5, 3)).astype("float32")
    baked = ks.bake(gated)
    expected, found = (ks.selection.as_array(model(data)) for model in (gated, baked))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.thorough(4)
def test_silenced_units_never_change_outputs(seed, granularity):
    model = random_graph(seed)
    gated = ks.add_l0(model, 1e-3, granularity, filters=None if seed % 2 else ["dense", "conv2d"])
    close(gated, share=0.7 if granularity == "unit" else 0.9, seed=seed)
    for layer in gated.layers:
        if isinstance(layer, layers.BatchNormalization):
            for i, variable in enumerate(layer.weights):
                variable.assign(np.linspace(0.5, 1.5, variable.shape[0]) * (-1) ** (i % 2 if i != 3 else 0))
    check_same(gated, ks.bake(gated), data(model, 4))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = L0(layers.Dense(3), 1e-3)

    def call(self, x):
        return self.body(x)


def test_subclassed_models():
    model = Subclassed()
    model(np.zeros((1, 4)))
    assert [layer.penalty_start for layer in gated_layers(model)] == [1e-3]
    with pytest.raises(ValueError, match="`bake` needs|makes `L0` layers by itself"):
        ks.bake(model)
    with pytest.raises(ValueError, match="`add_l0` copies functional and Sequential models. In a subclassed model"):
        ks.add_l0(model, 1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="is not built"):
        ks.add_l0(keras.Sequential([layers.Dense(3)]), 1)
    model = nested()
    with pytest.raises(ValueError, match="nothing to bake: the model has no `ks.layers.L0`. Received"):
        ks.bake(model)
    with pytest.raises(ValueError, match="has `L0` layers already"):
        ks.add_l0(ks.add_l0(model, 1e-3), 1e-3)
    with pytest.raises(ValueError, match="`penalty` must be at least 0"):
        ks.add_l0(model, -1)
    with pytest.raises(ValueError, match="matches no weight that could be pruned"):
        ks.add_l0(model, {"tail": 1})
    with pytest.raises(ValueError, match="`granularity` must be"):
        ks.add_l0(model, 1, "filters")
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        ks.bake("model")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exports are tested in the run with TensorFlow")
def test_export(tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(2)])
    gated = ks.add_l0(model, 1e-3)
    close(gated)
    report = ks.tflite.export(ks.bake(gated), tmp_path / "m.tflite", target="xnnpack")
    assert report.parity < 1e-5
    assert report.totals["zeros_kept"] == report.totals["zeros_model"] > 20
    with pytest.raises(ValueError, match=r"Fold the gates in first: `export\(ks.bake\(model\)"):
        ks.tflite.export(gated, tmp_path / "m.tflite", target="xnnpack")


@pytest.mark.parametrize(
    "words", [False, pytest.param(True, marks=pytest.mark.skipif(BACKEND != "tensorflow", reason="strings"))]
)
def test_what_layers_have_learned_beside_their_weights_goes_with_them(words):
    rng = np.random.default_rng(0)
    x = [rng.normal(5, 3, size=(64, 4)).astype("float32")]
    normalization = layers.Normalization()
    normalization.adapt(x[0])
    inputs = [keras.Input((4,), name="numbers")]
    parts = [normalization(inputs[0])]
    if words:
        lookup = layers.StringLookup(output_mode="one_hot")
        lookup.adapt(np.array(["Lyon", "Ghent", "Turin"]))
        inputs.append(keras.Input((1,), dtype="string", name="words"))
        parts.append(lookup(inputs[1]))
        x.append(keras.ops.convert_to_tensor(np.array([["Lyon"], ["Ghent"], ["Turin"], ["Bonn"]] * 16), "string"))
    x = [keras.ops.convert_to_tensor(one) for one in x]
    hidden = layers.Dense(8, "relu")(layers.Concatenate()(parts) if words else parts[0])
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    gated = ks.add_l0(model, 1e-9, open_probability=1 - 1e-6, filters="dense")
    expected = keras.ops.convert_to_numpy(model(x))
    for copy in (gated, ks.bake(gated)):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(copy(x)), expected, rtol=1e-5, atol=1e-5)
