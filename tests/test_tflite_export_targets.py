"""What a file is meant for: right on each target, or refused, and what could not be proven is said."""

import os

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import mlp, sparsify

import keras_sparse as ks

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def pruned_mlp():
    """With a bias, and zeros in no blocks: LiteRT's GPU accelerator loses the bias where the weights are restored."""
    keras.utils.set_random_seed(0)
    hidden = layers.Dense(96, activation="relu", bias_initializer=keras.initializers.RandomNormal(stddev=1.0, seed=1))
    return sparsify(
        keras.Sequential([keras.Input((64,), name="x"), hidden, layers.Dense(64, bias_initializer="ones")]), 0.9
    )


def needs(*names):
    missing = [reason for reason in map(ks.tflite.runtimes.available().get, names) if reason]
    return pytest.mark.skipif(bool(missing), reason=" ".join(missing))


def test_no_target_is_every_target(tmp_path):
    """Nobody knows where it will run, so nothing is stored that only CPUs read right."""
    report = ks.tflite.export(pruned_mlp(), tmp_path / "m.tflite")
    assert report.encoding == "dense" and report.bytes_sparse < report.bytes_file / 3
    [note] = [note for note in report.notes if "target='xnnpack'" in note]
    assert f"{report.bytes_sparse:,d} bytes" in note
    inspected = ks.tflite.inspect(tmp_path / "m.tflite")
    assert not any("For CPUs only" in note for note in report.notes + inspected.notes)
    assert any("batch size is open: LiteRT.js" in note and "batch_size=1" in note for note in inspected.notes)


def test_where_a_sparse_file_must_not_be_used_is_said(tmp_path):
    report = ks.tflite.export(pruned_mlp(), tmp_path / "m.tflite", target="xnnpack", batch_size=1)
    assert report.encoding == "sparse" and report.not_verified == []
    notes = ks.tflite.inspect(tmp_path / "m.tflite").notes
    assert notes[0] in report.notes and len(notes) == 1 and "GPU accelerator computes wrong numbers" in notes[0]


@pytest.mark.everywhere
@needs("gpu-cpu", "micro")
@pytest.mark.parametrize("quantize", [None, "float16", "dynamic", "int8"])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_several_targets(quantize, tmp_path):
    model, x = pruned_mlp(), np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    targets = ["xnnpack", "gpu", "micro", "qualcomm"] if quantize in (None, "int8") else ["xnnpack", "gpu"]
    report = ks.tflite.export(model, tmp_path / "m.tflite", targets, quantize=quantize, representative_data=x)
    assert report.encoding == "dense"
    right = keras.ops.convert_to_numpy(model(x[:1]))
    for runtime in ("native", "gpu", "gpu-cpu", "micro")[: 4 if "micro" in targets else 3]:
        [found] = ks.tflite.runtimes.run(tmp_path / "m.tflite", {"x": x[:1]}, runtime).values()
        assert np.abs(found - right).max() < 0.1 * np.abs(right).max(), runtime
    assert [reason.split(":")[0] for reason in report.not_verified] == ["qualcomm"] * ("qualcomm" in targets)
    assert len(report.verified_on) == len(targets) - ("qualcomm" in targets)
    assert any("ks.shrink" in note and "gpu" in note for note in report.notes)


@pytest.mark.everywhere
@needs("ethos-u", "micro")
@pytest.mark.slow
def test_an_npu(tmp_path):
    model, x = pruned_mlp(), np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    with pytest.raises(ValueError, match=r"takes quantize='int8' or quantize='int16x8'.*Received: quantize=None"):
        ks.tflite.export(model, tmp_path / "m.tflite", "ethos-u85")
    report = ks.tflite.export(
        model, tmp_path / "m.tflite", "ethos-u85", quantize="int8", inference_type="int8", representative_data=x
    )
    [note] = [note for note in report.notes if note.startswith("On ethos-u85-128: ")]
    assert "2 of 2 operators" in note and len(report.verified_on) == 3


@pytest.mark.everywhere
@needs("micro")
def test_a_target_that_cannot_run_it(tmp_path):
    """TFLite Micro has no kernel for it: an error, and no file."""
    inputs = keras.Input((8,), name="x")
    model = keras.Model(inputs, keras.ops.sign(layers.Dense(8)(inputs)))
    refused = r"not for the target 'micro'.*TFLite Micro.*cannot be run \(Didn't find op"
    with pytest.raises(ks.tflite.ExportError, match=refused):
        ks.tflite.export(model, tmp_path / "m.tflite", "micro")
    assert os.listdir(tmp_path) == []


