"""Encoding: what is read back is what was there, and nothing becomes larger."""

import re
import tempfile

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import MODELS, cnn, conv3d, image_model, mlp, sparsify, stem

import keras_sparse as ks
from keras_sparse.quiet import quiet
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode, fill
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.verification import Verification

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


MISSING = available()


def dense(model, quantize=None):
    return convert(Job(model, quantize=quantize)).content


def stored(content):
    """All weights of a file as bytes of what they mean as floats, without -0.0, sorted."""
    tensors = [t for graph in read(content).subgraphs for t in graph.tensors]
    return sorted((t.shape, (t.real_values() + 0).tobytes()) for t in tensors if t.stored is not None)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "dynamic"])
@pytest.mark.parametrize("kind", [*MODELS, "conv3d"])
@pytest.mark.thorough(10)
def test_values_are_kept(kind, quantize):
    keras.utils.set_random_seed(0)
    content = dense(sparsify(conv3d() if kind == "conv3d" else MODELS[kind](), 0.9), quantize)
    encoded = encode(content)
    assert stored(encoded.content) == stored(content)
    # What is encoded already is left as it is.
    assert stored(encode(encoded.content).content) == stored(content)


def kernels(content):
    return [t for graph in read(content).subgraphs for t in graph.tensors if t.stored is not None and len(t.shape) > 1]


@pytest.mark.parametrize("seed", range(6))
def test_random_kernels(seed):
    rng = np.random.default_rng(seed)
    inputs, units = (int(n) for n in rng.integers(1, 700, 2))
    model = keras.Sequential([keras.Input((inputs,)), layers.Dense(units, use_bias=False)])
    sparsity = rng.choice([0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
    kernel = rng.normal(size=(inputs, units)).astype("float32") * (rng.random((inputs, units)) >= sparsity)
    kernel[rng.random((inputs, units)) < 0.01] = -0.0
    kernel[rng.random((inputs, units)) < 0.001] = np.nan
    model.layers[0].kernel.assign(kernel)
    content = dense(model)
    encoded = encode(content).content
    assert stored(encoded) == stored(content)
    (before,), (after,) = kernels(content), kernels(encoded)
    assert after.bytes <= before.bytes and len(encoded) <= len(content) + 200
    # An index takes one byte for up to 256 inputs, two above.
    values = np.count_nonzero(kernel)
    smaller = values * (5 if inputs <= 256 else 6) + 4 * units + 300 < 4 * kernel.size
    assert after.encoding != "dense" or not smaller


def wide():
    """A convolution and a Dense layer of more than 256 inputs and fewer outputs, which block rows do not suit."""
    inputs = keras.Input((6, 6, 300))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(280, 3, activation="relu")(layers.Conv2D(40, 1)(inputs)))
    return keras.Model(inputs, layers.Dense(30)(layers.Dense(300, activation="relu")(x)))


@pytest.mark.everywhere
@pytest.mark.parametrize("quantize", [None, "float16", "dynamic"])
@pytest.mark.lengthy(0)
def test_rows_lie_along_the_shorter_axis(quantize, tmp_path):
    keras.utils.set_random_seed(0)
    model = wide()
    for bias in model.weights[1::2]:
        bias.assign(np.random.default_rng(0).normal(size=bias.shape))
    ks.prune(model, 0.8)
    content = dense(model, quantize)
    assert stored(encode(content).content) == stored(content)
    others = [runtime for runtime in ("x86-no-avx", "wasm") if MISSING[runtime] is None]
    verify = "strict" if others else "auto"
    report = ks.tflite.export(model, tmp_path / "wide.tflite", target="xnnpack", quantize=quantize, verify=verify)
    rows = [row for row in report.rows if row["shape"][0] in (30, 40)]  # [outputs, ..., inputs]
    width = {None: 4, "float16": 2, "dynamic": 1}[quantize]
    for row in rows:
        nonzero = round((1 - row["sparsity"]) * np.prod(row["shape"]))
        assert row["bytes"] <= nonzero * (width + 1) + 2 * (row["shape"][-1] + 1), "a byte for each place in a row"
    assert len(rows) == 2 and len(report.verified_on) == 1 + len(others)


@pytest.mark.slow
@pytest.mark.parametrize("build", [cnn, mlp])
@pytest.mark.parametrize("sparsity", [0.4, 0.6, 0.9])
def test_smaller_than_tensorflows_own(build, sparsity):
    import tensorflow as tf

    model = sparsify(build(), sparsity)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.export(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        own = converter.convert()
    # Tables, names and alignment may differ by some bytes.
    assert len(encode(dense(model)).content) <= len(own) + 1024


def test_what_is_shared_stays_shared():
    """One layer used twice, and a kernel that is an output as well."""
    inputs = keras.Input((64,))
    shared = layers.Dense(64)
    model = sparsify(keras.Model(inputs, shared(layers.ReLU()(shared(inputs)))), 0.9)
    content = dense(model)
    encoded = encode(content).content
    assert len(encoded) < len(content) / 3
    called = signature(model)
    assert Reference(model, called, random_batches(model, called)).compare(encoded).relative < 1e-5


@pytest.mark.parametrize(("height", "width", "moved"), [(32, 32, 1), (32, 33, 1), (33, 33, 0), (None, None, 0)])
def test_the_way_in_is_closed_without_a_change(height, width, moved):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((height, width, 3))
    x = layers.Conv2D(64, 1, activation="relu")(stem(inputs))
    model = sparsify(keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x))), 0.9)
    content = dense(model)
    closed = encode(content, engage=False)
    # At odd sizes the converter has folded the padding into "same", which is no way in.
    assert closed.moved == moved and encode(content).moved == 0
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    assert abs(reference.compare(closed.content).relative) < 1e-6
    paddings = [
        tuple(graph.tensors[o.inputs[1]].values().ravel()[2:6])
        for graph in read(closed.content).subgraphs
        for o in graph.operators
        if o.name == "PAD"
    ]
    expected = {(32, 32): [(1, 0, 1, 0)], (32, 33): [(1, 0, 1, 1)], (33, 33): [], (None, None): [(1, 1, 1, 1)]}
    assert paddings == expected[height, width]


