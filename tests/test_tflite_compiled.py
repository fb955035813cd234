"""LiteRT's compiled model: the same numbers on CPU and GPU, and no answer without a driver."""

import keras
import numpy as np
import pytest
from tflite_models import exported, lstm, mlp, several, sparsify
from tflite_mutations import attempt, mutate

import keras_sparse as ks
from keras_sparse.tflite import runtimes
from keras_sparse.tflite.commands import RuntimeMissing, gpu_driver
from keras_sparse.tflite.compiled import Engine
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.targets import get as target

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")
MISSING = runtimes.available()
needs_gpu = pytest.mark.skipif(MISSING["gpu"] is not None, reason=str(MISSING["gpu"]))
COMPILED = [
    pytest.param(name, marks=needs_gpu if name != "compiled-cpu" else []) for name in ("compiled-cpu", "gpu", "gpu-cpu")
]


def test_accelerators_are_joined():
    assert Engine("GPU+CPU").accelerators == ["GPU", "CPU"]


def randoms(worker):
    rng = np.random.default_rng(0)
    return {leaf["name"]: rng.normal(size=leaf["shape"]).astype("float32") for leaf in worker.inputs}


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """Dense files of one sample at a time."""
    folder, made = tmp_path_factory.mktemp("fixed"), {}
    for build in (mlp, several, lstm):
        made[build.__name__] = folder / f"{build.__name__}.tflite"
        ks.tflite.export(sparsify(build(), 0.9), made[build.__name__], sparse=False, batch_size=1)
    return made


def check_outputs(content, runtime):
    with runtimes.Worker(content, runtime) as worker:
        inputs = randoms(worker)
        worker.feed(inputs)
        found, again = worker.run(), worker.run()
        assert worker.time(2) > 0
    expected = runtimes.run(content, inputs)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max())
        np.testing.assert_allclose(again[name], value, atol=1e-4 * np.abs(value).max())
    return worker.accelerated


@pytest.mark.parametrize("runtime", COMPILED)
@pytest.mark.parametrize("kind", ["mlp", "several"])
def test_dense_files_are_right(kind, runtime, fixed):
    assert check_outputs(fixed[kind], runtime) is True


def upwards():
    return keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2DTranspose(2, 3)])


@needs_gpu
def test_what_the_gpu_refuses(fixed):
    """Alone it refuses a loop; with a CPU it leaves that to it. An open batch size may not load with either."""
    with pytest.raises(ValueError, match=r"runtime 'gpu'.*WHILE: Operation is not supported"):
        runtimes.run(fixed["lstm"], None, "gpu")
    assert check_outputs(fixed["lstm"], "gpu-cpu") is False
    with pytest.raises(ValueError, match=r"runtime 'gpu-cpu'.*dynamic-sized tensors"):
        runtimes.run(exported(upwards, sparse=False), None, "gpu-cpu")


def encoded(model):
    return encode(convert(Job(model)).content).content


@needs_gpu
@pytest.mark.lengthy(0)
def test_sparse_files_are_not_for_the_gpu():
    """The reason for which `takes_sparse` is False. When LiteRT mends it, this fails, and the rule may go."""
    model = keras.Sequential([keras.Input((64,), name="x"), keras.layers.Dense(64, bias_initializer="ones")])
    kernel = model.layers[0].kernel
    kernel.assign(np.where(np.random.default_rng(0).random(kernel.shape) < 0.9, 0, kernel.numpy()))
    content, x = encoded(model), np.ones((1, 64), "float32")
    with pytest.raises(ValueError, match=r"runtime 'gpu'.*DENSIFY: Operation is not supported"):
        runtimes.run(content, {"x": x}, "gpu")
    with runtimes.Worker(content, "gpu-cpu") as worker:
        worker.feed({"x": x})
        [found] = worker.run().values()
        assert worker.accelerated is False
    wrong = np.abs(found - keras.ops.convert_to_numpy(model(x)))
    np.testing.assert_allclose(wrong, 1.0, atol=1e-5)  # the bias is lost, without an error
    # Blocks, which Dense layers read directly, are garbage on the GPU alone, too, which calls itself fully accelerated.
    content = exported(mlp)
    with runtimes.Worker(content, "gpu") as worker:
        worker.feed(inputs := randoms(worker))
        [found] = worker.run().values()
        assert worker.accelerated is True
    [right] = runtimes.run(content, inputs).values()
    assert np.abs(found - right).max() > 0.5 * np.abs(right).max()
    assert not target("gpu").takes_sparse


def test_without_a_driver(tmp_path, monkeypatch):
    """A driver that is named and finds no device is missing, never a pass."""
    if MISSING["gpu"] is not None:
        pytest.skip("no GPU accelerator here")
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    assert gpu_driver() == ({}, False)
    with pytest.raises(RuntimeMissing, match=r"Vulkan driver.*apt-get install chromium"):
        runtimes.run(exported(mlp, sparse=False), None, "gpu-cpu")


def test_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path))
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    try:
        assert not gpu_driver(chromium=())[1], "a software driver out of nowhere"
    except RuntimeMissing as error:
        assert "setup-gpu" in str(error) or "no GPU accelerator" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["gpu-cpu", "micro", "compiled-cpu"])
def test_damaged_files(runtime, tmp_path):
    """In a process of its own, bounded in time and memory: an answer or a clean error."""
    if MISSING[runtime] is not None:
        pytest.skip(MISSING[runtime])
    whole, answers, seeds = exported(mlp, sparse=False), 0, range(30)
    for seed in seeds:
        path = tmp_path / f"{seed}.tflite"
        path.write_bytes(mutate(whole, seed))
        answers += attempt(lambda path=path: runtimes.run(path, None, runtime, timeout=20)) == "answer"
    assert 0 < answers < len(seeds)
