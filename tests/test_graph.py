"""What belongs to the units of a kernel: whole channels are truly dead."""

import re

import keras
import numpy as np
import pytest

import keras_sparse as ks

L = keras.layers


def build(*layers, shape=(8, 8, 3), seed=0):
    """A compiled model with weights that no unit has at zero by chance, normalizations included."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), *layers])
    return alive(model, seed)


def alive(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if len(variable.shape) == 1:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def branches():
    """Two ways to one normalization."""
    inputs = keras.Input((5,))
    x = L.Dense(8, name="k")(inputs)
    x = L.BatchNormalization(name="bn")(x)
    return keras.Model(inputs, [L.ReLU(name="a")(x), L.LeakyReLU(name="b")(x)])


def residual():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, padding="same", name="stem")(inputs)
    y = L.BatchNormalization(name="bn")(x)
    y = L.ReLU()(y)
    y = L.Conv2D(8, 3, padding="same", use_bias=False, name="body")(y)
    y = L.BatchNormalization(name="bn2")(y)
    return keras.Model(inputs, L.Add(name="sum")([x, y]))


def operations():
    """Arithmetic of tensors in place of layers."""
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, use_bias=False, name="k")(inputs)
    x = L.BatchNormalization(name="bn")(x)
    y = keras.ops.relu6(x * 3.0) / 6.0
    y = L.Multiply(name="swish")([x, y])
    y = keras.ops.abs(y) * 2.0
    return keras.Model(inputs, L.BatchNormalization(name="bn2")(y))


def dense_block(join, *layers):
    """As in DenseNet and Inception: what several layers make comes together, `layers` behind it."""
    inputs = keras.Input((8, 8, 3))
    x = join([L.Conv2D(8, 3, name="k", padding="same")(inputs), L.Conv2D(8, 3, name="k2", padding="same")(inputs)])
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def excited():
    """Squeeze and excite."""
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, name="k")(inputs)
    y = L.GlobalAveragePooling2D(keepdims=True)(x)
    y = L.Conv2D(8, 1, activation="sigmoid", name="gate")(y)
    y = L.Multiply(name="product")([x, y])
    y = L.BatchNormalization(name="bn")(y)
    return keras.Model(inputs, L.ReLU(name="relu")(y))


def head(*layers):
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 8, name="k")(inputs)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def nested():
    block = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(6, 3), L.BatchNormalization(), L.ReLU()], name="block")
    return keras.Sequential([keras.Input((8, 8, 3)), block, L.Conv2D(4, 3)])


# What these models return is pruned, too, since it is named.
NAMED = "(?<!depthwise_)kernel"

# Each with the layer whose output is dead where the kernel's units are.
MODELS = {
    "dense": (lambda: build(L.Dense(8, name="k"), L.Dense(3, name="end"), shape=(5,)), {"k": "k", "end": "end"}),
    "dense, normalized": (
        lambda: build(L.Dense(8, name="k"), L.BatchNormalization(name="bn"), L.ReLU(name="a"), shape=(5,)),
        {"k": "a"},
    ),
    "activation, dropout, normalization": (
        lambda: build(
            L.Dense(8, "relu", name="k"), L.Dropout(0.2), L.BatchNormalization(scale=True, name="bn"), shape=(5,)
        ),
        {"k": "bn"},
    ),
    "no shift": (lambda: build(L.Conv2D(8, 3, name="k"), L.BatchNormalization(center=False, name="bn")), {"k": "bn"}),
    "relu6": (
        lambda: build(L.Conv2D(8, 3, name="k"), L.BatchNormalization(), L.ReLU(6.0, name="a"), L.Conv2D(4, 1)),
        {"k": "a"},
    ),
    "swish": (lambda: build(L.Conv2D(8, 3, activation="swish", name="k"), L.MaxPooling2D(name="p")), {"k": "p"}),
    "normalized twice": (
        lambda: build(L.Conv2D(8, 3, name="k"), L.BatchNormalization(), L.ReLU(), L.BatchNormalization(name="bn")),
        {"k": "bn"},
    ),
    "separable": (
        lambda: build(L.SeparableConv2D(8, 3, name="k"), L.BatchNormalization(name="bn")),
        {"k": "bn"},
    ),
    "transposed": (
        lambda: build(L.Conv2DTranspose(8, 3, name="k"), L.BatchNormalization(name="bn")),
        {"k": "bn"},
    ),
    "grouped": (
        lambda: build(L.Conv2D(8, 3, groups=2, name="k"), L.BatchNormalization(name="bn"), shape=(8, 8, 4)),
        {"k": "bn"},
    ),
    "einsum": (lambda: build(L.EinsumDense("ab,bc->ac", 8, bias_axes="c", name="k"), shape=(5,)), {"k": "k"}),
    "1D": (lambda: build(L.Conv1D(8, 3, name="k"), L.BatchNormalization(name="bn"), shape=(8, 3)), {"k": "bn"}),
    "branches": (lambda: alive(branches()), {"k": "b"}),
    "residual": (lambda: alive(residual()), {"stem": "bn", "body": "bn2"}),
    "operations": (lambda: alive(operations()), {"k": "bn2"}),
    "excited": (lambda: alive(excited()), {"k": "relu"}),
    "concatenated": (lambda: alive(dense_block(L.Concatenate(name="c"), L.ReLU())), {"k": "k", "k2": "k2"}),
    "reshaped": (lambda: alive(head(L.Flatten(name="flat"), L.Dense(3))), {"k": "flat"}),
}


def output(model, name):
    inputs = np.random.default_rng(1).normal(size=(16, *model.inputs[0].shape[1:]))
    probe = keras.Model(model.inputs[0], model.get_layer(name).output)
    return keras.ops.convert_to_numpy(probe(inputs, training=False))


def check_dead(model, outputs, count, others_live=True):
    for kernel, layer in outputs.items():
        row = next(w for w in ks.selection.weights(model) if f"{kernel}/" in w.path and w.kernel and not w.skipped)
        matrix = ks.patterns.to_matrix(row.numpy(), row.output_axes)
        dead = ~matrix.any(axis=1)
        values = output(model, layer)
        assert dead.sum() == count(len(dead))
        assert (values[..., dead] == 0).all()
        assert not others_live or values[..., ~dead].any(axis=tuple(range(values.ndim - 1))).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.thorough(5)
def test_units_are_dead_after_training(name):
    make, outputs = MODELS[name]
    model = make()
    rng = np.random.default_rng(2)
    x = rng.normal(size=(64, *model.inputs[0].shape[1:]))
    y = [rng.normal(size=(64, *output.shape[1:])) for output in model.outputs]
    y = y if len(y) > 1 else y[0]
    history = model.fit(
        x, y, epochs=3, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, pattern="channel", filters=NAMED, end=0.6)]
    )
    check_dead(model, outputs, lambda units: round(0.5 * units))
    rows = [row for row in ks.report(model).rows if "kernel" in row["path"].split("/")[-1] and not row["reason"]]
    assert history.history["sparsity"][-1] == sum(row["zeros"] for row in rows) / sum(row["size"] for row in rows)


@pytest.mark.parametrize("name", MODELS)
def test_units_are_dead_in_one_shot(name):
    make, outputs = MODELS[name]
    model = make()
    ks.prune(model, 0.25, pattern="channel", filters=NAMED)
    ks.prune(model, 0.5, pattern="channel", filters=NAMED)
    check_dead(model, outputs, lambda units: round(0.5 * units))
    # Whatever optimizer comes, the zeros are masks of a second training, too.
    before = model.get_weights()
    ks.prune(model, 0.5, pattern="channel", filters=NAMED)
    for value, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("name", ["dense", "no shift", "swish", "normalized twice", "residual"])
def test_dead_units_stay_dead_in_fine_tuning(name):
    make, outputs = MODELS[name]
    model = make()
    ks.prune(model, 0.5, pattern="channel", filters=NAMED)
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(64, *model.inputs[0].shape[1:])), rng.normal(size=(64, *model.outputs[0].shape[1:]))
    model.fit(x, y, epochs=2, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    check_dead(model, outputs, lambda units: round(0.5 * units))


def test_units_that_are_dead_by_chance_train():
    # Before training, biases are zero because they are so initialised.
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), L.Dense(8, name="k")])
    model.compile("adam", "mse")
    kernel = np.array(ks.selection.as_array(model.get_layer("k").kernel))
    kernel[:, :2], kernel[[0, 1, 2, 4], [3, 5, 4, 7]] = 0, 0
    model.get_layer("k").kernel.assign(kernel)
    model.fit(np.ones((32, 5)), np.ones((32, 8)), verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    assert (ks.selection.as_array(model.get_layer("k").bias) != 0).all()


def test_what_is_frozen_falls_silent_too():
    model = build(L.Dense(8, name="k"), L.BatchNormalization(name="bn"), L.ReLU(name="a"), shape=(5,))
    model.get_layer("bn").trainable = False
    model.compile("adam", "mse")
    x, y = np.ones((32, 5)), np.ones((32, 8))
    model.fit(
        x, y, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, pattern="channel", filters=NAMED, end=0.5)]
    )
    check_dead(model, {"k": "a"}, lambda units: 4)


def nested_before_normalization():
    block = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(6, 3), L.ReLU()], name="block")
    return keras.Sequential([keras.Input((8, 8, 3)), block, L.BatchNormalization(name="outside"), L.ReLU()])


def test_normalization_outside_of_a_nested_model():
    model = alive(nested_before_normalization())
    ks.prune(model, 0.5, pattern="channel", filters=NAMED)
    for variable in (model.get_layer("outside").gamma, model.get_layer("outside").beta):
        assert (ks.selection.as_array(variable) == 0).sum() == 3


def test_nested_models():
    model = alive(nested())
    ks.prune(model, 0.5, pattern="channel")
    block = model.get_layer("block")
    values = keras.ops.convert_to_numpy(block(np.random.default_rng(0).normal(size=(4, 8, 8, 3))))
    assert (values == 0).all(axis=(0, 1, 2)).sum() == 3


class Subclassed(keras.Model):
    def __init__(self, *layers):
        super().__init__()
        self.stack = layers

    def call(self, x):
        for layer in self.stack:
            x = layer(x)
        return x


def subclassed(*layers):
    model = Subclassed(*layers)
    model(np.ones((1, 5)))
    return model


class SelfAttention(L.Layer):
    def __init__(self):
        super().__init__()
        self.attention = L.MultiHeadAttention(2, 3, name="k")

    def call(self, x):
        return self.attention(x, x)

    def build(self, shape):
        self.attention.build(shape, shape)


SKIPPED = {
    "softmax": (lambda: build(L.Dense(8, "softmax", name="k"), shape=(5,)), "does not map 0 to 0"),
    "sigmoid layer": (lambda: build(L.Dense(8, name="k"), L.Activation("sigmoid"), shape=(5,)), "does not map 0 to 0"),
    "softmax layer": (lambda: build(L.Dense(8, name="k"), L.Softmax(), shape=(5,)), "does not map 0 to 0"),
    "softmax behind a reshaping": (lambda: alive(head(L.Reshape((8,)), L.Softmax())), "does not map 0 to 0"),
    "sigmoid behind a flattening": (
        lambda: alive(head(L.Flatten(), L.Activation("sigmoid"))),
        "does not map 0 to 0",
    ),
    "shifted by an operation": (lambda: alive(head(lambda x: x + 1.0)), "not seen to keep a unit at 0"),
    "own activation": (
        lambda: build(L.Dense(8, activation=lambda x: x + 1, name="k"), shape=(5,)),
        "does not map 0 to 0",
    ),
    "no scale": (lambda: build(L.Dense(8, name="k"), L.BatchNormalization(scale=False), shape=(5,)), "no scale"),
    "attention": (lambda: subclassed(L.Reshape((1, 5)), SelfAttention()), "not known to be zero"),
    "subclassed": (lambda: subclassed(L.Dense(8, name="k"), L.BatchNormalization()), "cannot be found"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_dead_is_skipped(name):
    make, reason = SKIPPED[name]
    with pytest.raises(ValueError, match=f"nothing to prune in whole channels.*{reason}"):
        ks.prune(make(), 0.5, pattern="channel", filters=NAMED)


def test_skipped_kernels_are_in_the_report():
    model = build(L.Dense(8, "relu", name="body"), L.Dense(4, "softmax", name="head"), shape=(5,))
    report = ks.prune(model, 0.5, pattern="channel")
    assert {row["path"].split("/")[-2]: row["reason"] for row in report.rows if "kernel" in row["path"]} == {
        "body": "",
        "head": "channels: the activation of Dense does not map 0 to 0",
    }
    assert report.totals["zeros"] == 20


def test_subclassed_models_without_normalization():
    model = subclassed(L.Dense(8, "relu", name="body"), L.Dense(4, name="head"))
    ks.prune(model, 0.5, pattern="channel")
    values = keras.ops.convert_to_numpy(model.stack[0](np.ones((2, 5))))
    assert (values == 0).all(axis=0).sum() >= 4


@pytest.mark.parametrize("name", ["dense", "relu6", "transposed", "1D"])
def test_scores_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    model = MODELS[name][0]()
    weight = next(w for w in ks.selection.weights(model) if w.kernel)
    value = weight.numpy()
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(ks.patterns.to_matrix(value, weight.output_axes).copy()))
    prune.ln_structured(module, "weight", amount=0.5, n=1, dim=0)
    kept = ks.patterns.Channel().mask(np.abs(value), 0.5, weight.output_axes)
    np.testing.assert_array_equal(ks.patterns.to_matrix(kept, weight.output_axes), module.weight_mask.numpy() != 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, head",
    [
        ("MobileNet", "conv_preds: channels: the activation predictions behind it does not map 0 to 0"),
        ("MobileNetV2", "predictions: channels: the activation of Dense does not map 0 to 0"),
        ("MobileNetV3Small", "logits: channels: the activation predictions? behind it does not map 0 to 0"),
        ("EfficientNetB0", "predictions: channels: the activation of Dense does not map 0 to 0"),
        ("ResNet50V2", "predictions: channels: the activation of Dense does not map 0 to 0"),
    ],
)
def test_applications(name, head):
    """Their shapes and operations are taken in, and no probability is pruned away."""
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=10)
    report = ks.prune(model, 0.5, pattern="channel")
    skipped = [row for row in report.rows if row["path"].endswith("kernel") and row["reason"].startswith("channels")]
    assert any(re.fullmatch(head, f"{row['path'].split('/')[-2]}: {row['reason']}") for row in skipped), skipped
    assert np.isfinite(keras.ops.convert_to_numpy(model(np.ones((1, 32, 32, 3))))).all()


@pytest.mark.slow
def test_mobilenet():
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=10)
    alive(model)
    ks.prune(model, 0.5, pattern="channel")
    outputs = {f"conv_pw_{i}": f"conv_pw_{i}_relu" for i in range(1, 14)} | {"conv1": "conv1_relu"}
    # Behind ReLU6 others are zero as well, for want of training.
    check_dead(model, outputs, lambda units: units // 2, others_live=False)


def test_the_masks_of_units_are_saved_and_resumed(tmp_path):
    def fit(model, epochs, initial=0):
        x, y = np.random.default_rng(3).normal(size=(32, 5)), np.ones((32, 8))
        model.fit(
            x,
            y,
            initial_epoch=initial,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[
                ks.callbacks.Pruning(0.5, pattern="channel", filters=NAMED, begin=0, end=3, frequency=1),
                keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            ],
        )
        return model

    whole = fit(build(L.Dense(8, name="k"), L.BatchNormalization(name="bn"), shape=(5,)), 4)
    resumed = fit(keras.saving.load_model(tmp_path / "2.keras"), 4, initial=2)
    for value, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)
