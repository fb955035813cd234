"""Transposed convolutions that LiteRT's GPU accelerator shifts: the rule says what the accelerator does."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference, random_batches
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.transposed import shifted

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")
MISSING = available()["gpu-cpu"]


def network(shape, *body):
    """Layers with biases that are not zero."""
    model = keras.Sequential([keras.Input(shape), *body])
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model


def up(kernel, stride=2, padding="same"):
    return layers.Conv2DTranspose(5, kernel, stride, padding=padding)


CASES = [  # (rows, columns), layers, whether it is shifted
    ((7, 7), [up(3)], True),
    ((8, 8), [up(3)], False),
    ((8, 7), [up(3)], True),
    ((7, 7), [up(3, padding="valid"), layers.Cropping2D(((0, 1), (0, 1)))], False),
    ((7, 7), [up(2)], False),
    ((7, 7), [up(4)], False),
    ((7, 7), [up(5)], True),
    ((7, 8), [up((5, 3))], True),
    ((7, 8), [up((4, 3))], False),
    ((16, 16), [up(5, 3)], True),
    ((17, 17), [up(5, 3)], False),
    ((7, 7), [up(3, 1)], False),
]


@pytest.mark.parametrize(("size", "body", "wrong"), CASES)
@pytest.mark.lengthy(2)
def test_the_rule_is_what_the_accelerator_does(size, body, wrong):
    model = network((*size, 4), *[type(layer).from_config(layer.get_config()) for layer in body])
    called = signature(model).with_batch(1)
    content = convert(Job(model, called)).content
    assert bool(shifted(read(content))) == wrong
    if MISSING is None:
        parity = Reference(model, called, random_batches(model, called)).compare_on("gpu-cpu", content)
        assert parity.accelerated and (parity.relative > 1e-2) == wrong


def test_it_is_said_and_refused(tmp_path):
    """Without a GPU runtime as well."""
    model = network((7, 7, 4), up(3))
    with pytest.raises(ks.tflite.ExportError, match="not for the target 'gpu'.*shifts.*Cropping2D"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="gpu")
    assert not (tmp_path / "m.tflite").exists()
    report = ks.tflite.check(model, "gpu")
    assert report.verdict == "refused" and any("shifts" in note for note in report.notes)
    report = ks.tflite.export(model, tmp_path / "m.tflite")
    for notes in (report.notes, ks.tflite.inspect(tmp_path / "m.tflite").notes):
        assert any(note.startswith("Not for GPUs: ") for note in notes)
    assert ks.tflite.export(model, tmp_path / "m.tflite", target="micro").bytes_file


@pytest.mark.parametrize("damage", ["no stride", "one input"])
def test_a_damaged_file(damage, tmp_path):
    file = File(convert(Job(network((7, 7, 4), up(3)))).content)
    (operator,) = [o for o in file.model.subgraphs[0].operators if file.name(o) == "TRANSPOSE_CONV"]
    if damage == "no stride":
        operator.builtinOptions.strideH = 0
    else:
        operator.inputs = operator.inputs[:1]
    (tmp_path / "m.tflite").write_bytes(file.pack())
    with pytest.raises(ValueError, match="damaged or truncated"):
        ks.tflite.inspect(tmp_path / "m.tflite")
