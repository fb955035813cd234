"""Conversion, and silence."""

import os
import sys

import keras
import pytest
from keras import layers
from tflite_models import mlp

import keras_sparse as ks
from keras_sparse.quiet import quiet
from keras_sparse.tflite.convert import convert
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
