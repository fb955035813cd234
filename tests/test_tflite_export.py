"""The export stage: every kind of model, verified files, refusals that leave nothing behind."""

import errno
import io
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from tflite_models import MODELS, attention, cnn, dict_of_inputs, lstm, mlp, several, sparsify, subclassed, transposed

import keras_sparse as ks
from keras_sparse.quiet import quiet
from keras_sparse.tflite.parity import random_batches
from keras_sparse.tflite.runtimes import Worker
from keras_sparse.tflite.signatures import signature

# Elsewhere each export starts a process of its own (several seconds); test_other_backends covers those.
tensorflow_only = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="slow on other backends")


def run(path, **inputs):
    """The outputs of a file, by the interpreter alone."""
    with quiet():
        return Interpreter(model_path=str(path)).get_signature_runner("serving_default")(**inputs)


def clean(folder):
    """Whether nothing was left in a folder."""
    return list(pathlib.Path(folder).iterdir()) == []


@tensorflow_only
@pytest.mark.parametrize(
    ("kind", "quantize"),
    [
        pytest.param(kind, quantize, marks=[pytest.mark.slow] if quantize and kind not in ("mlp", "cnn") else [])
        for kind in MODELS
        for quantize in (None, "float16", "dynamic")
    ],
)
@pytest.mark.thorough(5)
def test_every_kind_of_model(kind, quantize, tmp_path):
    keras.utils.set_random_seed(1)
    model = sparsify(MODELS[kind](), 0.9)
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize)
    assert report.bytes_file == os.path.getsize(tmp_path / "m.tflite") == report.bytes_sparse
    assert report.encoding == "sparse" and report.bytes_sparse < report.bytes_dense
    assert report.parity_relative <= {None: 2e-6, "float16": 1e-2, "dynamic": 3e-2}[quantize]
    for row in ks.tflite.inspect(report.path).rows:
        assert row["bytes"] <= np.prod(row["shape"]) * np.dtype(row["dtype"]).itemsize
    assert os.listdir(tmp_path) == ["m.tflite"]
    # float16 rounds the smallest values to zero too; a query kernel of attention may be merged with others
    kept = [count for count in report.zeros if count["file"] is not None]
    assert kept and all(count["file"] >= count["model"] for count in kept)
    assert report.totals["zeros_kept"] == report.totals["zeros_model"] > 0


@tensorflow_only
@pytest.mark.parametrize("kind", ["cnn", "lstm", "nested"])
@pytest.mark.thorough(1)
def test_dense_encoding(kind, tmp_path):
    model = sparsify(MODELS[kind](), 0.9)
    report = ks.tflite.export(model, tmp_path / "m.tflite", sparse=False)
    assert report.encoding == "dense" and report.bytes_sparse is None and report.runs_sparse == []
    assert report.bytes_file == report.bytes_dense == os.path.getsize(tmp_path / "m.tflite")
    assert all(row["encoding"] == "dense" for row in ks.tflite.inspect(report.path).rows)


def test_the_file_computes_what_the_model_computes(tmp_path):
    model = sparsify(mlp(), 0.9)
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    x = np.random.default_rng(5).normal(size=(7, 64)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(run(report.path, pixels=x)["output_0"], expected, rtol=0, atol=1e-5)
    assert report.parity <= 1e-5
    assert report.bytes_dense > 4 * report.bytes_file
    assert report.bytes_gzip < report.bytes_file and report.bytes_gzip_dense < report.bytes_dense
    assert report.verified_on[0].startswith("ai-edge-litert on this")


@tensorflow_only
def test_names_of_inputs_and_outputs(tmp_path):
    model = several()
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(2, 8, 8, 1)).astype("float32"), "age": np.ones((2, 1), "float32")}
    found, expected = run(report.path, **x), model(x)
    assert sorted(found) == ["label", "score"]
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


