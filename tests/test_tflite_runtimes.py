"""Runtimes: the same numbers on each, in processes that can do the caller no harm."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import attention, exported, lstm, mlp, qualifying, several
from tflite_mutations import mutate, outcome

from keras_sparse.quiet import quiet
from keras_sparse.tflite import runtimes
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.job import Job

# Two correct programs differ by the order of their sums and by their polynomials for exp and tanh.
TOLERANCE = 1e-4
MISSING = runtimes.available()


def each_runtime(*names):
    """Parametrize over runtimes; those that are not installed are skipped, and why. Emulated ARM64 is slow."""
    return pytest.mark.parametrize(
        "runtime",
        [
            pytest.param(
                name,
                marks=[pytest.mark.skipif(MISSING[name] is not None, reason=str(MISSING[name]))]
                + [pytest.mark.slow] * (name == "arm64"),
            )
            for name in names
        ],
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for build in (mlp, several, attention, lstm, qualifying):
        paths[build.__name__] = folder / f"{build.__name__}.tflite"
        paths[build.__name__].write_bytes(exported(build))
    return paths


def interpreted(path, inputs):
    """The oracle: the same file in the interpreter of this process."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        return Interpreter(model_path=str(path)).get_signature_runner("serving_default")(**inputs)


def inputs_of(kind, size=1):
    rng = np.random.default_rng(0)
    floats = {
        "mlp": {"pixels": (64,)},
        "several": {"image": (8, 8, 1), "age": (1,)},
        "lstm": {"*": (10, 8)},
        "qualifying": {"*": (32, 32, 3)},
    }
    if kind == "attention":
        return {"tokens": rng.integers(0, 37, (size, 12)).astype("int32")}
    return {name: rng.normal(size=(size, *shape)).astype("float32") for name, shape in floats[kind].items()}


def named(path, inputs, runtime="native"):
    """With the name that the file gives to an input whose layer was not named."""
    if "*" in inputs:
        with runtimes.Worker(path, runtime) as worker:
            return {worker.inputs[0]["name"]: inputs["*"]}
    return inputs


@each_runtime("native", "x86-no-avx", "wasm", "arm64")
@pytest.mark.parametrize("kind", ["mlp", "several", "attention", "lstm", "qualifying"])
@pytest.mark.thorough(5)
def test_outputs_are_those_of_the_interpreter(kind, runtime, files):
    inputs = named(files[kind], inputs_of(kind), runtime)
    expected = interpreted(files[kind], inputs)
    found = runtimes.run(files[kind], inputs, runtime)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=TOLERANCE, atol=TOLERANCE * np.abs(value).max())


@each_runtime("native", "x86-no-avx")
def test_batches_of_several_sizes(runtime, files):
    batches = [inputs_of("several", size) for size in (3, 1, 2)]
    found = runtimes.run(files["several"], batches, runtime)
    for batch, outputs in zip(batches, found, strict=True):
        expected = interpreted(files["several"], batch)
        assert all(np.allclose(outputs[name], expected[name], rtol=TOLERANCE, atol=1e-6) for name in expected)


@each_runtime("wasm")
def test_a_batch_in_node(runtime, files):
    """LiteRT.js 2.5.3 answers with wrong numbers: it must not get there."""
    with pytest.raises(ValueError, match=r"takes arrays of shape \(1, 64\).*Received: an array of shape \(2, 64\)"):
        runtimes.run(files["mlp"], inputs_of("mlp", 2), runtime)


@each_runtime("native", "wasm")
def test_threads(runtime, files):
    one, two = (runtimes.run(files["mlp"], inputs_of("mlp"), runtime, threads=n) for n in (1, 2))
    np.testing.assert_allclose(two["output_0"], one["output_0"], rtol=TOLERANCE)


def test_content_and_a_list(files):
    inputs = inputs_of("mlp", 2)
    first, second = runtimes.run(files["mlp"].read_bytes(), [inputs, {"pixels": np.zeros((1, 64), int)}])
    np.testing.assert_array_equal(first["output_0"], runtimes.run(files["mlp"], inputs)["output_0"])
    assert second["output_0"].shape == (1, 64)


def test_random_inputs_are_repeated(files):
    first, second = (runtimes.run(files["mlp"], None) for _ in range(2))
    np.testing.assert_array_equal(first["output_0"], second["output_0"])


def test_a_worker_measures_and_leaves_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with runtimes.Worker(files["mlp"].read_bytes()) as worker:
        assert worker.inputs == [{"name": "pixels", "dtype": "float32", "shape": [1, 64]}]
        assert worker.outputs == ["output_0"]
        worker.feed()
        assert 0 < worker.time(10) < 1 and 0 < worker.load < 10 and 0 < worker.memory() < 1 << 30
        assert os.listdir(tmp_path)
    assert os.listdir(tmp_path) == []