@pytest.mark.everywhere
@pytest.mark.lengthy(0)
def test_a_runtime_that_is_missing_is_no_proof(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    report = ks.tflite.export(pruned_mlp(), tmp_path / "m.tflite", "gpu")
    assert len(report.verified_on) == 1 and "setup-gpu" in report.not_verified[0]
    (tmp_path / "m.tflite").unlink()
    with pytest.raises(ks.tflite.runtimes.RuntimeMissing, match="needs a runtime for each target.*setup-gpu"):
        ks.tflite.export(pruned_mlp(), tmp_path / "m.tflite", "gpu", verify="strict")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("phone", ValueError, "`target` must be one of 'xnnpack', .*Received: target='phone'"),
        (["gpu", "phone"], ValueError, "Received: target='phone'$"),
        ("GPU", ValueError, "Received: target='GPU'. Did you mean 'gpu'\\?"),
        ("ethos-u55-128", ValueError, "Did you mean 'ethos-u55'\\?"),
        ([["gpu"]], ValueError, "Received: a target of type list"),
        (True, TypeError, "Received: target=True"),
        ("ethos-u55", ValueError, "takes quantize='int8' or quantize='int16x8'; .*Received: quantize=None"),
    ],
)
def test_wrong_targets(target, error, message, tmp_path):
    with pytest.raises(error, match=message):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target)


@pytest.mark.parametrize("quantize", ["float16", "dynamic", None])
@pytest.mark.lengthy(0)
def test_browsers_restore_floats_only(quantize, tmp_path):
    report = ks.tflite.export(pruned_mlp(), tmp_path / "m.tflite", target="xnnpack-wasm", quantize=quantize)
    assert (report.encoding == "sparse") == (quantize != "dynamic")
    if quantize == "dynamic":
        assert "restores only float32 and float16 weights right" in report.notes[0]
    assert ks.tflite.export(pruned_mlp(), tmp_path / "m.tflite", "xnnpack", quantize=quantize).encoding == "sparse"


@needs("wasm")
def test_small_biases_in_half_precision_are_right_in_browsers(tmp_path):
    """Half a kernel that is restored and a float32 bias: LiteRT.js 2.5.3 computes the bias alone."""
    rng = np.random.default_rng(0)
    body = [layers.Conv2D(32, 3, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(12)]
    model = keras.Sequential([keras.Input((16, 16, 8), name="x"), *body])
    for layer in (body[0], body[2]):
        layer.bias.assign(np.append(rng.normal(size=layer.bias.shape[0] - 1), 1e-7))
    report = ks.tflite.export(sparsify(model, 0.8), tmp_path / "m.tflite", "xnnpack", quantize="float16", batch_size=1)
    assert report.encoding == "sparse"
    assert "float32" not in {row["dtype"] for row in ks.tflite.inspect(report.path).rows}
    x = rng.normal(size=(1, 16, 16, 8)).astype("float32")
    [found] = ks.tflite.runtimes.run(report.path, {"x": x}, runtime="wasm").values()
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(model(x)), atol=1e-2)


@needs("wasm")
def test_a_bias_that_kernels_share_is_right_in_browsers(tmp_path):
    """The converter stores equal biases once: a kernel too small for half precision kept the bias of a large one."""
    keras.utils.set_random_seed(0)
    large, small = keras.Input((64,), name="large"), keras.Input((2,), name="small")
    both = [layers.Dense(64, bias_initializer="ones")(x) for x in (large, small)]
    model = sparsify(
        keras.Model([large, small], layers.Dense(4, bias_initializer="ones")(layers.concatenate(both))), 0.8
    )
    report = ks.tflite.export(model, tmp_path / "m.tflite", "xnnpack", quantize="float16", batch_size=1)
    assert report.encoding == "sparse"
    rng = np.random.default_rng(0)
    x = {x.name: rng.normal(size=(1, x.shape[1])).astype("float32") for x in (large, small)}
    [found] = ks.tflite.runtimes.run(report.path, x, runtime="wasm").values()
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(model(list(x.values()))), atol=1e-2)
