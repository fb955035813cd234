"""Jobs: what another process reads is what was written."""

import json

import keras
import numpy as np
import pytest
from tflite_models import dict_of_inputs, mlp, nested, several

from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.job import Job, modules
from keras_sparse.tflite.signatures import signature

tensorflow_only = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="loads models as TensorFlow does")


@tensorflow_only
@pytest.mark.parametrize("build", [mlp, several, nested, dict_of_inputs])
@pytest.mark.parametrize("count", [0, 3])
def test_a_job_comes_back_from_its_folder(build, count, tmp_path):
    model, rng = build(), np.random.default_rng(0)
    called = signature(model).with_batch(2)
    samples = [[rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in called.inputs] for _ in range(count)]
    job = Job(model, called, "int8", samples, "uint8")
    job.to_folder(tmp_path)
    found = Job.from_folder(tmp_path)
    assert (found.name, found.quantize, found.inference_type) == (model.name, "int8", "uint8")
    assert found.signature.inputs == called.inputs and not found.is_saved
    assert len(found.samples) == count
    for batch, other in zip(samples, found.samples, strict=True):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))
    x = [np.ones(leaf.shape, leaf.dtype) for leaf in called.inputs]
    for a, b in zip(*(keras.tree.flatten(one.signature.call(one.model, x)) for one in (job, found)), strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))


def test_a_saved_model_is_named_by_its_path(tmp_path):
    job = Job("/some/folder", signature(mlp()), name="net")
    job.to_folder(tmp_path)
    assert Job.from_folder(tmp_path).model == "/some/folder" and Job.from_folder(tmp_path).is_saved
    assert not (tmp_path / "model.keras").exists()


def test_what_the_model_says_itself():
    model = several()
    assert Job(model).signature == signature(model) and Job(model).name == model.name


@tensorflow_only
def test_a_model_that_cannot_be_loaded_again(tmp_path):
    Job(mlp()).to_folder(tmp_path)
    (tmp_path / "model.keras").write_bytes(b"")
    with pytest.raises(ExportError, match="cannot be loaded"):
        Job.from_folder(tmp_path)


class Unregistered(keras.layers.Layer):
    def call(self, x):
        return x + 1


@pytest.mark.parametrize("module", ["__main__", "somewhere.else"])
def test_modules_that_another_process_must_import(module, tmp_path, monkeypatch):
    monkeypatch.setattr(Unregistered, "__module__", module)
    keras.Sequential([keras.Input((4,)), Unregistered()]).save(tmp_path / "m.keras")
    found = modules(tmp_path / "m.keras")
    assert list(found) == [module] and json.dumps(found)
    if module == "__main__":
        with pytest.raises(ExportError, match="Move it to a module.*Received: 'Unregistered'"):
            Job(keras.Sequential([keras.Input((4,)), Unregistered()])).to_folder(tmp_path)


@tensorflow_only
@pytest.mark.lengthy(0)
def test_an_open_batch_is_fixed_only_where_it_must_be():
    inputs = keras.Input((5, 4))
    assert convert(Job(keras.Model(inputs, keras.layers.LSTM(3)(inputs)))).fixed_batch
    assert not convert(Job(mlp())).fixed_batch
