"""TFLite Micro: the model's numbers from dense files, and what it does not load."""

import numpy as np
import pytest
from tflite_models import cnn, exported, mlp, several, sparsify

import keras_sparse as ks
from keras_sparse.tflite import runtimes
from keras_sparse.tflite.commands import get
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.micro import Engine
from keras_sparse.tflite.targets import get as target

MISSING = runtimes.available()["micro"]
needs_micro = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --pre tflite-micro" in get("micro").missing()
    assert callable(Engine().run)


@needs_micro
@pytest.mark.parametrize("build", [mlp, several])
def test_dense_files_are_right(build):
    content = exported(build, sparse=False)
    rng = np.random.default_rng(0)
    with runtimes.Worker(content, "micro") as worker:
        inputs = {leaf["name"]: rng.normal(size=leaf["shape"]).astype("float32") for leaf in worker.inputs}
        worker.feed(inputs)
        found, again = worker.run(), worker.run()
    expected = runtimes.run(content, inputs)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * max(1, np.abs(value).max()))
        np.testing.assert_array_equal(found[name], again[name])


@needs_micro
def test_sparse_files_do_not_load():
    """The reason for which `takes_sparse` is False."""
    with pytest.raises(ValueError, match="runtime 'micro'.*DENSIFY"):
        runtimes.run(exported(several), None, "micro")
    assert target("micro").takes_sparse is False


@needs_micro
def test_weights_in_sparse_blocks_are_wrong():
    """They need no DENSIFY, so nothing refuses them: why files for it are dense."""
    model = sparsify(mlp(), 0.9, blocks=True)
    dense = convert(Job(model)).content
    x = np.random.default_rng(0).normal(size=(1, *model.input_shape[1:])).astype("float32")
    expected = model.predict(x, verbose=0)
    for content, right in ((dense, True), (encode(dense).content, False)):
        with runtimes.Worker(content, "micro") as worker:
            worker.feed({leaf["name"]: x for leaf in worker.inputs})
            [found] = worker.run().values()
        assert (np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()) == right


@needs_micro
@pytest.mark.slow
def test_integers(tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 16, 16, 3)).astype("float32")
    model = sparsify(cnn(), 0.5)
    ks.tflite.export(
        model, tmp_path / "m.tflite", sparse=False, quantize="int8", inference_type="int8", representative_data=x
    )
    with runtimes.Worker(tmp_path / "m.tflite", "micro") as micro, runtimes.Worker(tmp_path / "m.tflite") as native:
        assert micro.scales == native.scales and micro.inputs == native.inputs
        stored = {micro.inputs[0]["name"]: np.arange(16 * 16 * 3).reshape(1, 16, 16, 3) % 200 - 100}
        outputs = []
        for worker in (micro, native):
            worker.feed(stored)
            outputs.append(next(iter(worker.run().values())).astype(int))
    assert np.abs(outputs[0] - outputs[1]).max() <= 3 and np.ptp(outputs[1]) > 10
