"""Halves: what half precision cannot hold stays in float32."""

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from tflite_models import mlp

import keras_sparse as ks
from keras_sparse.quiet import quiet
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.halves import halve, kept_whole
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.signatures import signature

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def scaled(first, inputs=12):
    values = keras.Input((inputs,), name="values")
    return keras.Model(values, layers.Dense(1)(layers.Dense(64, activation="tanh")(first(values))))


def masked(x):
    return keras.ops.where(x > 0, x, -1e9 * keras.ops.ones_like(x)) / 1e9


@pytest.mark.parametrize(
    ("first", "scale"),
    [
        (layers.Rescaling(2.0**-31), 2.0**31),  # melts into the kernel
        (layers.Normalization(mean=0.0, variance=1e18), 1e9),
        (layers.Normalization(mean=np.zeros(12), variance=[1.0] * 11 + [1e18]), np.array([1.0] * 11 + [1e9])),
        (layers.Normalization(mean=0.0, variance=1e-12), 1e-6),
    ],
)
@pytest.mark.thorough(2)
def test_scales_are_kept(first, scale, tmp_path):
    model = scaled(first)
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize="float16")
    assert "half precision loses numbers of this size" in report.notes[0] and report.parity_relative < 1e-2
    values = (scale * np.random.default_rng(0).normal(size=(32, 12))).astype("float32")
    with quiet():
        got = Interpreter(str(report.path)).get_signature_runner()(values=values)["output_0"]
    right = keras.ops.convert_to_numpy(model(values))
    assert np.abs(got - right).max() < 1e-2 * np.abs(right).max() and right.std() > 0.1


def test_weights_are_halved():
    """As TensorFlow's converter does, but for small vectors."""
    model = mlp()
    model.layers[1].bias.assign(np.linspace(-1, 1, 96))
    content = convert(Job(model)).content
    halved = halve(content)
    assert sorted(t.dtype for t in read(halved).subgraphs[0].tensors if t.stored is not None) == ["float16"] * 3
    assert kept_whole(halved) == [] and len(halved) < 0.55 * len(content)
    called = signature(model)
    batches = [[np.random.default_rng(0).normal(size=(3, 64))]]
    assert 1e-6 < Reference(model, called, batches).compare(halved).relative < 1e-2


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        (lambda w: w, False),
        (lambda w: np.where(np.arange(64)[:, None] == 5, 1e-7 * w, w), True),  # the weights of one input
        (lambda w: np.where(np.arange(96) == 5, 1e6 * w, w), True),  # and of one output
        (lambda w: np.where(np.random.default_rng(0).random(w.shape) < 0.1, 1e-7 * w, w), False),
        (lambda w: np.where(np.random.default_rng(0).random(w.shape) < 0.9, 0.0, w), False),
    ],
)
def test_what_is_lost(change, whole):
    model = mlp()
    model.layers[1].kernel.assign(change(keras.ops.convert_to_numpy(model.layers[1].kernel)))
    assert bool(kept_whole(convert(Job(model, quantize="float16")).content)) == whole