@tensorflow_only
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.35])
def test_dense_where_sparse_is_larger(sparsity, tmp_path):
    # float16: an index byte or two for each value of two bytes does not pay below about half zeros
    report = ks.tflite.export(sparsify(mlp(), sparsity), tmp_path / "m.tflite", target="xnnpack", quantize="float16")
    assert report.encoding == "dense"
    assert report.bytes_sparse >= report.bytes_dense == report.bytes_file
    assert "not smaller" in " ".join(report.notes)


@tensorflow_only
def test_blocks_engage_the_sparse_kernel(tmp_path):
    report = ks.tflite.export(sparsify(mlp(), 0.9, blocks=True), tmp_path / "m.tflite", target="xnnpack")
    assert {row["block"] for row in report.rows} == {"1x4"}
    assert [use["operator"] for use in report.runs_sparse] == ["FULLY_CONNECTED"] * 2
    assert all("every CPU" in row["runs"] for row in report.rows)
    with quiet():
        interpreter = Interpreter(model_path=str(report.path))
    interpreter.allocate_tensors()
    assert report.parity_relative < 2e-6


@tensorflow_only
@pytest.mark.parametrize(("sparsity", "sparse"), [(0.8, False), (0.9, True)])
def test_blocks_run_sparse_where_that_is_faster(sparsity, sparse, tmp_path):
    report = ks.tflite.export(sparsify(mlp(), sparsity, blocks=True), tmp_path / "m.tflite", target="xnnpack")
    assert report.encoding == "sparse" and {row["block"] for row in report.rows} == {"1x4"}
    assert bool(report.runs_sparse) == sparse


@tensorflow_only
@pytest.mark.parametrize("quantize", ["float16", "dynamic"])
def test_quantized_blocks_are_restored(quantize, tmp_path):
    """TensorFlow's own conversion lets the layers read them as they are: NaN, and garbage."""
    report = ks.tflite.export(
        sparsify(mlp(), 0.9, blocks=True), tmp_path / "m.tflite", target="xnnpack", quantize=quantize
    )
    assert report.encoding == "sparse" and report.bytes_file < 0.6 * report.bytes_dense and not report.runs_sparse
    assert [note[:6] for note in report.notes if note.startswith("Slower")] == ["Slower"] * (quantize == "dynamic")
    assert {row["dtype"] for row in report.rows} == {"float16" if quantize == "float16" else "int8"}
    assert report.parity_relative < 1e-2


@pytest.mark.slow
@tensorflow_only
def test_fixed_batch_is_said(tmp_path):
    report = ks.tflite.export(sparsify(lstm(), 0.9), tmp_path / "m.tflite", target="xnnpack")
    assert "one sample at a time" in report.notes[0]
    assert {"lstm_cell/kernel", "lstm_cell/recurrent_kernel"} <= {
        "/".join(count["weight"].split("/")[-2:]) for count in report.zeros
    }


@tensorflow_only
def test_static_batch_is_kept(tmp_path):
    inputs = keras.Input((4,), batch_size=5, name="x")
    report = ks.tflite.export(keras.Model(inputs, layers.Dense(2)(inputs)), tmp_path / "m.tflite", target="xnnpack")
    assert run(report.path, x=np.ones((5, 4), "float32"))["output_0"].shape == (5, 2)


@tensorflow_only
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("build", [mlp, cnn, subclassed])
@pytest.mark.thorough(3)
def test_half_precision_policies(policy, build, tmp_path):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        model = sparsify(build(), 0.9)
    finally:
        keras.config.set_dtype_policy(before)
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert report.encoding == "sparse"
    assert {row["dtype"] for row in report.rows} == {"float32"}
    assert report.parity_relative < 0.05
    assert keras.config.dtype_policy().name == before.name


