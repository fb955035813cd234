"""The export stage: every kind of model, and what its files compute."""

import json
import os

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from exported_files import run, tensorflow_only
from keras import layers
from tflite_models import MODELS, cnn, dict_of_inputs, lstm, mlp, several, sparsify, subclassed, transposed

import keras_sparse as ks
from keras_sparse.quiet import quiet


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
@pytest.mark.lengthy(1)
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
@pytest.mark.lengthy(1)
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
@pytest.mark.lengthy(0)
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
@pytest.mark.lengthy(0)
def test_float16_transposed_convolutions_read_floats(tmp_path):
    model = sparsify(transposed(), 0.9)
    assert all(
        row["encoding"] == "sparse-csr" for row in ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack").rows
    )
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize="float16")
    assert [row["encoding"] for row in report.rows] == ["sparse-csr"] * 2
    assert {row["dtype"] for row in report.rows} == {"float16", "float32"} and report.parity_relative < 1e-2


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
