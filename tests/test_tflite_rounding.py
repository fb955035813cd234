"""What rounding may do is measured on the model: a fault that is small beside the worst network's rounding is seen."""

import keras
import numpy as np
import pytest
from tflite_models import cnn, conv3d, lstm, mlp, sparsify

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.rounding import TOLERANCE, allowed
from keras_sparse.tflite.signatures import signature

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def made(build):
    keras.utils.set_random_seed(0)
    model, rng = sparsify(build(), 0.9), np.random.default_rng(0)
    for weight in model.weights:
        if weight.name == "bias":
            weight.assign(rng.normal(size=weight.shape) / 3)
    return model


@pytest.mark.parametrize("quantize", ["float16", "dynamic", "int8", "int16x8"])
@pytest.mark.lengthy(0)
def test_files_of_other_weights_are_wrong(quantize, tmp_path):
    """Those of a model of which one bias is missing, and a class in another's place."""
    model, other, path = made(mlp), made(mlp), tmp_path / "m.tflite"
    x = np.random.default_rng(1).normal(size=(16, *model.input_shape[1:])).astype("float32")
    options = {"quantize": quantize, "representative_data": x, "batch_size": 1}
    ks.tflite.export(model, path, **options)
    assert ks.tflite.verify(path, model, data=x).right
    other.layers[1].bias.assign(0 * other.layers[1].bias)
    ks.tflite.export(other, path, **options)
    assert not ks.tflite.verify(path, model, data=x).right
    last, other = model.layers[-1], made(mlp)
    other.layers[-1].set_weights([value[..., ::-1] for value in last.get_weights()])
    ks.tflite.export(other, path, **options)
    assert not ks.tflite.verify(path, model, data=x).right


@pytest.mark.slow
def test_files_that_compute_in_integers_in_part(tmp_path):
    """TFLite's kernels for three dimensions take floats: only the bias is added in integers."""
    model, path = made(conv3d), tmp_path / "m.tflite"
    x = np.random.default_rng(1).normal(size=(16, *model.input_shape[1:])).astype("float32")
    ks.tflite.export(model, path, quantize="int8", representative_data=x)
    found = ks.tflite.verify(path, model, data=x)
    assert found.right and 1e-3 < found.totals["parity_relative"] < 0.5 * found.totals["tolerance"]
    assert ks.tflite.verify(path, model).right


@pytest.mark.parametrize("build", [mlp, cnn, pytest.param(lstm, marks=pytest.mark.slow)])
def test_the_model_keeps_its_weights(build):
    model = made(build)
    before = [weight.numpy() for weight in model.weights]
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    for quantize in ("float16", "dynamic", "int8", "int16x8"):
        assert reference.with_weights(lambda weight: None).relative == 0
        assert 0 < allowed(reference, quantize) < TOLERANCE[quantize]
    assert allowed(reference, None) == TOLERANCE["float32"]
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.weights, strict=True))
    content = convert(Job(model, quantize="dynamic")).content
    assert content and allowed(reference, "dynamic") < 0.1


def test_outputs_that_depend_on_no_weight_are_allowed_what_any_is():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.ReLU()(inputs))
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    assert allowed(reference, "dynamic") == TOLERANCE["dynamic"]


@pytest.mark.parametrize("offset", [0.0, 80.0])
def test_export_says_if_rounding_the_weights_does_not_explain_what_a_file_is_off_by(offset, tmp_path):
    """Numbers near 80 take one scale of 8 bits, on which their differences are lost."""
    inputs = keras.Input((16,), 1)
    hidden = keras.layers.Dense(16, bias_initializer="normal")(inputs)
    hidden = keras.layers.ReLU()(keras.layers.Rescaling(1.0, offset)(hidden))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Rescaling(1.0, -offset)(hidden)))
    x = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
    found = ks.tflite.export(model, tmp_path / "m.tflite", quantize="int8", representative_data=x)
    said = [note for note in found.notes if "rounding the weights explains" in note]
    assert len(said) == (offset > 0) and (tmp_path / "m.tflite").exists()
