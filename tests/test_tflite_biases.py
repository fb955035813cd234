"""Biases in integers: each in the units of its operator, also of layers that are called several times."""

import keras
import numpy as np
import pytest
from exported_files import run, tensorflow_only
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.biases import own_biases
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job


def called_twice(make, shape):
    """A layer that is called on inputs of two scales, with a bias that matters."""
    keras.utils.set_random_seed(0)
    layer, x = make(), keras.Input(shape, name="x")
    y = layer(layers.Rescaling(20.0)(layer(x)))
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))
    layer.bias.assign(np.random.default_rng(0).uniform(1, 3, layer.bias.shape))
    return model


@tensorflow_only
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.Dense(8, activation="relu"), (8,)),
        (lambda: layers.Conv2D(4, 3, padding="same", activation="relu"), (5, 5, 4)),
        (lambda: layers.DepthwiseConv2D(3, padding="same"), (5, 5, 4)),
    ],
    ids=["dense", "convolution", "depthwise"],
)
@pytest.mark.lengthy(1)
def test_layers_that_are_called_twice(make, shape, tmp_path):
    """With 16-bit activations the converter stores their bias once, in the units of the first call."""
    model = called_twice(make, shape)
    data = np.random.default_rng(1).normal(size=(128, *shape)).astype("float32")
    report = ks.tflite.export(model, tmp_path / "m.tflite", quantize="int16x8", representative_data=data)
    expected = model.predict(data[:1], verbose=0)
    found = run(report.path, x=data[:1])["output_0"]
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    content = (tmp_path / "m.tflite").read_bytes()
    assert own_biases(content) is content  # nothing is left to do
    graph = read(content).subgraphs[0]
    kinds = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
    biases = [op.inputs[2] for op in graph.operators if op.name in kinds]
    assert len(biases) == 3 and len(set(biases)) == 3


@tensorflow_only
def test_files_of_floats_stay(tmp_path):
    content = convert(Job(called_twice(lambda: layers.Dense(8), (8,)))).content
    assert own_biases(content) is content