def two_stems(padded):
    return [layers.Conv2D(8, 3, 2)(padded) for _ in range(2)]


def two_paddings(inputs):
    """The converter makes one of them."""
    return [layers.Conv2D(8, 3, 2)(layers.ZeroPadding2D(1)(inputs)) for _ in range(2)]


@pytest.mark.parametrize(
    ("body", "moved", "paddings"),
    [
        (two_paddings, 2, 1),
        (lambda x: two_stems(layers.ZeroPadding2D(1)(x)), 2, 1),
        (lambda x: (lambda y: [*two_stems(y), layers.MaxPooling2D(3, 2)(y)])(layers.ZeroPadding2D(1)(x)), 2, 2),
        (lambda x: (lambda y: [*two_stems(y)[:1], y[:, 1:33:2, 1:33:2]])(layers.ZeroPadding2D(1)(x)), 1, 2),
    ],
)
def test_padding_that_several_read(body, moved, paddings):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(64, 1)(layers.Concatenate()(body(inputs)))
    model = sparsify(keras.Model(inputs, x), 0.9)
    content = dense(model)
    closed = encode(content, engage=False)
    assert closed.moved == moved
    operators = [o.name for graph in read(closed.content).subgraphs for o in graph.operators]
    assert operators.count("PAD") == paddings
    called = signature(model)
    assert Reference(model, called, random_batches(model, called)).compare(closed.content).relative < 1e-5


def test_padding_that_is_an_output():
    inputs = keras.Input((32, 32, 3))
    padded = layers.ZeroPadding2D(1)(inputs)
    model = sparsify(keras.Model(inputs, [padded, layers.Conv2D(64, 1)(layers.Conv2D(16, 3, 2)(padded))]), 0.9)
    closed = encode(dense(model), engage=False)
    called = signature(model)
    assert closed.moved == 1
    assert Reference(model, called, random_batches(model, called)).compare(closed.content).relative < 1e-5


@pytest.mark.parametrize(
    ("layer", "quantize", "reason"),
    [
        (lambda: layers.Conv2DTranspose(64, 3, 2), "float16", "TRANSPOSE_CONV .* float16"),
        (lambda: layers.Conv2DTranspose(64, 3, 2), "dynamic", "TRANSPOSE_CONV .* int8"),
        (lambda: layers.Conv2DTranspose(64, 3, 2), None, None),
        (lambda: layers.Conv2D(64, 3), "dynamic", None),
    ],
)
@pytest.mark.lengthy(1)
def test_reasons_are_told(layer, quantize, reason):
    """One weight stays dense, the other does not."""
    model = sparsify(image_model(lambda x: layer()(layers.Conv2D(64, 3)(layers.Conv2D(32, 3)(x)))), 0.6)
    content = dense(model, quantize)
    encoded = encode(content)
    assert [bool(re.search(reason, text)) for text in encoded.kept.values()] == ([True] if reason else [])
    assert len(encoded.content) < len(content)


