"""The worker: requests and answers as the lines that they are."""

import io
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from tflite_models import several

import keras_sparse as ks
from keras_sparse.quiet import quiet
from keras_sparse.tflite import worker
from keras_sparse.tflite.worker import serve


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("worker") / "several.tflite"
    ks.tflite.export(several(), path, target="xnnpack")
    return str(path)


def ask(*requests):
    answers = io.StringIO()
    with quiet():
        serve([json.dumps(request) for request in requests], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_run(path, tmp_path):
    image, age = np.ones((2, 8, 8, 1), "float32"), np.zeros((2, 1), "float32")
    (tmp_path / "inputs").write_bytes(image.tobytes() + age.tobytes())
    arrays = [
        {"name": "image", "dtype": "float32", "shape": [2, 8, 8, 1], "offset": 0},
        {"name": "age", "dtype": "float32", "shape": [2, 1], "offset": image.nbytes},
    ]
    loaded, fed, ran, timed, memory = ask(
        {"do": "load", "path": path, "threads": 1},
        {"do": "feed", "arrays": arrays, "path": str(tmp_path / "inputs")},
        {"do": "run", "path": str(tmp_path / "outputs")},
        {"do": "time", "repeats": 2},
        {"do": "memory"},
    )
    assert {leaf["name"]: leaf["shape"] for leaf in loaded["inputs"]} == {"image": [1, 8, 8, 1], "age": [1, 1]}
    assert sorted(loaded["outputs"]) == ["label", "score"] and fed == {}
    assert {array["name"]: array["shape"] for array in ran["arrays"]} == {"label": [2, 4], "score": [2, 1]}
    assert (tmp_path / "outputs").stat().st_size == 2 * 5 * 4
    assert timed["seconds"] > 0 and memory["bytes"] >= 0


def test_an_error_is_an_answer(path):
    first, second, third = ask(
        {"do": "load", "path": "missing.tflite", "threads": 1},
        {"do": "nothing of the kind"},
        {"do": "load", "path": path, "threads": 1},
    )
    assert "missing.tflite" in first["error"] and second["error"].startswith("AttributeError") and "error" not in third


def started(tmp_path, run, platform=sys.platform):
    """A worker that is busy with a run, of an engine that does nothing else, as it would be on a platform."""
    (tmp_path / "engine.py").write_text(
        f"import ctypes, time\nclass Engine:\n    def set(self): pass\n    def run(self):\n        {run}\n"
    )
    script = f"""
        import runpy, sys, numpy
        sys.platform = {platform!r}
        sys.argv[1:] = [{str(tmp_path / "engine.py")!r}]
        runpy.run_path({worker.__file__!r}, run_name="__main__")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(b'{"do": "nothing"}\n')
    process.stdin.flush()
    assert b"AttributeError" in process.stdout.readline()  # it has begun
    process.stdin.write(b'{"do": "time", "repeats": 1}\n')
    process.stdin.flush()
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends what holds Python's lock")
@pytest.mark.parametrize("run", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"])  # without Python's lock, and with
def test_a_worker_ends_with_the_one_that_asks(run, tmp_path):
    with started(tmp_path, run) as process:
        process.stdin.close()
        assert process.wait(10) != 0


def test_it_does_on_other_platforms(tmp_path):
    with started(tmp_path, "time.sleep(60)", platform="darwin") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.stdin.close()
        assert process.wait(10) != 0