@tensorflow_only
def test_model_in_training(tmp_path):
    model = sparsify(mlp(), 0.9)
    model.compile(ks.optimizers.SparseOptimizer(keras.optimizers.Adam()), loss=lambda y, p: keras.ops.mean(y - p))
    model.fit(np.ones((8, 64)), np.ones((8, 64)), verbose=0)
    before = [keras.ops.convert_to_numpy(w) for w in model.weights]
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert report.parity_relative < 1e-5
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(new))
    model.fit(np.ones((8, 64)), np.ones((8, 64)), verbose=0)


@tensorflow_only
def test_integer_inputs_of_subclassed_models(tmp_path):
    model = dict_of_inputs()
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert "takes float32 inputs" in report.notes[0]
    data = {"tokens": np.arange(12).reshape(2, 6), "offset": np.zeros((2, 1, 48))}
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", representative_data=data)
    data = {"tokens": data["tokens"].astype("int32"), "offset": data["offset"].astype("float32")}
    np.testing.assert_allclose(run(report.path, **data)["out"], model(data)["out"], atol=1e-6)


@tensorflow_only
def test_model_from_a_file(tmp_path):
    model = sparsify(mlp(), 0.9)
    model.compile("adam", "mse")
    model.save(tmp_path / "m.keras")
    report = ks.tflite.export(str(tmp_path / "m.keras"), tmp_path / "m.tflite", target="xnnpack")
    assert report.encoding == "sparse" and report.parity_relative < 1e-5


@tensorflow_only
def test_report_is_plain_data(tmp_path):
    report = ks.tflite.export(sparsify(mlp(), 0.9), tmp_path / "m.tflite", target="xnnpack")
    data = json.loads(report.to_json())
    assert data["totals"]["bytes_file"] == report.bytes_file
    assert data["totals"]["zeros_kept"] == data["totals"]["zeros_model"] > 0
    assert [row["weight"].split("/")[-1] for row in data["rows"]] == ["kernel", "kernel"]
    for text in ("sparse", f"{report.bytes_file:,d}", "parity"):
        assert text in str(report)
    assert report._repr_html_().count("<tr>") > 3


@tensorflow_only
def test_float16_transposed_convolutions_read_floats(tmp_path):
    model = sparsify(transposed(), 0.9)
    assert all(
        row["encoding"] == "sparse-csr" for row in ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack").rows
    )
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize="float16")
    assert [row["encoding"] for row in report.rows] == ["sparse-csr"] * 2
    assert {row["dtype"] for row in report.rows} == {"float16", "float32"} and report.parity_relative < 1e-2


def blocks_of_16():
    """Dense layers whose zeros stand in blocks of one output by 16 inputs."""
    inputs = keras.Input((128,))
    model = keras.Model(inputs, layers.Dense(64)(layers.Dense(96, activation="relu")(inputs)))
    ks.prune(model, 0.97, pattern="block_1x16")
    return model


@tensorflow_only
@pytest.mark.parametrize(
    ("goal", "runs"),
    [
        ({"a|b": 0.9}, ["a", "b"]),  # the head, of 640 weights, loses less than they gain
        ({"b": 0.9}, []),  # half of the weights
        ({"c": 0.9}, []),  # the head alone
        ({"a|b|c": 0.8}, []),
    ],
)
@pytest.mark.thorough(2)
def test_sparse_kernels_of_dense_layers_are_used_where_the_network_gains(goal, runs, tmp_path):
    inputs = keras.Input((64,))
    hidden = layers.Dense(64, activation="relu", name="b")(layers.Dense(64, activation="relu", name="a")(inputs))
    model = keras.Model(inputs, layers.Dense(10, name="c")(hidden))
    ks.prune(model, goal, pattern="block_1x4")
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert sorted(row["weight"].split("/")[0] for row in report.rows if row["runs"].startswith("sparse")) == runs
    noted = [note for note in report.notes if "out of XNNPACK" in note]
    assert len(noted) == (not runs and "a|b|c" not in goal)
    assert all(row["encoding"] != "dense" for row in report.rows if row["zeros"] > 400)


@tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("build", [cnn, mlp, several, transposed, attention, blocks_of_16])
def test_int8(build, tmp_path):
    keras.utils.set_random_seed(1)
    model = sparsify(build(), 0.9) if build is not blocks_of_16 else build()
    called = signature(model)
    batches = [batch for i in range(8) for batch in random_batches(model, called, i)]
    arrays = {leaf.name: np.concatenate([b[j] for b in batches]) for j, leaf in enumerate(called.inputs)}
    report = ks.tflite.export(
        model, tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=arrays
    )
    assert report.parity_relative < 0.25 and report.bytes_file <= report.bytes_dense
    kept = [count for count in report.zeros if count["file"] is not None]
    assert kept and all(count["file"] >= count["model"] for count in kept)
    assert {row["dtype"] for row in report.rows} <= {"int8", "float32"}
    assert report.encoding == ("dense" if build is attention else "sparse")
    assert bool(report.runs_sparse) == (build is blocks_of_16)
    with Worker(report.path) as worker:
        assert {leaf["dtype"] for leaf in worker.inputs} <= {"float32", "int32"} and not worker.scales


@pytest.mark.slow
@tensorflow_only
@pytest.mark.parametrize("inference_type", ["int8", "uint8"])
def test_integers_in_and_out(inference_type, tmp_path):
    keras.utils.set_random_seed(1)
    model = sparsify(mlp(), 0.9)
    data = np.random.default_rng(0).normal(size=(20, 64))
    emulated = ks.tflite.runtimes.available()["x86-no-avx"] is None
    report = ks.tflite.export(
        model,
        tmp_path / "m.tflite",
        target="xnnpack",
        quantize="int8",
        representative_data=data,
        verify="strict" if emulated else "auto",
        inference_type=inference_type,
    )
    assert report.parity_relative < 0.2 and len(report.verified_on) == 1 + emulated  # LiteRT.js takes no such inputs
    with Worker(report.path) as worker:
        assert [leaf["dtype"] for leaf in worker.inputs] == [inference_type]
        scales, points = zip(*(worker.scales[name] for name in ("pixels", "output_0")), strict=True)
        limits = np.iinfo(inference_type)
        stored = np.clip(np.round(data[:1] / scales[0]) + points[0], limits.min, limits.max)
        worker.feed({"pixels": stored})
        output = worker.run()["output_0"]
    assert output.dtype == inference_type
    expected = keras.ops.convert_to_numpy(model(data[:1].astype("float32")))
    np.testing.assert_allclose(scales[1] * (output.astype(float) - points[1]), expected, atol=0.2 * expected.max())


def filters():
    """A network from sound to sound."""
    inputs = keras.Input((64, 1), name="wave")
    x = layers.Conv1D(32, 5, padding="same", activation="relu")(inputs)
    return keras.Model(inputs, layers.Conv1D(1, 5, padding="same")(layers.Conv1D(32, 5, padding="same")(x)))


@tensorflow_only
@pytest.mark.parametrize(("build", "encoding"), [(filters, "sparse"), (mlp, "dense")])
@pytest.mark.parametrize("inference_type", [None, pytest.param("int16", marks=pytest.mark.slow)])
@pytest.mark.thorough(1)
def test_integers_of_16_bits(build, encoding, inference_type, tmp_path):
    """Activations of 16 bits leave the rounding of the weights; Dense layers do not read restored weights there."""
    keras.utils.set_random_seed(1)
    model = sparsify(build(), 0.9)
    data = np.random.default_rng(0).normal(size=(20, *model.inputs[0].shape[1:]))
    options = {"quantize": "int16x8", "representative_data": data, "inference_type": inference_type}
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", **options)
    assert report.encoding == encoding and report.parity_relative < 0.03
    assert {row["dtype"] for row in report.rows} == {"int8"}
    assert (report.bytes_file < 0.8 * report.bytes_dense) == (encoding == "sparse")
    with Worker(report.path) as worker:
        assert {leaf["dtype"] for leaf in worker.inputs} == {inference_type or "float32"}


