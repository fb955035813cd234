"""Editing: a file that is packed again is the same, and aligned."""

import keras
import numpy as np
import pytest
from tflite_models import MODELS

from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.signatures import signature

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


@pytest.mark.parametrize("kind", ["cnn", "lstm", "several"])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_a_file_that_is_packed_again(kind):
    model = MODELS[kind]()
    called = signature(model)
    conversion = convert(Job(model, called))
    file = File(conversion.content)
    weights = [t for graph in file.model.subgraphs for t in graph.tensors if file.data(t) is not None]
    assert {file.dtype(tensor) for tensor in weights} >= {"float32"}
    # In a buffer of its own, so that the old one becomes empty.
    file.store(weights[0], file.data(weights[0]))
    packed = file.pack()
    before, after = read(conversion.content), read(packed)
    for graph, other in zip(before.subgraphs, after.subgraphs, strict=True):
        assert [o.name for o in graph.operators] == [o.name for o in other.operators]
        for tensor, same in zip(graph.tensors, other.tensors, strict=True):
            assert (tensor.name, tensor.shape, tensor.dtype) == (same.name, same.shape, same.dtype)
            assert tensor.stored is None or tensor.stored.tobytes() == same.stored.tobytes()
    assert abs(len(packed) - len(conversion.content)) < 64 * len(weights) + 1024
    starts = [
        tensor.stored.ctypes.data - np.frombuffer(packed, "uint8").ctypes.data
        for graph in after.subgraphs
        for tensor in graph.tensors
        if tensor.stored is not None
    ]
    assert starts and all(start % 16 == 0 for start in starts)
    batches = [[array[:1] for array in batch] for batch in random_batches(model, called)]
    assert Reference(model, called, batches).compare(packed).relative < 1e-5
