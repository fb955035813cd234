"""Inputs: random ones on which a model's outputs differ, whatever numbers it is made for."""

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import attention, dict_of_inputs, mlp, nested, several, token_floats

import keras_sparse as ks
from keras_sparse.tflite.inputs import random_batches, spread
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.targets import OPEN_BATCH

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of the TFLite stage")


@keras.saving.register_keras_serializable("tflite_inputs")
class Own(layers.Layer):
    """What a model does to its inputs itself, where no layer tells."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def network(first, shape=(32, 32, 3), dtype="float32", seed=0):
    """With biases, behind which inputs that are too small disappear."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(shape, dtype=dtype)
    x = first(inputs)
    if len(shape) == 3:
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, 2, activation="relu")(x))
    biases = keras.initializers.RandomNormal(stddev=1.0, seed=7)
    return keras.Model(inputs, layers.Dense(4, bias_initializer=biases)(layers.Dense(8, bias_initializer=biases)(x)))


def normalization(mean, deviation, **options):
    return layers.Normalization(mean=mean, variance=np.square(deviation), **options)


def within(inner):
    return keras.Sequential([keras.Input((32, 32, 3)), inner, layers.Rescaling(2.0)])


def affected(model, inputs=None):
    """How far outputs differ over the samples of the batches."""
    called = signature(model)
    batches = random_batches(model, called) if inputs is None else inputs
    outputs = [keras.tree.flatten(called.call(model, batch)) for batch in batches]
    return spread([[keras.ops.convert_to_numpy(y)[0] for y in found] for found in outputs])


FIRST = {
    "rescaling": (layers.Rescaling(1 / 255), {}),
    "nested": (within(layers.Rescaling(1 / 255)), {}),
    "own images": (Own(lambda x: x / 255), {}),
    "own audio": (Own(lambda x: x * 2.0**-31), {"shape": (12,)}),
    "large numbers": (normalization(1.6e9, 1e4), {"shape": (12,)}),
    "each its own": (normalization([1e9, 1e-9, 0.0], [1e7, 1e-9, 1.0]), {"shape": (3,)}),
    "integers": (Own(lambda x: keras.ops.cast(x, "float32") / 32768), {"shape": (12,), "dtype": "int32"}),
    "logarithms": (Own(lambda x: keras.ops.log(x + 1e-6)), {}),
}


@pytest.mark.parametrize("name", FIRST)
def test_outputs_depend_on_the_inputs(name):
    first, options = FIRST[name]
    model = network(first, **options)
    assert affected(model)[0] > 0.1
    other = network(first, **options, seed=1)
    called = signature(model)
    for batch in random_batches(model, called)[1:]:
        right, wrong = (keras.ops.convert_to_numpy(called.call(m, batch)) for m in (model, other))
        assert np.abs(right - wrong).max() > 0.1 * np.abs(right).max()


