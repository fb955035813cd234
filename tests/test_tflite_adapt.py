"""Adaptation: the same function, in a form that runs sparse."""

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import mlp

import keras_sparse as ks
from keras_sparse.tflite.runtimes import available

tensorflow_only = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def alive(model):
    """Weights that no channel has in common, normalizations included."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1 and str(weight.dtype).startswith("float"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def outputs(model, size, seed=1):
    x = np.random.default_rng(seed).normal(size=(2, size, size + 16, 3)).astype("float32")
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


def check(model, size=32, exact=True):
    """The adapted model and its report; the original is untouched, and the outputs are equal."""
    before, weights = outputs(model, size), model.get_weights()
    adapted, report = ks.tflite.adapt(model)
    for value, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, other)
    assert report.totals["exact"] == exact
    if exact:
        for value, other in zip(outputs(adapted, size), before, strict=True):
            np.testing.assert_allclose(value, other, rtol=0, atol=1e-4 * max(1e-3, np.abs(other).max()))
    return adapted, report


def block(x, filters, strides=1, kernel=3, padding="same"):
    x = layers.DepthwiseConv2D(kernel, strides, padding=padding)(x)
    x = layers.BatchNormalization()(x)
    return layers.Conv2D(filters, 1, activation="relu6")(x)


def model_of(body, size=32):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size + 16, 3) if size else (None, None, 3), name="image")
    return alive(keras.Model(inputs, body(inputs)))


def stem(x, **options):
    return layers.Conv2D(16, 3, 2, **{"padding": "same", "name": "stem"} | options)(x)


def head(x):
    return layers.Dense(5)(layers.GlobalAveragePooling2D()(x))


def by_hand(x):
    """As `keras.applications` pads."""
    x = stem(layers.ZeroPadding2D(((0, 1), (0, 1)))(x), padding="valid")
    x = layers.ZeroPadding2D(((1, 2), (1, 2)))(x)
    return head(block(x, 24, 2, 5, "valid"))


def excited(x):
    x = stem(x)
    y = layers.Reshape((1, 1, 16))(layers.GlobalAveragePooling2D()(x))
    y = layers.Conv2D(16, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="swish")(y))
    return head(block(layers.multiply([x, y]), 32, 2))


def convolutional_head(x):
    x = layers.GlobalAveragePooling2D(keepdims=True)(block(stem(x), 32, 2))
    x = layers.Conv2D(24, 1, activation="relu", name="hidden")(x)
    x = layers.Reshape((5,))(layers.Conv2D(5, 1, use_bias=False, name="logits")(layers.Dropout(0.3)(x)))
    return layers.Activation("softmax")(x)


def operations(x):
    x = stem((x + 1.0) / 2.0)
    return head(keras.ops.relu6(block(x, 16, 2) * 3.0))


def mixed_rest(x):
    """Layers that tell up from down, before and behind the pooling."""
    x = block(stem(x), 16, 2)
    y = layers.Conv2D(8, (2, 3), padding="same")(x)
    z = layers.Conv2D(8, 3, 2)(x)
    z = layers.MaxPooling2D(3, 2)(z)
    return [layers.Flatten(name="flat")(y), layers.GlobalMaxPooling2D()(z), layers.Conv2D(4, 3, 3)(x)]


def nested(x):
    inputs = keras.Input((32, 48, 3))
    inner = keras.Model(inputs, block(stem(inputs), 16, 2), name="inner")
    return head(inner(layers.Rescaling(1 / 127.5, -1)(x)))


EXACT = {
    "same": lambda x: head(block(block(stem(x), 24, 2), 32, 2, 5)),
    "residual": lambda x: (lambda y: head(layers.add([y, block(y, 16)])))(block(stem(x), 16, 2)),
    "by hand": by_hand,
    "squeeze and excite": excited,
    "convolutional head": convolutional_head,
    "operations": operations,
    "nested": nested,
    "up and down": mixed_rest,
    "dilated": lambda x: head(block(layers.Conv2D(16, 3, dilation_rate=2)(stem(x)), 16, 2)),
    "two outputs": lambda x: (lambda y: {"a": head(y), "b": y})(block(stem(x), 16, 2)),
}


SPATIAL = np.random.default_rng(0).random((32, 48, 3)).astype("float32")


def two_inputs(structure):
    keras.utils.set_random_seed(0)
    a, b = (keras.Input((32, 48, 3), name=name) for name in "ab")
    y = layers.subtract([head(block(stem(a), 16, 2)), layers.Dense(5)(layers.GlobalAveragePooling2D()(b))])
    return alive(keras.Model({"b": b, "a": a} if structure is dict else [a, b], y))


def one_of_each(layer):
    """An operation behind the first convolution, where the image lies upside down."""
    return lambda x: head(block(layer(block(stem(x), 16)), 16, 2))


# Where a layer tells up from down, what is behind it cannot be upside down.
CONSTANT = {
    "multiply": one_of_each(lambda x: keras.ops.multiply(x, SPATIAL[:16, :24, :1])),
    "a column": one_of_each(lambda x: x + SPATIAL[:16, :1, :1]),
    "scale": one_of_each(lambda x: layers.Rescaling(SPATIAL[:16, :24, :1])(x)),
    "offset": one_of_each(lambda x: layers.Rescaling(2.0, SPATIAL[:16, :24, :1])(x)),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.thorough(2)
def test_constants_of_places(name):
    adapted, report = check(model_of(CONSTANT[name]), exact=False)
    assert [row["exact"] for row in report.rows].count(False) == 1 and adapted.count_params()


BEFORE = {
    "mean image": lambda x: layers.Rescaling(1 / 255, -SPATIAL)(x),
    "mask": lambda x: keras.ops.multiply(x - SPATIAL, SPATIAL[:, :, :1]),
    "augmentation": lambda x: layers.CenterCrop(24, 24)(layers.RandomRotation(0.1)(layers.RandomFlip()(x))),
    "coordinates": lambda x: layers.Conv2D(3, 1)(layers.Concatenate()([x, keras.ops.zeros_like(x) + SPATIAL])),
    "pool": lambda x: layers.MaxPooling2D((3, 2), 1, padding="same")(x),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_before_the_first_convolution_stays_upright(name):
    adapted, report = check(model_of(lambda x: head(block(stem(BEFORE[name](x)), 16, 2))))
    assert len(report.rows) == 3 and adapted.count_params()


def test_the_input_comes_back_to_the_image():
    def body(x):
        y = layers.Conv2D(3, 3, padding="same", name="refine")(x)
        return head(block(stem(layers.add([y, x])), 16, 2))

    assert len(check(model_of(body))[1].rows) == 3


@pytest.mark.parametrize("structure", [dict, list])
def test_several_inputs(structure):
    adapted, report = ks.tflite.adapt(two_inputs(structure))
    assert report.totals["exact"] and report.totals["difference"] < 1e-4
    assert [x.name for x in adapted.inputs] == [x.name for x in two_inputs(structure).inputs]


@pytest.mark.filterwarnings("ignore:.*You are using a softmax over axis 1:UserWarning")
@pytest.mark.parametrize(
    "layer", [layers.Softmax(axis) for axis in (-1, 1, 3)] + [layers.Dropout(0.5, (None, 1, 1, 16))]
)
@pytest.mark.thorough(2)
def test_layers_on_images_of_one_pixel(layer):
    def body(x):
        y = layers.GlobalAveragePooling2D(keepdims=True)(block(stem(x), 16, 2))
        return layers.Flatten()(layers.Conv2D(4, 1)(layer(y)))

    adapted, _ = check(model_of(body))
    assert adapted(np.ones((1, 32, 48, 3)), training=True).shape == (1, 4)


def test_what_cannot_be_upside_down_stays_upright():
    """A layer that is called upside down and upright would have to be two."""

    def body(x):
        shared = layers.DepthwiseConv2D(3, padding="same", name="shared")
        return head(shared(layers.PReLU()(shared(stem(layers.ZeroPadding2D(1)(x), padding="valid")))))

    assert check(model_of(body))[1].rows == []


def test_weights_that_are_nan_are_no_change():
    model = model_of(EXACT["same"])
    model.get_layer("stem").bias.assign(np.full(16, np.nan))
    _, report = ks.tflite.adapt(model)
    assert report.totals["exact"] and report.totals["difference"] == 0


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.thorough(4)
def test_exact_changes(name):
    adapted, report = check(model_of(EXACT[name]))
    assert report.totals["changes"] == len(report.rows) >= 3 and report.totals["difference"] < 1e-4
    names = {layer.name for layer in adapted.layers}
    assert {"image", "stem", "stem_padding"} <= names
    for layer in adapted.layers:
        if (
            isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D))
            and layer.strides == (2, 2)
            and name != "up and down"
        ):
            assert layer.padding == "valid"


def test_what_fits_is_left_alone():
    def fitting(x):
        x = stem(layers.ZeroPadding2D(1)(x), padding="valid")
        return head(block(layers.ZeroPadding2D(2)(block(x, 16)), 32, 2, 5, "valid"))

    adapted, report = check(model_of(fitting))
    assert report.rows == [] and not any("flip" in layer.name for layer in adapted.layers)
    # What was adapted fits.
    again = check(check(model_of(EXACT["same"]))[0])[1]
    assert again.rows == []


def test_heads_become_dense():
    adapted, report = check(model_of(convolutional_head))
    assert type(adapted.get_layer("logits")) is layers.Dense and adapted.get_layer("logits").bias is None
    assert adapted.get_layer("hidden").activation is keras.activations.relu
    assert [row["layer"] for row in report.rows][-2:] == ["hidden", "logits"]


def test_both_kinds_of_padding():
    """One layer pads on both sides, one at the bottom: the image lies for most of them, and the rest is shifted."""

    def body(x):
        x = stem(layers.ZeroPadding2D(1)(x), padding="valid")
        return head(block(block(x, 16), 16, 2))

    model = model_of(body)
    adapted, report = check(model, exact=False)
    assert [row["exact"] for row in report.rows] == [False] and "shifted by 1" in report.rows[0]["change"]
    assert 0 < report.totals["difference"] < 1
    # The shift is what the row says: the layer reads its input one pixel further up and left.
    assert [y.shape for y in outputs(adapted, 32)] == [y.shape for y in outputs(model, 32)]


def test_odd_sizes_are_noted():
    def body(x):
        return head(block(stem(x), 16, 2))

    keras.utils.set_random_seed(0)
    inputs = keras.Input((33, 33, 3))
    _, report = ks.tflite.adapt(keras.Model(inputs, body(inputs)))
    assert any("odd size" in note for note in report.notes)


def test_open_sizes_are_noted():
    _, report = ks.tflite.adapt(model_of(EXACT["same"], None))
    assert report.rows == [] and any("size of the image is not known" in note for note in report.notes)


def test_a_sequential_model_and_normalization():
    x = np.random.default_rng(0).normal(3, 2, (40, 32, 48, 3)).astype("float32")
    normalization = layers.Normalization()
    normalization.adapt(x)
    model = keras.Sequential(
        [keras.Input((32, 48, 3)), normalization, layers.Conv2D(8, 3, 2, padding="same", name="stem")]
    )
    model.add(layers.GlobalAveragePooling2D())
    assert len(check(model)[1].rows) == 2


def test_what_is_trained_stays_trainable():
    model = model_of(EXACT["same"])
    model.get_layer("stem").trainable = False
    adapted, _ = check(model)
    assert not adapted.get_layer("stem").trainable and adapted.trainable_variables
    adapted.compile("sgd", "mse")
    adapted.fit(np.ones((2, 32, 48, 3)), np.ones((2, 5)), verbose=0)


def test_the_adapted_model_is_saved(tmp_path):
    adapted, _ = check(model_of(EXACT["same"]))
    adapted.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(outputs(loaded, 32)[0], outputs(adapted, 32)[0], atol=1e-6)


def test_nothing_is_printed_and_the_report_says_it(capsys):
    _, report = ks.tflite.adapt(model_of(EXACT["same"]))
    assert capsys.readouterr().out == ""
    assert "the image is flipped" in str(report) and "stem" in str(report)


def test_what_cannot_be_adapted():
    with pytest.raises(
        ValueError,
        match="another form.*: 'xnnpack', 'xnnpack-wasm', 'gpu'.*Received: target='micro'",
    ):
        ks.tflite.adapt(mlp(), "micro")

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model(np.ones((1, 4)))
    with pytest.raises(ValueError, match="functional or Sequential"):
        ks.tflite.adapt(model)
    inputs = keras.Input((3, 8, 8))
    with pytest.raises(ValueError, match="channels last"):
        ks.tflite.adapt(keras.Model(inputs, layers.Conv2D(4, 3, data_format="channels_first")(inputs)))


def test_a_layer_that_would_change_in_one_place():
    def body(x):
        shared = layers.DepthwiseConv2D(3, 2, name="shared")
        return head(shared(shared(layers.ZeroPadding2D(((0, 1), (0, 1)))(stem(x)))))

    with pytest.raises(ValueError, match="called several times.*'shared'"):
        ks.tflite.adapt(model_of(body))


APPLICATIONS = {
    "MobileNet": lambda size: keras.applications.MobileNet(size, alpha=0.25, weights=None, classes=10),
    "MobileNetV2": lambda size: keras.applications.MobileNetV2(size, alpha=0.35, weights=None, classes=10),
    "MobileNetV3Small": lambda size: keras.applications.MobileNetV3Small(
        size, minimalistic=True, weights=None, classes=10
    ),
    "EfficientNetB0": lambda size: keras.applications.EfficientNetB0(input_shape=size, weights=None, classes=10),
}


@tensorflow_only
@pytest.mark.everywhere
@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
@pytest.mark.thorough(2)
def test_applications_engage(name, tmp_path):
    """They run sparse: right, and other than dense, on runtimes with sparse kernels."""
    keras.utils.set_random_seed(0)
    adapted, report = ks.tflite.adapt(alive(APPLICATIONS[name]((96, 96, 3))))
    assert report.totals["exact"] and report.totals["difference"] < 1e-4
    ks.prune(adapted, 0.9, filters=lambda v: tuple(v.shape[:2]) == (1, 1) and len(v.shape) == 4)
    exported = ks.tflite.export(adapted, tmp_path / "m.tflite", target="xnnpack", batch_size=1)
    assert exported.encoding == "sparse" and {use["operator"] for use in exported.runs_sparse} == {"CONV_2D"}
    if available()["x86-no-avx"] is None or available()["wasm"] is None:
        assert len(exported.verified_on) > 1