BUSY = """
import sys
from keras_sparse.tflite.runtimes import Worker
with Worker(sys.argv[1], sys.argv[2]) as worker:
    worker.feed()
    print("busy", flush=True)
    worker.time(10**9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what runs")
@each_runtime("native", "x86-no-avx", "wasm", "arm64", "compiled-cpu", "gpu", "micro")
@pytest.mark.lengthy(1)
def test_a_worker_ends_with_its_parent(runtime, files):
    line = [sys.executable, "-c", BUSY, str(files["mlp"]), runtime]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout.readline() == b"busy\n"
        workers = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    deadline = time.monotonic() + 10
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 1 and not any(map(runs, workers))


def runs(number):
    """Whether a process is there, and not ended without anyone asking how."""
    try:
        return pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@each_runtime("arm64")
def test_instructions_are_exact(runtime, files):
    counts = []
    for _ in range(2):
        with runtimes.Worker(files["qualifying"], runtime) as worker:
            worker.feed()
            counts.append((worker.load, worker.count()))
    assert counts[0] == counts[1] and 10_000 < counts[0][1] < 10_000_000


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"for each input of the file: \['pixels'\]. Received: \[\]"),
        ({"pixels": np.zeros((1, 64)), "more": 1}, r"Received: \['more', 'pixels'\]"),
        ({"pixels": np.zeros((1, 63))}, r"\(any, 64\) on the runtime 'native'. Received.*\(1, 63\)"),
        ({"pixels": np.zeros(64)}, r"Received: an array of shape \(64,\)"),
    ],
)
def test_wrong_inputs(inputs, message, files):
    with pytest.raises(ValueError, match=message):
        runtimes.run(files["mlp"], inputs)


def test_inputs_without_names(files):
    with pytest.raises(TypeError, match="must be a dict from the name of each input.*Received: ndarray"):
        runtimes.run(files["mlp"], np.zeros((1, 64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tpu"}, "`runtime` must be one of 'native', 'x86-no-avx', 'wasm', 'arm64', .*. Received.*'tpu'"),
        ({"threads": 0}, "`threads` must be a positive integer. Received: threads=0"),
        ({"runtime": "arm64", "threads": 2}, "`threads` must be at most 1 on the runtime 'arm64'. Received: threads=2"),
    ],
)
def test_wrong_options(options, message, files):
    with pytest.raises(ValueError, match=message):
        runtimes.run(files["mlp"], inputs_of("mlp"), **options)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        runtimes.run(tmp_path / "none.tflite", {})


def test_time_is_bounded(files):
    with pytest.raises(TimeoutError, match=r"longer than 0.01 seconds. Received: path='.*mlp.tflite'"):
        runtimes.run(files["mlp"], inputs_of("mlp"), timeout=0.01)


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="limits of memory exist on Linux only")
def test_memory_is_bounded():
    """The product of each pair of 40,000 numbers takes 6.4 GB."""
    inputs = keras.Input((40_000,), batch_size=1)
    x = layers.Dot(axes=2)([layers.Reshape((40_000, 1))(inputs), layers.Reshape((40_000, 1))(inputs)])
    model = keras.Model(inputs, layers.GlobalMaxPooling1D()(x))
    content = convert(Job(model)).content
    assert len(content) < 100_000
    with pytest.raises(ValueError, match=r"cannot be run on the runtime 'native'. Received: content of \d+ bytes \("):
        runtimes.run(content, None)


def check_mutations(files, seeds, tmp_path):
    kinds = sorted(files)
    answers = 0
    for seed in seeds:
        path = tmp_path / f"{seed}.tflite"
        path.write_bytes(mutate(files[kinds[seed % len(kinds)]].read_bytes(), seed))
        answers += outcome(path).count("answer")
        path.unlink()
    # Some damage does no harm and some does: a test that meets one of the two alone tests nothing.
    assert 0 < answers < 2 * len(seeds)


@pytest.mark.lengthy(0)
def test_damaged_files(files, tmp_path):
    check_mutations(files, range(30), tmp_path)


@pytest.mark.slow
def test_more_damaged_files(files, tmp_path):
    check_mutations(files, range(30, 200), tmp_path)


@pytest.mark.parametrize("runtime", ["native", "x86-no-avx"])
@pytest.mark.lengthy(1)
def test_images_of_any_size(runtime):
    if runtimes.available()[runtime] is not None:
        pytest.skip(runtimes.available()[runtime])
    inputs = keras.Input((None, None, 3), name="image")
    model = keras.Model(inputs, keras.layers.Conv2D(4, 3, padding="same")(inputs))
    content = convert(Job(model)).content
    for shape in ((1, 5, 7, 3), (2, 9, 4, 3)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        found = runtimes.run(content, {"image": x}, runtime)["output_0"]
        np.testing.assert_allclose(found, keras.ops.convert_to_numpy(model(x)), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(any, any, any, 3\)"):
        runtimes.run(content, {"image": np.zeros((1, 5, 5, 4))}, runtime)
