"""Sizes that are known are not computed: files of an open batch size are right, and taken, on every accelerator."""

import keras
import numpy as np
import pytest
from exported_files import tensorflow_only
from keras import layers, ops

import keras_sparse as ks
from keras_sparse.tflite import runtimes
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.sizes import settle

pytestmark = tensorflow_only
IMAGE, SEQUENCE = (4, 4, 3), (8, 6)


def shuffled(x):
    x = ops.reshape(layers.Conv2D(8, 1)(x), (-1, 4, 4, 2, 4))
    return layers.Dense(3)(ops.reshape(ops.transpose(x, (0, 1, 2, 4, 3)), (-1, 4, 4, 8)))


def several(x):
    """An output whose size follows while the file runs, which is read as well."""
    y = layers.Conv2DTranspose(2, 3, 2)(x)
    return {"a": y, "b": layers.ReLU()(y), "c": layers.Reshape((9, 18))(y)}


NETWORKS = {  # the shape of the input, and what is made of it
    "reshape": ((6,), lambda x: layers.Reshape((3, 4))(layers.Dense(12)(x))),
    "flatten": (IMAGE, lambda x: layers.Flatten()(layers.Conv2D(5, 3)(x))),
    "dense of sequences": (SEQUENCE, lambda x: layers.LayerNormalization()(layers.Dense(4)(x))),
    "steps as samples": (SEQUENCE, lambda x: layers.Dense(3)(ops.reshape(layers.Dense(4)(x), (-1, 8, 2, 2)))),
    "shuffled": (IMAGE, shuffled),
    "attention": (SEQUENCE, lambda x: layers.MultiHeadAttention(2, 4)(x, x)),
    "transposed": (IMAGE, lambda x: layers.Conv2DTranspose(5, 3, 2)(x)),
    "transposed, padded": (IMAGE, lambda x: layers.Conv2DTranspose(5, 4, 2, padding="same")(x)),
    "top k": ((6,), lambda x: ops.top_k(layers.Dense(8)(x), 3)[0]),
    "several": (IMAGE, several),
}
COMPUTED = {"SHAPE", "PACK", "GATHER", "REDUCE_PROD"}


def network(name, batch_size=None):
    keras.utils.set_random_seed(0)
    shape, make = NETWORKS[name]
    x = keras.Input(shape, batch_size=batch_size, name="x")
    model, rng = keras.Model(x, make(x)), np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return model


def check(model, path, runtime, count=1, tolerance=1e-5):
    x = np.random.default_rng(1).normal(size=(count, *model.input.shape[1:])).astype("float32")
    found = list(runtimes.run(path, {"x": x}, runtime).values())
    expected = [ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x))]
    assert len(found) == len(expected)
    for values, right in zip(found, expected, strict=True):
        assert values.shape == right.shape
        np.testing.assert_allclose(values, right, atol=tolerance * np.abs(right).max())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.lengthy(2)
def test_right_where_a_size_is_open(name, tmp_path):
    """LiteRT's `CompiledModel` read zeros, or ended, where the size of an output follows while the file runs."""
    model = network(name)
    report = ks.tflite.export(model, tmp_path / "m.tflite")
    check(model, report.path, "native", count=3)
    check(model, report.path, "compiled-cpu")
    graph = read(report.path).subgraphs[0]
    if not any(operator.name == "TRANSPOSE_CONV" for operator in graph.operators):
        assert not COMPUTED & {operator.name for operator in graph.operators}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("runtime", ["wasm", "gpu-cpu"])
def test_right_on_accelerators_where_a_size_is_open(runtime, name, tmp_path):
    """LiteRT.js read whatever was in memory; the GPU refuses what it cannot compute."""
    if (missing := runtimes.available()[runtime]) is not None:
        pytest.skip(missing)
    model = network(name)
    report = ks.tflite.export(model, tmp_path / "m.tflite")
    refused = runtime == "gpu-cpu" and name in ("transposed", "transposed, padded", "top k", "several")
    if refused:
        with pytest.raises(ValueError, match="dynamic-sized"):
            check(model, report.path, runtime)
    else:
        check(model, report.path, runtime, tolerance=2e-3)


def test_operators_that_write_variables_stay():
    """They make no output that anybody could read."""
    x = keras.Input((5, 4), batch_size=1, name="x")
    model = keras.Model(x, layers.Dense(2)(layers.GRU(3, stateful=True)(x)))
    content = convert(Job(model)).content
    names = [operator.name for operator in read(content).subgraphs[0].operators]
    assert {"CALL_ONCE", "ASSIGN_VARIABLE"} <= set(names) and settle(content) is content


@pytest.mark.parametrize("quantize", ["float16", "dynamic", "int8"])
@pytest.mark.lengthy(1)
def test_in_other_formats(quantize, tmp_path):
    model = network("transposed")
    data = np.random.default_rng(0).normal(size=(64, *IMAGE)).astype("float32")
    report = ks.tflite.export(model, tmp_path / "m.tflite", quantize=quantize, representative_data=data)
    # What makes floats of integers is an operator behind the one whose size follows.
    last = "DEQUANTIZE" if quantize == "int8" else "RESHAPE"
    assert read(report.path).subgraphs[0].operators[-1].name == last
    check(model, report.path, "compiled-cpu", tolerance=0.1)


def test_files_without_open_sizes_are_left_as_they_are():
    for name in NETWORKS:
        content = convert(Job(network(name, batch_size=1))).content
        assert settle(content) is content
    content = convert(Job(network("several"))).content  # settled already, and at one place is enough
    assert [operator.name for operator in read(content).subgraphs[0].operators].count("TRANSPOSE_CONV") == 1


def test_two_open_sizes_stay_computed(tmp_path):
    x = keras.Input((None, 6), name="x")
    model = keras.Model(x, layers.Dense(4)(layers.Dense(5)(x)))
    report = ks.tflite.export(model, tmp_path / "m.tflite")
    samples = np.random.default_rng(1).normal(size=(2, 7, 6)).astype("float32")
    (found,) = runtimes.run(report.path, {"x": samples}).values()
    np.testing.assert_allclose(found, ops.convert_to_numpy(model(samples)), atol=1e-5)