@pytest.mark.parametrize("quantize", ["float16", "dynamic"])
@pytest.mark.lengthy(1)
def test_transposed_convolutions_read_floats_where_that_is_smaller(quantize):
    body = [layers.Conv2D(32, 3), layers.Conv2D(64, 3), layers.Conv2DTranspose(64, 3, 2)]
    model = sparsify(keras.Sequential([keras.Input((16, 16, 3)), *body]), 0.9)
    content = dense(model, quantize)
    encoded = encode(content)
    assert encoded.kept == {} and len(encoded.content) < len(encode(dense(model)).content)
    found = {t.dtype for t in kernels(encoded.content) if t.levels is not None}
    assert found == {"float32", "float16" if quantize == "float16" else "int8"}
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    assert reference.compare(encoded.content).relative < 2 * reference.compare(content).relative + 1e-6
    assert Verification(content, reference, 3e-2, quantize == "dynamic").fault(encoded.content)[0] is None


def test_other_operators_are_named():
    """A table that is added: no runtime was seen to restore it."""
    inputs = keras.Input((100, 64))
    model = keras.Model(inputs, inputs + np.eye(100, 64, dtype="float32"))
    content = dense(model)
    encoded = encode(content)
    assert next(iter(encoded.kept.values())) == "ADD is not known to read restored weights right"
    assert stored(encoded.content) == stored(content)


def embedding():
    tokens = keras.Input((6,), dtype="int32")
    model = keras.Model(tokens, layers.Dense(3)(layers.Flatten()(layers.Embedding(100, 64)(tokens))))
    model.layers[1].embeddings.assign(np.eye(100, 64, dtype="float32") * np.arange(1, 65))
    return model


def adjacency():
    """A constant matrix as the first factor."""
    matrix = np.random.default_rng(0).random((60, 60)).astype("float32")
    nodes = keras.Input((60, 8))
    return keras.Model(nodes, keras.ops.matmul(np.where(matrix > 0.95, matrix, 0), layers.Dense(12)(nodes)))


@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize("build", [embedding, adjacency])
@pytest.mark.thorough(2)
@pytest.mark.lengthy(0)
def test_tables_are_restored(build, quantize):
    """Right on every runtime that is here."""
    model = build()
    content = dense(model, quantize)
    encoded = encode(content)
    assert encoded.kept == {} and len(encoded.content) < 0.5 * len(content)
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    for runtime in (name for name in ("native", "x86-no-avx", "wasm") if available()[name] is None):
        assert reference.compare_on(runtime, encoded.content).relative < (1e-2 if quantize else 1e-5), runtime


def filled(content):
    """Whether no zeros are stored but filled in."""
    stored = [tensor for tensor in kernels(content) if not tensor.values().any() and tensor.bytes > 1200]
    return not stored and "FILL" in [operator.name for operator in operators_of(content)]


@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize("kind", ["loop", "others"])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_zeros_are_filled_in(kind, quantize):
    """The list of outputs that a loop begins with in every file; what others read in those for CPUs."""
    inputs = keras.Input((20, 32), batch_size=1)
    if kind == "loop":
        model = keras.Model(inputs, layers.GRU(32, return_sequences=True)(inputs))
    else:
        model = keras.Model(inputs, keras.ops.concatenate([layers.ReLU()(inputs), np.zeros((1, 30, 32), "float32")], 1))
    content = dense(model, quantize)
    assert filled(content) == (kind == "loop") and fill(content) == content
    encoded = encode(content).content
    assert filled(encoded)
    called = signature(model)
    reference = Reference(model, called, random_batches(model, called))
    for runtime in (name for name in ("native", "x86-no-avx", "wasm") if available()[name] is None):
        assert reference.compare_on(runtime, encoded).relative < (1e-2 if quantize else 1e-5), runtime


def operators_of(content):
    return [operator for graph in read(content).subgraphs for operator in graph.operators]


def test_convolutions_in_three_dimensions_are_smaller():
    content = dense(sparsify(conv3d(), 0.9))
    assert encode(content).kept == {} and len(encode(content).content) < len(content) / 2
