"""Matches: the weight that a tensor holds, whatever the converter has done to it."""

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import cnn, mlp, nested, several, sparsify

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.matching import LayerNames, match, readers

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def twins():
    """Layers of one size, with names that the converter's own numbering could be taken for."""
    inputs = keras.Input((64,))
    x = layers.Dense(64, name="dense_1", activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(64, name="dense_2")(layers.Dense(64, name="dense")(x)))


def tensors_of(content):
    found = []
    for graph in read(content).subgraphs:
        for number, (operator, _) in readers(graph).items():
            tensor = graph.tensors[number]
            if number >= 0 and tensor.stored is not None and len(tensor.shape) >= 2 and tensor.dtype != "int32":
                found.append((operator, tensor))
    return found


@pytest.mark.parametrize("build", [mlp, cnn, nested, several, twins])
@pytest.mark.parametrize("quantize", [None, "float16", "dynamic"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.thorough(5)
@pytest.mark.lengthy(1)
def test_each_kernel_is_found_once(build, quantize, sparse):
    keras.utils.set_random_seed(0)
    model = sparsify(build(), 0.9 if sparse else 0.0)
    content = convert(Job(model, quantize=quantize)).content
    weights = [weight for weight in ks.selection.weights(model) if weight.kernel]
    tensors = tensors_of(encode(content).content if sparse else content)
    found = match(model, tensors, weights)
    assert sorted(weight.path for weight in found if weight) == sorted(weight.path for weight in weights)
    for (_, tensor), weight in zip(tensors, found, strict=True):
        if weight is not None and build is not cnn:  # whose normalization is folded in
            ours, theirs = np.sort(weight.numpy(), axis=None), np.sort(tensor.real_values(), axis=None)
            np.testing.assert_allclose(theirs, ours, atol=0.02 * np.abs(ours).max())


def test_values_go_before_names():
    """The names are exchanged: a tensor is called after the other layer."""
    model = twins()
    tensors = tensors_of(convert(Job(model)).content)
    names = [tensor.name for _, tensor in tensors]
    for (_, tensor), name in zip(tensors, reversed(names), strict=True):
        tensor.name = name
    weights = ks.selection.weights(model)
    for (_, tensor), weight in zip(tensors, match(model, tensors, weights), strict=True):
        np.testing.assert_allclose(tensor.values().T, weight.numpy(), rtol=1e-6)


def test_names_are_what_is_left():
    """Values that are no layer's, of a size that two have."""
    model = twins()
    tensors = tensors_of(convert(Job(model)).content)
    for weight in model.weights:
        weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    weights = [weight for weight in ks.selection.weights(model) if weight.kernel]
    found = match(model, tensors, weights)
    assert [weight.layer.name for weight in found] == ["dense_1", "dense", "dense_2"]


def test_a_constant_is_no_weight():
    inputs = keras.Input((16, 16))
    x = layers.Dense(16, name="dense")(inputs * np.random.default_rng(0).normal(size=(16, 16)).astype("float32"))
    model = keras.Model(inputs, x)
    tensors = tensors_of(convert(Job(model)).content)
    found = dict(
        zip([operator for operator, _ in tensors], match(model, tensors, ks.selection.weights(model)), strict=True)
    )
    assert found["FULLY_CONNECTED"].path == "dense/kernel" and found["MUL"] is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net/dense_1/MatMul", ["dense_1", "dense"]),
        ("net/dense_2_1/BiasAdd;net/dense/MatMul", ["dense_2", "dense"]),
        ("arith.constant", []),
    ],
)
def test_layers_in_the_name_of_a_tensor(name, expected):
    assert LayerNames(twins()).candidates(name) == expected