@pytest.mark.parametrize("end", ["softmax", "sigmoid", "tanh"])
def test_probabilities_are_not_all_0_and_1(end):
    """Behind a softmax of large numbers, a kernel of half the size changes nothing that a comparison would see."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, 2, activation="relu")(layers.Rescaling(1 / 255)(inputs))
    x = layers.Dense(3, name="scores")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Activation(end)(60.0 * x))
    wrong = keras.models.clone_model(model)
    wrong.set_weights(model.get_weights())
    wrong.get_layer("scores").kernel.assign(0.5 * model.get_layer("scores").kernel)
    called, batches = signature(model), random_batches(model, signature(model))
    right, other = (
        np.concatenate([keras.ops.convert_to_numpy(called.call(m, batch)) for batch in batches]) for m in (model, wrong)
    )
    assert np.abs(right - other).max() > 0.05 * np.abs(right).max()


@pytest.mark.parametrize(
    ("first", "mean", "deviation"),
    [
        (layers.Rescaling(1 / 127.5, offset=-1.0), 127.5, 127.5),
        (normalization([1e6, 0.0, 1.0], [1e3, 1.0, 1e-3]), [1e6, 0.0, 1.0], [1e3, 1.0, 1e-3]),
        (normalization(3.0, 2.0, invert=True), -1.5, 0.5),
        (within(normalization(0.0, 100.0)), 0.0, 50.0),
    ],
)
def test_the_first_layers_are_undone(first, mean, deviation):
    model = network(first)
    values = np.concatenate([batch[0] for batch in random_batches(model, signature(model))]).reshape(-1, 3)
    np.testing.assert_allclose((values.mean(0) - mean) / deviation, 0, atol=2)
    np.testing.assert_allclose(values.std(0) / deviation, 1, atol=0.7)


def test_each_input_has_a_scale_of_its_own():
    image, age = keras.Input((16, 16, 3), name="image"), keras.Input((1,), name="age")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, activation="relu")(image / 255))
    model = keras.Model([image, age], layers.Dense(4, bias_initializer="ones")(layers.Concatenate()([x, age])))
    batch = random_batches(model, signature(model))[2]
    assert np.abs(batch[0]).max() > 10 and np.abs(batch[1]).max() < 10


def test_what_a_model_does_not_take_is_not_tried_further():
    def picky(x):
        keras.ops.convert_to_numpy(x)  # nothing symbolic
        if np.abs(np.asarray(x)).max() > 10:
            raise ValueError("small numbers only")
        return 1e-4 * x + 1

    class Model(keras.Model):
        def call(self, x):
            return picky(x) if not isinstance(x, keras.KerasTensor) else x

    model = Model()
    model(np.zeros((2, 4), "float32"))
    assert all(np.abs(batch[0]).max() <= 10 for batch in random_batches(model, signature(model)))


def test_outputs_that_depend_on_nothing():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, kernel_initializer="zeros", bias_initializer="ones")(inputs))
    batches = random_batches(model, signature(model))
    assert affected(model, batches) == [0.0] and np.abs(batches[2][0]).max() < 10


def test_spread():
    one, two = np.array([1.0, np.nan, -2.0, 0.0]), np.array([1.0, np.nan, -4.0, np.inf])
    assert spread([[one], [two]]) == [0.25]  # 2 of 4, at half of the places
    assert spread([[np.full(3, np.nan)]] * 2) == [0.0] and spread([[np.zeros(3)]] * 2) == [0.0]
    near, far = np.array([1e-5, 1 - 1e-5]), np.array([1e-3, 1 - 1e-2])
    np.testing.assert_allclose(spread([[near], [1 - near]]), [1e-5], rtol=1e-3)  # probabilities at their ends
    np.testing.assert_allclose(spread([[near], [far]]), [5e-3], rtol=1e-2)
    assert spread([[near], [-near]])[0] < 1e-4 and spread([[2 * near], [2 - 2 * near]])[0] > 0.9
    assert spread([[np.array([0.0, 1.0])], [np.array([1.0, 0.0])]]) == [1.0]  # class numbers


def wave():
    """Of open length, and at least some hundred steps."""
    inputs = keras.Input((None, 1), name="wave")
    x = layers.MaxPooling1D(4)(layers.Conv1D(8, 80, 4, activation="relu")(inputs))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Conv1D(8, 9)(x))))


@pytest.mark.lengthy(0)
def test_open_sizes_are_as_large_as_the_model_needs(tmp_path):
    model = wave()
    assert [batch[0].shape[1:] for batch in random_batches(model, signature(model))] == [(512, 1)] * 3
    data = np.random.default_rng(0).normal(size=(4, 1000, 1))
    assert random_batches(model, signature(model), like=[data])[0][0].shape == (1, 1000, 1)
    for given in (None, data):
        report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", representative_data=given)
    assert report.parity_relative < 1e-5 and report.notes[1:] == [f"{OPEN_BATCH}."]
    output = ks.tflite.runtimes.run(report.path, {"wave": data})["output_0"]
    np.testing.assert_allclose(output, model(data), atol=1e-5)
    assert ks.tflite.benchmark(report.path, seconds=0.01).rows[0]["median"] > 0
    assert [row["model"] for row in ks.compare({"keras": model, "file": str(report.path)}, data, metrics=[]).rows]


@pytest.mark.parametrize("build", [mlp, attention, token_floats, several, nested, dict_of_inputs])
def test_random_inputs_are_valid(build):
    model = build()
    called = signature(model)
    batches = random_batches(model, called)
    assert [len(batch[0]) for batch in batches] == [1, 2, 3]
    for batch in batches:
        assert [array.dtype for array in batch] == [leaf.dtype for leaf in called.inputs]
        outputs = keras.tree.flatten(called.call(model, batch))
        assert all(np.isfinite(keras.ops.convert_to_numpy(y)).all() for y in outputs)
    assert all(np.array_equal(a, b) for a, b in zip(batches[2], random_batches(model, called)[2], strict=True))
    assert not np.array_equal(batches[2][0], random_batches(model, called, seed=1)[2][0])


def test_random_tokens_reach_all_rows():
    model = attention()
    tokens = np.concatenate([batch[0].ravel() for batch in random_batches(model, signature(model))])
    assert tokens.min() >= 0 and 30 < tokens.max() < 37
