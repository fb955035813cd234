"""Parity: inputs that a model can take, in every form, and differences that are found."""

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import mlp

from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature


class Labels(layers.Layer):
    def call(self, x):
        return keras.ops.top_k(x, 1)[1][..., 0]


def test_class_numbers_are_compared_by_how_many_are_others():
    """By their magnitude, one that is another counts for all."""
    image = keras.Input((16, 16, 3), name="image")
    scores = layers.Conv2D(21, 1)(layers.Conv2D(64, 3, activation="relu")(image))
    model = keras.Model(image, Labels()(scores))
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    content = convert(Job(model, called, "dynamic")).content
    found = reference.compare(content)
    assert found.absolute > 1 and 0 < found.relative < 1e-3
    for weight in model.weights:
        weight.assign(keras.random.normal(weight.shape))
    assert Reference(model, called, random_batches(model, called)).compare(content).relative > 0.4
    assert reference.alike(0.1) == []


def test_a_difference_is_found():
    """A file of one model against another model: the numbers are those of NumPy."""
    inputs = keras.Input((4,))
    first, second = (keras.Model(inputs, layers.Dense(3, name="d")(inputs)) for _ in range(2))
    called = signature(first)
    content = convert(Job(first, called)).content
    batches = random_batches(first, called)
    assert Reference(first, called, batches).compare(content).relative < 1e-5
    found = Reference(second, called, batches).compare(content)
    pairs = [[keras.ops.convert_to_numpy(m(batch[0])) for m in (first, second)] for batch in batches]
    assert found.absolute == pytest.approx(max(np.abs(a - b).max() for a, b in pairs), rel=1e-4)
    typical = np.median([np.abs(b).max() for _, b in pairs])
    ratios = [np.abs(a - b).max() / max(np.abs(b).max(), typical) for a, b in pairs]
    assert found.relative == pytest.approx(max(ratios), rel=1e-4)
    assert found.worst == "output_0"


def test_a_sample_whose_only_output_is_near_zero():
    """What is rounded for the others is not all that is there: integers of 8 bits know nothing smaller."""
    inputs = keras.Input((1,), name="x")
    model = keras.Model(inputs, layers.Dense(1, kernel_initializer="ones")(inputs))
    x = np.array([0.5, -0.5, 0.4, -0.3, 1e-4, 0.25], "float32")[:, None, None]
    job = Job(model, quantize="int8", samples=[[one] for one in x])
    found = Reference(model, job.signature, job.samples).compare_on("native", convert(job).content)
    assert found.absolute <= 1 / 250 and found.relative <= found.absolute / 0.25


def test_a_model_that_fails_on_random_inputs():
    class Picky(layers.Layer):
        def compute_output_shape(self, shape):
            return shape

        def call(self, x):
            raise ValueError("only positive numbers")

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Picky()(inputs))
    called = signature(model)
    with pytest.raises(ExportError, match="representative_data(.|\n)*only positive numbers"):
        Reference(model, called, random_batches(model, called))


@pytest.mark.parametrize("runtime", ["native", "x86-no-avx", "wasm"])
@pytest.mark.lengthy(1)
def test_other_runtimes(runtime):
    if available()[runtime] is not None:
        pytest.skip(available()[runtime])
    model = mlp()
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    content = convert(Job(model, called)).content
    assert reference.compare_on(runtime, content).relative < 1e-5
    with pytest.raises(TimeoutError):
        reference.compare_on(runtime, content, timeout=0.01)


@pytest.mark.parametrize(("runtime", "takes"), [("compiled-cpu", False), ("x86-no-avx", True)])
def test_open_sizes_at_a_fixed_batch(runtime, takes):
    """A runtime that cannot resize says so, one that can does, though the batch size is none that is open."""
    if available()[runtime] is not None:
        pytest.skip(available()[runtime])
    inputs = keras.Input((None, None, 3), batch_size=1)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(inputs)))
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    content = convert(Job(model, called)).content
    if takes:
        assert reference.compare_on(runtime, content).relative < 1e-5
    else:
        with pytest.raises(ValueError, match="takes arrays of shape"):
            reference.compare_on(runtime, content)
