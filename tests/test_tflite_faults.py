"""Operators that an accelerator computes wrong: the rule says what the accelerator does."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.faults import averaged, broadcast, grouped, resized, shifted, strided
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import CALIBRATED, Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")
MISSING = available()


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
@pytest.mark.lengthy(1)
def test_the_gpu_shifts_what_the_rule_says(size, body, wrong):
    model = network((*size, 4), *[type(layer).from_config(layer.get_config()) for layer in body])
    called = signature(model).with_batch(1)
    content = convert(Job(model, called)).content
    assert bool(shifted(read(content))) == wrong
    if MISSING["gpu-cpu"] is None:
        parity = Reference(model, called, random_batches(model, called)).compare_on("gpu-cpu", content)
        assert parity.accelerated and (parity.relative > 1e-2) == wrong


@pytest.mark.slow
def test_a_shift_is_said_and_refused(tmp_path):
    """Without a GPU runtime as well."""
    model = network((7, 7, 4), up(3))
    with pytest.raises(ks.tflite.ExportError, match="not for the target 'gpu'.*shifts.*adapt"):
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


GROUPS = [  # number, channels in and out of each, and whether the GPU computes them wrong
    (2, 4, 8, False),
    (2, 3, 4, True),
    (2, 4, 6, True),
    (2, 12, 4, False),
    (6, 1, 1, False),
    (6, 1, 2, True),
    (4, 2, 2, True),
    (3, 8, 2, True),
    (2, 6, 4, True),
    (1, 6, 5, False),
]


def in_groups(groups, inputs, outputs):
    """A grouped convolution between others, whose outputs a GPU could spoil as well."""
    body = layers.Conv2D(groups * inputs, 1), layers.Conv2D(groups * outputs, 3, groups=groups, padding="same")
    return network((6, 5, 4), *body, layers.Conv2D(4, 1))


@pytest.mark.parametrize(("groups", "inputs", "outputs", "wrong"), GROUPS)
@pytest.mark.lengthy(1)
def test_the_gpu_computes_groups_wrong_as_the_rule_says(groups, inputs, outputs, wrong):
    model = in_groups(groups, inputs, outputs)
    called = signature(model).with_batch(1)
    content = convert(Job(model, called)).content
    assert bool(grouped(read(content))) == wrong
    if MISSING["gpu-cpu"] is None:
        try:
            parity = Reference(model, called, random_batches(model, called)).compare_on("gpu-cpu", content)
        except ValueError as error:  # as it is for channels of more than one vector
            assert wrong and "the process was ended" in str(error)
        else:
            assert (parity.relative > 1e-2) == wrong


@pytest.mark.slow
def test_wrong_groups_are_said_and_refused(tmp_path):
    model, path = in_groups(2, 3, 4), tmp_path / "m.tflite"
    with pytest.raises(ks.tflite.ExportError, match="not for the target 'gpu'.*2 groups of 3 channels to 4"):
        ks.tflite.export(model, path, target="gpu")
    assert not path.exists() and ks.tflite.check(model, "gpu").verdict == "refused"
    for notes in (ks.tflite.export(model, path).notes, ks.tflite.inspect(path).notes):
        assert any(note.startswith("Not for GPUs: ") for note in notes)


def dense(x):
    return layers.Dense(8)(x)


def row(x):
    return ops.reshape(dense(x)[:, :1], (8,))


COMBINED = {  # the input's shape, what is computed from it, and whether a GPU does it wrong in integers
    "vectors": ((12,), lambda x: dense(x) + dense(x), True),
    "sequences": ((16, 12), lambda x: dense(x) + dense(x), False),
    "a row": ((16, 12), lambda x: dense(x) * row(x), True),
    "the larger of a row": ((16, 12), lambda x: ops.maximum(row(x), dense(x)), True),
    "difference to a matrix": ((16, 12), lambda x: dense(x) - ops.reshape(dense(x), (16, 8)), True),
    "squared difference": ((16, 12), lambda x: ops.square(dense(x) - row(x)), True),
    "a constant": ((16, 12), lambda x: dense(x) + np.arange(8.0, dtype="float32") / 8, False),
    "pooled": ((6, 6, 4), lambda x: layers.Conv2D(8, 1)(x) * ops.max(layers.Conv2D(8, 1)(x), axis=(1, 2)), True),
    "pooled, of four": (
        (6, 6, 4),
        lambda x: layers.Conv2D(8, 1)(x) * ops.max(layers.Conv2D(8, 1)(x), axis=(1, 2), keepdims=True),
        False,
    ),
    "product of matrices": ((16, 12), lambda x: ops.matmul(dense(x), ops.reshape(dense(x), (8, 16))), False),
}


def combining(name):
    shape, function, _ = COMBINED[name]
    x, rng = keras.Input(shape), np.random.default_rng(0)
    model = keras.Model(x, function(x))
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model, rng.normal(size=(32, *shape)).astype("float32")


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.lengthy(0)
def test_the_gpu_combines_integers_wrong_as_the_rule_says(name):
    (model, x), wrong = combining(name), COMBINED[name][2]
    called, samples = signature(model).with_batch(1), [[sample[None]] for sample in x]
    for mode in (None, "float16", "dynamic", "int8") if name in ("a row", "sequences") else ("int8",):
        content = convert(Job(model, called, mode, samples if mode == "int8" else [])).content
        assert bool(broadcast(read(content))) == (wrong and mode == "int8")
        if MISSING["gpu-cpu"] is None:
            parity = Reference(model, called, samples[:4]).compare_on("gpu-cpu", content)
            assert (parity.relative > 0.3) == (wrong and mode == "int8")


@pytest.mark.slow
def test_a_wrong_combination_is_said_and_refused(tmp_path):
    (model, x), path = combining("vectors"), tmp_path / "m.tflite"
    options = {"quantize": "int8", "representative_data": x}
    with pytest.raises(ks.tflite.ExportError, match="not for the target 'gpu'.*ADD of 8-bit integers of 2 and of 1"):
        ks.tflite.export(model, path, target="gpu", **options)
    assert not path.exists()
    report = ks.tflite.export(model, path, batch_size=1, **options)
    assert any(
        note.startswith("Not for GPUs: LiteRT's GPU accelerator computes zeros from ADD") for note in report.notes
    )
    ks.tflite.export(model, path, target="gpu", quantize="float16")


STRIDES = {  # size of the input, layer, and whether a GPU overlooks its strides in integers
    "1x1": ((8, 8), lambda: layers.Conv2D(8, 1, strides=2), True),
    "1x1, odd": ((9, 7), lambda: layers.Conv2D(8, 1, strides=3, padding="same", activation="relu"), True),
    "rows": ((8, 8), lambda: layers.Conv2D(8, 1, strides=(2, 1)), True),
    "two rows": ((2, 8), lambda: layers.Conv2D(8, 1, strides=(2, 1)), False),
    "columns of two rows": ((2, 8), lambda: layers.Conv2D(8, 1, strides=2), True),
    "one pixel is left": ((2, 2), lambda: layers.Conv2D(8, 1, strides=2), False),
    "groups": ((8, 8), lambda: layers.Conv2D(16, 1, strides=2, groups=2), True),
    "1x2": ((8, 8), lambda: layers.Conv2D(8, (1, 2), strides=2, padding="same"), False),
    "3x3": ((8, 8), lambda: layers.Conv2D(8, 3, strides=2, padding="same"), False),
    "no stride": ((8, 8), lambda: layers.Conv2D(8, 1), False),
    "depthwise": ((8, 8), lambda: layers.DepthwiseConv2D(1, strides=2), False),
    "transposed": ((8, 8), lambda: layers.Conv2DTranspose(8, 1, strides=2), False),
    "sequence": ((16,), lambda: layers.Conv1D(8, 1, strides=2), True),
    "sequence, 3": ((16,), lambda: layers.Conv1D(8, 3, strides=2), False),
}


def striding(name):
    """A network of a convolution, and samples."""
    size, layer, _ = STRIDES[name]
    model, rng = network((*size, 144), layer()), np.random.default_rng(0)  # with fewer, "dynamic" leaves them in floats
    return model, rng.normal(size=(32, *size, 144)).astype("float32")


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.lengthy(0)
def test_the_gpu_overlooks_strides_as_the_rule_says(name):
    (model, x), wrong = striding(name), STRIDES[name][2]
    called, samples = signature(model).with_batch(1), [[sample[None]] for sample in x]
    for mode in (None, "float16", "dynamic", "int8", "int16x8") if name == "1x1" else ("dynamic", "int8"):
        content = convert(Job(model, called, mode, samples if mode in CALIBRATED else [])).content
        assert bool(strided(read(content))) == (wrong and mode in ("dynamic", "int8"))
        if MISSING["gpu-cpu"] is None:
            parity = Reference(model, called, samples[:4]).compare_on("gpu-cpu", content)
            assert (parity.relative > 0.3) == (wrong and mode in ("dynamic", "int8"))


def test_strides_on_images_of_open_size():
    model = keras.Sequential([keras.Input((None, None, 8)), layers.Conv2D(7, 1, strides=2)])
    samples = [[np.ones((1, 8, 8, 8), "float32")]]
    assert strided(read(convert(Job(model, quantize="int8", samples=samples)).content))


@pytest.mark.slow
def test_strides_are_said_and_refused(tmp_path):
    (model, x), path = striding("1x1"), tmp_path / "m.tflite"
    options = {"quantize": "int8", "representative_data": x}
    with pytest.raises(ks.tflite.ExportError, match=r"not for the target 'gpu'.*1x1 convolution.*\(2x2\).*float16"):
        ks.tflite.export(model, path, target="gpu", **options)
    assert not path.exists()
    for notes in (ks.tflite.export(model, path, batch_size=1, **options).notes, ks.tflite.inspect(path).notes):
        assert any(note.startswith("Not for GPUs: LiteRT's GPU accelerator overlooks the strides") for note in notes)
    ks.tflite.export(model, path, target="gpu", quantize="float16")


AVERAGES = {  # what is computed from images of 6x5 with 8 channels, and whether LiteRT.js does it wrong in integers
    "layer normalization": (layers.LayerNormalization(), True),
    "mean of images": (layers.GlobalAveragePooling2D(), False),
    "RMS normalization": (layers.RMSNormalization(), True),
    "unit norm": (layers.UnitNormalization(), True),
    "mean of channels": (lambda x: ops.mean(x, axis=-1), True),
    "sum of columns and channels": (lambda x: ops.sum(x, axis=(2, 3)), True),
    "mean of rows and channels": (lambda x: ops.mean(x, axis=(1, 3), keepdims=True), True),
    "mean of rows": (lambda x: ops.mean(x, axis=1), False),
    "sum of columns": (lambda x: ops.sum(x, axis=2, keepdims=True), False),
    "largest of channels": (lambda x: ops.max(x, axis=-1), False),
    "softmax": (layers.Softmax(), False),
}


def averaging(name):
    """A convolution, and what comes after it; and samples, calibrated for integers."""
    x = keras.Input((6, 5, 4))
    model = keras.Model(x, AVERAGES[name][0](layers.Conv2D(8, 1)(x)))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model, rng.normal(size=(32, 6, 5, 4)).astype("float32")


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.lengthy(1)
def test_browsers_average_wrong_what_the_rule_says(name):
    (model, x), wrong = averaging(name), AVERAGES[name][1]
    called, samples = signature(model).with_batch(1), [[row[None]] for row in x]
    if name == "layer normalization":
        assert averaged(read(convert(Job(model, called, "float16")).content)) is None
    content = convert(Job(model, called, "int8", samples)).content
    assert bool(averaged(read(content))) == wrong
    reference = Reference(model, called, samples)
    assert reference.compare(content).relative < 0.1
    if MISSING["wasm"] is None:
        assert (reference.compare_on("wasm", content).relative > 0.2) == wrong


@pytest.mark.slow
def test_a_wrong_average_is_said_and_refused(tmp_path):
    """Without a runtime for browsers as well."""
    (model, x), path = averaging("layer normalization"), tmp_path / "m.tflite"
    options = {"quantize": "int8", "representative_data": x}
    with pytest.raises(ks.tflite.ExportError, match="not for the target 'xnnpack-wasm'.*the last axis.*quantize='dyna"):
        ks.tflite.export(model, path, target="xnnpack-wasm", **options)
    assert not path.exists()
    for notes in (ks.tflite.export(model, path, batch_size=1, **options).notes, ks.tflite.inspect(path).notes):
        assert any(note.startswith("Not for browsers: LiteRT.js") for note in notes)
    if MISSING["wasm"] is None:
        report = ks.tflite.verify(path, model, "wasm", data=x)
        assert not report.right and report.totals["tolerance"] < 0.2 and ks.tflite.verify(path, model, data=x).right
    for mode in ("dynamic", "float16"):
        ks.tflite.export(model, path, target="xnnpack-wasm", quantize=mode)


@pytest.mark.slow
def test_an_axis_that_is_computed_may_be_the_last():
    model, x = averaging("mean of rows")
    file = File(convert(Job(model, signature(model).with_batch(1), "int8", [[row[None]] for row in x])).content)
    (operator,) = [o for o in file.model.subgraphs[0].operators if file.name(o) == "MEAN"]
    assert averaged(read(file.pack())) is None
    file.model.subgraphs[0].tensors[operator.inputs[1]].buffer = 0
    assert "the last axis" in averaged(read(file.pack()))


RECURRENT = {  # layers on sequences, and whether a size is computed
    "LSTM": ([layers.LSTM(4)], False),
    "SimpleRNN, sequences": ([layers.SimpleRNN(4, return_sequences=True)], True),
    "LSTM, sequences, unrolled": ([layers.LSTM(4, return_sequences=True, unroll=True)], False),
    "LSTM, sequences": ([layers.LSTM(4, return_sequences=True)], True),
    "GRU, sequences": ([layers.GRU(4, return_sequences=True)], True),
    "two LSTM": ([layers.LSTM(4, return_sequences=True), layers.LSTM(4)], True),
    "both directions": ([layers.Bidirectional(layers.LSTM(4))], False),
    "both directions, sequences": ([layers.Bidirectional(layers.GRU(4, return_sequences=True))], True),
    "convolutions": ([layers.Conv1D(8, 3), layers.MaxPooling1D(2), layers.Flatten(), layers.Dense(3)], False),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.lengthy(3)
def test_microcontrollers_have_no_memory_for_computed_sizes(name):
    body, wrong = RECURRENT[name]
    model = network((4, 3), *(type(layer).from_config(layer.get_config()) for layer in body))
    called = signature(model).with_batch(1)
    content = convert(Job(model, called)).content
    assert bool(resized(read(content))) == wrong
    if MISSING["micro"] is None:
        x = np.random.default_rng(0).normal(size=(1, 4, 3)).astype("float32")
        try:
            parity = Reference(model, called, [[x]]).compare_on("micro", content, timeout=20).relative
        except (TimeoutError, ValueError):  # what is overwritten may be anything
            parity = np.inf
        assert (parity < 1e-4) != wrong


@pytest.mark.slow
def test_a_computed_size_is_said_and_refused(tmp_path):
    """Without TFLite Micro as well; the export waited two minutes, and wrote a file that never ends there."""
    model, path = network((16, 12), layers.LSTM(8, return_sequences=True)), tmp_path / "m.tflite"
    with pytest.raises(ks.tflite.ExportError, match="not for the target 'micro'.*never ends.*`unroll=True`"):
        ks.tflite.export(model, path, target="micro")
    assert not path.exists() and ks.tflite.check(model, "micro").verdict == "refused"
    notes = ks.tflite.export(model, path).notes
    assert any(note.startswith("Not for microcontrollers: TFLite Micro computes wrong") for note in notes)
    ks.tflite.export(network((16, 12), layers.LSTM(8, return_sequences=True, unroll=True)), path, target="micro")
