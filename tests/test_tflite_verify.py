"""Files that others wrote: right or wrong, whoever wrote them, on any runtime."""

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import mlp, several, sparsify

import keras_sparse as ks

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")
MISSING = ks.tflite.runtimes.available()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A pruned model, and the file that Keras writes of it."""
    folder = tmp_path_factory.mktemp("theirs")
    keras.utils.set_random_seed(0)
    biased = [layers.Dense(96, activation="relu"), layers.Dense(64, bias_initializer="ones")]
    model = sparsify(keras.Sequential([keras.Input((64,), name="x"), *biased]), 0.9)
    model.export(folder / "theirs.tflite", format="litert", verbose=False)
    model.save(folder / "model.keras")
    return model, folder


@pytest.mark.parametrize("accelerator", ["cpu", "gpu", "micro", "wasm", "compiled-cpu", "x86-no-avx"])
@pytest.mark.thorough(3)
def test_on_any_runtime(accelerator, theirs):
    if MISSING.get(accelerator) is not None:
        pytest.skip(MISSING[accelerator])
    model, folder = theirs
    report = ks.tflite.verify(folder / "theirs.tflite", model, accelerator)
    assert report.right and report.parity_relative < 1e-5 and report.accelerated in (None, True)


@pytest.mark.lengthy(0)
def test_references(theirs, tmp_path):
    model, folder = theirs
    path = folder / "theirs.tflite"
    assert ks.tflite.verify(path, folder / "model.keras").right
    assert ks.tflite.verify(path, model, data=np.random.default_rng(0).normal(size=(9, 64))).right
    ks.tflite.export(sparsify(mlp(), 0.5), tmp_path / "other.tflite")
    wrong = ks.tflite.verify(path, tmp_path / "other.tflite")
    assert not wrong.right and wrong.notes[-1].startswith("Wrong: output 'output_0' differs by")
    ks.tflite.export(several(), tmp_path / "several.tflite")
    with pytest.raises(ValueError, match="must take the same inputs as the file. Received: shapes"):
        ks.tflite.verify(path, tmp_path / "several.tflite")
    with pytest.raises(ValueError, match="`accelerator` must be one of 'cpu', 'gpu', .*Received: accelerator='tpu'"):
        ks.tflite.verify(path, model, "tpu")


def test_zeros_are_taken_out_of_their_file(theirs, tmp_path):
    model, folder = theirs
    report = ks.tflite.encode(folder / "theirs.tflite", tmp_path / "small.tflite")
    assert report.totals["encoding"] == "sparse"
    assert report.totals["bytes_file"] == (tmp_path / "small.tflite").stat().st_size < report.totals["bytes_dense"] / 3
    assert ks.tflite.verify(tmp_path / "small.tflite", model).right
    if MISSING["gpu"] is None:
        wrong = ks.tflite.verify(tmp_path / "small.tflite", folder / "theirs.tflite", "gpu")
        assert not wrong.right and "For CPUs only" in wrong.notes[0]
    with pytest.raises(ValueError, match="encoded already"):
        ks.tflite.encode(tmp_path / "small.tflite", tmp_path / "other.tflite")
    with pytest.raises(ValueError, match=r"must get the file as it is.*Received: target='gpu'"):
        ks.tflite.encode(folder / "theirs.tflite", tmp_path / "other.tflite", "gpu")
    with pytest.raises(ValueError, match="must end in '.tflite'"):
        ks.tflite.encode(folder / "theirs.tflite", tmp_path / "other.bin")


@pytest.mark.lengthy(0)
def test_a_file_of_integers(tmp_path):
    model, x = sparsify(mlp(), 0.9), np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    options = {"quantize": "int8", "representative_data": x, "inference_type": "int8"}
    ks.tflite.export(model, tmp_path / "m.tflite", sparse=False, batch_size=1, **options)
    assert ks.tflite.verify(tmp_path / "m.tflite", model, data=x).right
    report = ks.tflite.encode(tmp_path / "m.tflite", tmp_path / "n.tflite")
    assert report.totals["parity_relative"] <= 0.02
