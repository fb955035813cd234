"""The converter: a SavedModel becomes a file, in the model's order and precision."""

import keras
import numpy as np
import pytest
from tflite_models import mlp, several

from keras_sparse.tflite.converter import in_float32, in_order, save, to_tflite
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="runs under TensorFlow alone")


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.lengthy(1)
def test_a_saved_model_becomes_a_file(batch, tmp_path):
    job, outputs = save(Job(several()), tmp_path, batch)
    assert outputs == ["label", "score"] and job.is_saved
    graph = read(to_tflite(job)).subgraphs[0]
    assert {graph.tensors[n].shape[0] for n in graph.inputs} == {batch or 1}
    assert {bool(graph.tensors[n].opened) for n in graph.inputs} == {batch is None}


def test_a_file_in_order_is_left_as_it_is(tmp_path):
    job, outputs = save(Job(several()), tmp_path, None)
    inputs = [leaf.name for leaf in job.signature.inputs]
    content = in_order(to_tflite(job), inputs, outputs)
    assert in_order(content, inputs, outputs) is content


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    model = mlp()
    keras.config.set_dtype_policy(before)
    copy = in_float32(model)
    assert {layer.compute_dtype for layer in copy.layers} == {"float32"} and keras.config.dtype_policy() == before
    for value, other in zip(copy.weights, model.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.cast(value, other.dtype), other)
    assert in_float32(copy) is copy
