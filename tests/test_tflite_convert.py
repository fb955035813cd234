"""Conversion, and silence."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import mlp

import keras_sparse as ks
from keras_sparse.quiet import quiet
from keras_sparse.tflite.convert import _Process, convert
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.signatures import signature


@pytest.mark.parametrize("quantize", [None, "float16", "dynamic"])
@pytest.mark.lengthy(1)
def test_a_conversion_is_a_model(quantize):
    model = mlp()
    conversion = convert(Job(model, quantize=quantize))
    assert conversion.content[4:8] == b"TFL3" and not conversion.fixed_batch


@pytest.mark.lengthy(0)
def test_a_job_or_what_it_is_made_of():
    model = mlp()
    assert convert(model, signature(model), "float16").content == convert(Job(model, quantize="float16")).content


@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.lengthy(1)
def test_inputs_and_outputs_are_in_the_models_order(quantize):
    """As those find them who go by position; one tensor may be an output twice."""
    inputs = [keras.Input((8,), name=name) for name in ("query", "unused", "image", "age")]
    x = layers.Concatenate()([inputs[0], *inputs[2:]])
    outputs = [layers.Dense(units)(x) for units in range(1, 13)]
    model = keras.Model(inputs, [*outputs, outputs[3]])
    graph = read(convert(Job(model, quantize=quantize)).content).subgraphs[0]
    names = [graph.tensors[n].name for n in graph.inputs]
    assert [name.split("default_")[1].split(":")[0] for name in names] == ["query", "unused", "image", "age"]
    units = [graph.tensors[n].shape[1] for n in graph.outputs]
    assert units[:12] == list(range(1, 13))


@pytest.mark.slow  # half a gigabyte
def calibrated(model, seed=0):
    """The bytes of a file of integers, of a model with one input."""
    shape = (1, *model.inputs[0].shape[1:])
    samples = [[row] for row in np.random.default_rng(seed).normal(size=(8, *shape)).astype("float32")]
    return convert(Job(model, signature(model).with_batch(1), "int8", samples)).content


def test_calibrations_share_a_process_and_nothing_else():
    model = mlp()
    first, process, other = calibrated(model), _Process.kept, calibrated(model, 1)
    assert calibrated(model) == first != other
    assert _Process.kept is process is not None


@pytest.mark.slow
def test_a_process_that_was_ended_costs_a_new_one():
    model = mlp()
    first = calibrated(model)
    _Process.kept.popen.kill()  # as a system does that is short of memory
    assert calibrated(model) == first
    recurrent = keras.Sequential([keras.Input((6, 4)), layers.LSTM(3)])
    with pytest.raises(ExportError, match="ended without a result. TensorFlow crashed.*exit status -"):
        calibrated(recurrent)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: calibrated(model), range(3))) == {first}


@pytest.mark.slow
def test_a_process_that_ceases_to_wait_is_not_missed():
    model = mlp()
    first = calibrated(model)
    process = _Process.kept.popen
    os.kill(process.pid, signal.SIGSTOP)  # it is there still, and reads the request too late
    process.stdin.close()
    process.stdin = open(os.devnull, "w")
    os.kill(process.pid, signal.SIGCONT)
    assert calibrated(model) == first
    assert process.poll() is not None


@pytest.mark.slow
def test_the_process_ends_with_the_one_that_asks(tmp_path):
    program = """
import os, sys
import keras
import numpy as np
from keras_sparse.tflite.convert import _Process, convert
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
convert(model, quantize="int8", samples=[[np.ones((1, 4), "float32")]])
print(_Process.kept.popen.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    pid, ends = int(run.stdout.split()[-1]), time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < ends:
        time.sleep(0.1)
    assert run.returncode == -9 and not os.path.exists(f"/proc/{pid}")


def test_a_model_that_no_file_can_hold_is_refused_at_once(tmp_path):
    table = layers.Embedding(2**29, 1, embeddings_initializer="zeros", dtype="float16")
    model = keras.Sequential([keras.Input((1,), dtype="int32"), table])
    with pytest.raises(ks.tflite.ExportError, match=r"at most 2,147,483,647 bytes \(2 GB\).* take 2,147,483,6"):
        ks.tflite.export(model, tmp_path / "m.tflite", quantize="float16")
    assert not list(tmp_path.iterdir())


def test_quiet_restores_what_it_redirects(capfd):
    print("before")
    with quiet(), quiet():
        print("inside")
        os.write(1, b"inside")
        os.write(2, b"inside")
    sys.stdout.flush()
    os.write(2, b"after")
    assert capfd.readouterr() == ("before\n", "after")
    with pytest.raises(KeyError), quiet():
        raise KeyError
    os.write(1, b"once more")
    assert capfd.readouterr().out == "once more"


def test_quiet_leaves_no_descriptor_open():
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(5):
        with quiet():
            pass
    assert before is None or len(os.listdir("/proc/self/fd")) == before
