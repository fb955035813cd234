"""A network without what GPUs compute wrong: the same outputs by other layers."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.faults import grouped, shifted
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature


def up(kernel=3, stride=2):
    return layers.Conv2DTranspose(5, kernel, stride, padding="same")


def shared(x):
    """A layer that is called twice."""
    layer = layers.Conv2D(6, 3, groups=2, padding="same", name="groups")
    return layer(layer(x))


def nested(x):
    inner = keras.Sequential([keras.Input(x.shape[1:]), up(), layers.Conv2D(4, 1, activation="relu")])
    return layers.Conv2D(6, 3, groups=2, name="groups")(inner(x))


def several(x):
    """Layers of several inputs beside it, and one that takes its input by name."""
    y = layers.MultiHeadAttention(2, 3)(x, x)
    y = layers.Conv1D(6, 3, groups=2, padding="same")(inputs=layers.Add()([y, x]))
    return layers.Concatenate()([y, layers.Attention()([y, y])])


REWRITTEN = {  # the input's shape, what is computed from it, and how many layers are written otherwise
    "odd": ((7, 7, 4), up(), 1),
    "even": ((8, 8, 4), up(), 0),
    "rows only": ((7, 8, 4), up((5, 3)), 1),
    "stride of three": ((16, 5, 4), up(5, 3), 1),
    "relu": ((7, 7, 4), layers.Conv2DTranspose(5, 3, 2, padding="same", activation="relu", use_bias=False), 1),
    "in one dimension": ((7, 4), layers.Conv1DTranspose(5, 3, 2, padding="same"), 1),
    "of any size": ((None, None, 4), up(), 1),
    "groups": ((6, 5, 6), layers.Conv2D(8, 3, groups=2, padding="same", activation="tanh"), 1),
    "groups of four": ((6, 5, 8), layers.Conv2D(8, 3, groups=2), 0),
    "groups, no bias": ((6, 5, 6), layers.Conv2D(6, 3, 2, groups=3, use_bias=False), 1),
    "groups in one dimension": ((9, 6), layers.Conv1D(4, 3, groups=2, padding="causal"), 1),
    "softmax of groups": ((6, 5, 6), layers.Conv2D(4, 3, groups=2, activation="softmax"), 0),
    "beside others": ((9, 6), several, 1),
    "called twice": ((6, 5, 6), shared, 1),
    "nested": ((7, 7, 4), nested, 2),
}


def original(name):
    shape, body, _ = REWRITTEN[name]
    body = body if not isinstance(body, layers.Layer) else type(body).from_config(body.get_config())
    x, rng = keras.Input(shape), np.random.default_rng(0)
    model = keras.Model(x, body(x))
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_for_the_gpu(name):
    model, changes = original(name), REWRITTEN[name][2]
    adapted, report = ks.tflite.adapt(model, "gpu")
    assert len(report.rows) == changes and report.totals["exact"]
    assert bool(report.notes) == (name == "softmax of groups")
    assert adapted.count_params() == model.count_params()
    sample = np.random.default_rng(1).normal(size=(3, *(n or 7 for n in model.input_shape[1:])))
    wanted, found = (keras.ops.convert_to_numpy(one(sample)) for one in (model, adapted))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    if keras.backend.backend() == "tensorflow" and changes and None not in model.input_shape[1:]:
        content = convert(Job(adapted, signature(adapted).with_batch(1))).content
        assert shifted(read(content)) is None and grouped(read(content)) is None


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about files, made the fast way")
@pytest.mark.skipif(available()["gpu-cpu"] is not None, reason="needs a GPU, or SwiftShader")
@pytest.mark.parametrize("name", ["relu", "in one dimension", "groups", "groups in one dimension", "nested"])
def test_what_is_rewritten_is_right_on_the_gpu(name):
    model = original(name)
    adapted, _ = ks.tflite.adapt(model, "gpu")
    called = signature(model).with_batch(1)
    content = convert(Job(adapted, signature(adapted).with_batch(1))).content
    parity = Reference(model, called, random_batches(model, called)).compare_on("gpu-cpu", content)
    assert parity.accelerated and parity.relative < 1e-3


def test_what_cannot_be_split_is_named():
    model = keras.Sequential([keras.Input((6, 5, 6)), layers.Conv2D(8, 3, groups=2)])
    model.layers[0].enable_lora(2)
    adapted, report = ks.tflite.adapt(model, "gpu")
    assert not report.rows and "LoRA" in report.notes[0] and adapted.layers[-1].groups == 2


def test_a_transposed_convolution_with_an_output_padding_is_named():
    body = layers.Conv2DTranspose(5, 3, 2, padding="same", output_padding=1)
    adapted, report = ks.tflite.adapt(keras.Sequential([keras.Input((7, 7, 4)), body]), "gpu")
    assert not report.rows and "`output_padding`" in report.notes[0] and len(adapted.layers) == 2