@tensorflow_only
def test_integers_of_16_bits_need_data(tmp_path):
    with pytest.raises(ValueError, match="quantize='int16x8' needs `representative_data`"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int16x8")


@pytest.mark.parametrize(
    ("inference_type", "quantize"), [("int16", "int8"), ("int8", None), ("uint8", "dynamic"), ("int8", "int16x8")]
)
def test_bad_inference_types(inference_type, quantize, tmp_path):
    data = np.ones((2, 64))
    with pytest.raises(
        ValueError, match=r"`inference_type` must be None, or 'int8' or 'uint8' with.*or 'int16' with.*Received: infer"
    ):
        ks.tflite.export(
            mlp(),
            tmp_path / "m.tflite",
            target="xnnpack",
            quantize=quantize,
            representative_data=data,
            inference_type=inference_type,
        )


@tensorflow_only
@pytest.mark.slow
def test_a_crash_of_the_converter_is_an_error(tmp_path):
    with pytest.raises(ks.tflite.ExportError, match="TensorFlow crashed"):
        ks.tflite.export(
            lstm(),
            tmp_path / "m.tflite",
            target="xnnpack",
            quantize="int8",
            representative_data=np.eye(80).reshape(80, 10, 8),
        )
    assert clean(tmp_path)


@tensorflow_only
@pytest.mark.parametrize(("size", "quantize"), [(1, None), (5, None), (200, None), (5, "int8")])
@pytest.mark.thorough(1)
def test_representative_data_and_a_fixed_batch(size, quantize, tmp_path):
    inputs = keras.Input((4, 4, 2), batch_size=size, name="x")
    # A shape that names the batch size: the file cannot be run with another one.
    outputs = keras.ops.reshape(layers.Conv2D(2, 1)(layers.GlobalAveragePooling2D(keepdims=True)(inputs)), (size, 2))
    model = keras.Model(inputs, outputs)
    data = np.random.default_rng(0).normal(size=(max(size, 33), 4, 4, 2))
    if size > 1:
        with pytest.raises(ValueError, match=f"at least one batch of the model's fixed size of {size}"):
            ks.tflite.export(
                model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize, representative_data=data[: size - 1]
            )
    report = ks.tflite.export(
        model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize, representative_data=data
    )
    assert report.parity_relative < (0.1 if quantize else 1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_data_in_which_nothing_varies(value, tmp_path):
    with pytest.raises(ValueError, match=f"inputs as the model will meet them.*Received: nothing but {value:g}"):
        ks.tflite.export(
            mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=np.full((9, 64), value)
        )


@tensorflow_only
@pytest.mark.slow
def test_int8_that_is_none(tmp_path):
    inputs = keras.Input((4, 4, 4, 2))
    model = keras.Model(inputs, layers.Conv3D(2, 3)(inputs))
    data = np.random.default_rng(0).normal(size=(4, 4, 4, 4, 2))
    with pytest.raises(ks.tflite.ExportError, match="nothing in the model.*use quantize='float16'"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=data)
    assert clean(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("quantize", [None, "dynamic"])
def test_weights_that_are_not_finite(value, quantize, tmp_path):
    model = mlp()
    model.layers[-1].kernel.assign(np.full(model.layers[-1].kernel.shape, value))
    with pytest.raises(ValueError, match=f"training diverged(.|\n)*{model.layers[-1].kernel.path}"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize)
    assert clean(tmp_path)


@tensorflow_only
def test_double_precision(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="float64")])
    with pytest.raises(ValueError, match="TFLite does not in float64.*Received: float64 in .*/kernel"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
def test_a_constant_that_is_not_finite(tmp_path):
    inputs = keras.Input((64,))
    scaled = inputs * np.where(np.arange(64) == 3, np.inf, 1.0).astype("float32")  # the converter folds it in
    with pytest.raises(ks.tflite.ExportError, match="multiplies with a constant that is NaN or infinite"):
        ks.tflite.export(
            keras.Model(inputs, layers.Dense(64)(scaled)), tmp_path / "m.tflite", target="xnnpack", quantize="dynamic"
        )
    assert clean(tmp_path)


@tensorflow_only
def test_an_output_that_is_one_number(tmp_path):
    inputs = keras.Input((4,))
    report = ks.tflite.export(
        keras.Model(inputs, keras.ops.sum(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack"
    )
    assert report.parity_relative < 1e-5


@tensorflow_only
@pytest.mark.parametrize("existing", [None, b"old"])
def test_a_mismatch_leaves_nothing(existing, tmp_path):
    class Counting(layers.Layer):
        """Adds how often it was called, so that no two runs agree."""

        calls = 0

        def call(self, x):
            Counting.calls += 1
            return x + float(Counting.calls)

    if existing is not None:
        (tmp_path / "m.tflite").write_bytes(existing)
    inputs = keras.Input((4,))
    with pytest.raises(ks.tflite.ExportError, match=r"does not compute what the model computes.*'output_0' differs"):
        ks.tflite.export(
            keras.Model(inputs, Counting()(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack"
        )
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if existing is None else [existing])


@tensorflow_only
def test_arguments_without_recorded_shape(tmp_path):
    class Weighted(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, a, b):
            return self.dense(a) + b

    model = Weighted()
    model(np.ones((1, 4)), np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"Give the model one argument.*\['a', 'b'\]"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
def test_an_error_of_a_layer_is_told(tmp_path):
    class Fails(layers.Layer):
        def call(self, x):
            raise ValueError("no graphs here")

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((4,))
    with pytest.raises(ks.tflite.ExportError, match=r"Fails\.call\(\)\. no graphs here"):
        ks.tflite.export(keras.Model(inputs, Fails()(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
def test_unsupported_operator_is_named(tmp_path):
    class Inverse(layers.Layer):
        def call(self, x):
            return keras.ops.erfinv(keras.ops.tanh(x))

    inputs = keras.Input((4,))
    with pytest.raises(ks.tflite.ExportError, match=r"cannot be converted to \.tflite.*Erfinv") as caught:
        ks.tflite.export(
            keras.Model(inputs, Inverse()(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack"
        )
    assert len(str(caught.value)) < 600 and clean(tmp_path)


@tensorflow_only
def test_nan_and_infinity_are_compared(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.log(layers.Dense(4)(inputs)))
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert np.isfinite(report.parity_relative)


@pytest.mark.parametrize("quantize", ["float8", "", 16, True])
def test_unknown_quantization(quantize, tmp_path):
    with pytest.raises(ValueError, match=r"must be one of None, 'float16', 'dynamic', 'int8', 'int16x8'\. Received"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", quantize=quantize)


@pytest.mark.parametrize("sparse", ["no", 0, None])
def test_sparse_is_a_bool(sparse, tmp_path):
    with pytest.raises(TypeError, match="`sparse` must be True or False. Received: sparse="):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", sparse=sparse)


@tensorflow_only
def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "m.tflite").symlink_to(tmp_path / "there" / "real.tflite")
    ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack")
    assert (tmp_path / "m.tflite").is_symlink() and (tmp_path / "there" / "real.tflite").stat().st_size > 1000


def test_int8_needs_data(tmp_path):
    with pytest.raises(ValueError, match="needs `representative_data`"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int8")
    with pytest.raises(ValueError, match="must fit the model's input 'pixels'"):
        ks.tflite.export(
            mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=np.ones((4, 63))
        )


def test_bad_paths(tmp_path):
    (tmp_path / "folder.tflite").mkdir()
    with pytest.raises(ValueError, match=r"must end in '\.tflite'"):
        ks.tflite.export(mlp(), tmp_path / "m.lite", target="xnnpack")
    with pytest.raises(ValueError, match="folder of that name"):
        ks.tflite.export(mlp(), tmp_path / "folder.tflite", target="xnnpack")
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        ks.tflite.export(mlp(), tmp_path / "none" / "m.tflite", target="xnnpack")


def test_bad_models(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match="not built"):
        ks.tflite.export(keras.Sequential([layers.Dense(3)]), path, target="xnnpack")
    with pytest.raises(TypeError, match="Received"):
        ks.tflite.export(np.ones(3), path, target="xnnpack")
    built = layers.Dense(3)
    built.build((None, 4))
    with pytest.raises(TypeError, match=r"keras\.Model"):
        ks.tflite.export(built, path, target="xnnpack")
    assert clean(tmp_path)


def test_bad_keras_files(tmp_path):
    (tmp_path / "bad.keras").write_bytes(b"PK\x03\x04 nonsense")
    (tmp_path / "empty.keras").write_bytes(b"")
    for name in ("bad.keras", "empty.keras"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            ks.tflite.export(tmp_path / name, tmp_path / "m.tflite", target="xnnpack")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.export(tmp_path / "none.keras", tmp_path / "m.tflite", target="xnnpack")
    with pytest.raises(ValueError, match=r"path of a \.keras file"):
        ks.tflite.export(tmp_path / "m.h5", tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk(step, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "m.tflite").write_bytes(b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m.tflite"] and (tmp_path / "m.tflite").read_bytes() == b"old"


def python(code, folder, **environment):  # code: text, or the path of a script
    """Run Python code in a process of its own."""
    root = pathlib.Path(ks.__file__).parents[1]
    path = os.pathsep.join([str(root), str(pathlib.Path(__file__).parent / "support"), str(folder)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)] if not isinstance(code, pathlib.Path) else [sys.executable, code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_nothing_is_printed(backend, tmp_path):
    code = """
        import os, sys
        saved = os.dup(1), os.dup(2)  # what importing Keras itself prints is not ours
        void = os.open(os.devnull, os.O_WRONLY); os.dup2(void, 1); os.dup2(void, 2)
        import keras
        if keras.config.backend() == "tensorflow":
            import tensorflow
        os.dup2(saved[0], 1); os.dup2(saved[1], 2)
        from tflite_models import cnn, lstm, sparsify
        import keras_sparse as ks
        print("before")
        for build in (cnn, lstm):
            report = ks.tflite.export(sparsify(build(), 0.9), "m.tflite", target="xnnpack")
            assert report.encoding == "sparse", report
        ks.tflite.inspect("m.tflite"); ks.tflite.benchmark("m.tflite")
        print("after")
        sys.stdout.flush(); os.write(1, b"fd 1"); os.write(2, b"fd 2")
    """
    result = python(code, tmp_path, KERAS_BACKEND=backend)
    assert (result.stdout, result.stderr) == ("before\nafter\nfd 1", "fd 2")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends(backend, tmp_path):
    code = """
        import keras, numpy as np, keras_sparse as ks
        from tflite_models import attention, lstm, nested, sparsify, subclassed
        keras.utils.set_random_seed(2)
        for build in (attention, lstm, nested, subclassed):
            model = sparsify(build(), 0.9)
            model.compile("adam", "mse")
            report = ks.tflite.export(model, "m.tflite", target="xnnpack")
            assert report.parity_relative < 1e-5 and report.encoding == "sparse", report
        data = np.ones((3, 32))
        report = ks.tflite.export(model, "m.tflite", "xnnpack", quantize="float16", representative_data=data)
        assert report.parity_relative < 1e-2, report
        print(keras.config.backend(), "done")
    """
    result = python(code, tmp_path, KERAS_BACKEND=backend)
    assert result.stdout == f"{backend} done\n", result.stderr
    assert os.listdir(tmp_path) == ["m.tflite"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_class_of_main_is_refused_on_other_backends(backend, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import keras, keras_sparse as ks
            class Twice(keras.layers.Layer):
                def call(self, x):
                    return 2 * x
            @keras.saving.register_keras_serializable("mine")
            class Thrice(Twice):
                pass
            for layer in (Twice(), Thrice()):
                try:
                    ks.tflite.export(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), layer]), "m.tflite")
                except ks.tflite.ExportError as error:
                    print(error)
            """
        )
    )
    lines = python(script, tmp_path, KERAS_BACKEND=backend).stdout.splitlines()
    assert len(lines) == 2 and os.listdir(tmp_path) == ["script.py"]
    for line, name in zip(lines, ("Twice", "Thrice"), strict=True):
        assert "defined in `__main__`" in line and "Move it to a module" in line and name in line


@pytest.mark.slow
def test_full_disk_for_real(tmp_path):
    code = """
        import keras, resource, signal, keras_sparse as ks
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(512), keras.layers.Dense(512)])
        for limit in (1000, 100_000):  # too little for the SavedModel in the temporary folder, for the file itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                ks.tflite.export(model, "m.tflite", target="xnnpack")
            except OSError as error:
                print("OSError")
    """
    (tmp_path / "tmp").mkdir()
    result = python(code, tmp_path, KERAS_BACKEND="tensorflow", TMPDIR=str(tmp_path / "tmp"))
    assert result.stdout == "OSError\nOSError\n", result.stderr
    assert os.listdir(tmp_path) == ["tmp"] and not list((tmp_path / "tmp").glob("keras_sparse-*"))


@tensorflow_only
def test_streams_are_restored(tmp_path, monkeypatch):
    """Also where Python's streams are not the process's, as in a notebook."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with warnings.catch_warnings(record=True):
        ks.tflite.export(cnn(), tmp_path / "m.tflite", target="xnnpack")
    assert sys.stdout is out and sys.stderr is err
    assert (out.getvalue(), err.getvalue()) == ("", "")


@tensorflow_only
def test_a_batch_size_for_the_file(tmp_path):
    """A model of any batch size; on data that do not fill whole batches, too."""
    report = ks.tflite.export(
        mlp(), tmp_path / "m.tflite", target="xnnpack", batch_size=2, representative_data=np.ones((5, 64))
    )
    assert not report.notes or "batch" not in report.notes[0]
    assert run(report.path, pixels=np.ones((2, 64), "float32"))["output_0"].shape == (2, 64)
    for size, message in ((0, "positive integer"), (True, "positive integer"), (2.0, "positive integer")):
        with pytest.raises(ValueError, match=f"{message}. Received: batch_size={size}"):
            ks.tflite.export(mlp(), tmp_path / "n.tflite", target="xnnpack", batch_size=size)
    inputs = keras.Input((4,), batch_size=5)
    with pytest.raises(ValueError, match="takes batches of 5 samples.*Received: batch_size=1"):
        ks.tflite.export(
            keras.Model(inputs, layers.Dense(2)(inputs)), tmp_path / "n.tflite", target="xnnpack", batch_size=1
        )
    assert os.listdir(tmp_path) == ["m.tflite"]


@tensorflow_only
def test_outputs_that_do_not_depend_on_the_inputs_are_said(tmp_path):
    inputs = keras.Input((4,))
    constant = layers.Dense(3, kernel_initializer="zeros", bias_initializer="ones", name="constant")(inputs)
    report = ks.tflite.export(
        keras.Model(inputs, [constant, layers.Dense(3)(inputs)]), tmp_path / "m.tflite", target="xnnpack"
    )
    noted = [note for note in report.notes if "The comparison says little of output_0:" in note]
    assert len(noted) == 1 and "output_1" not in noted[0] and "representative_data" in noted[0]
