"""Choices: the smallest of the encodings that are right, and why."""

import keras
import pytest
from tflite_models import image_model, mlp, sparsify
from xnnpack_graphs import BROKEN

from keras_sparse.tflite.choice import smallest_right
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.verification import Verification

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def chosen(model, sparse=True):
    job = Job(model)
    conversion = convert(job)
    return conversion.content, smallest_right(conversion.content, Verification.of(job, conversion), sparse)


@pytest.mark.parametrize(
    ("sparsity", "sparse", "encoding"), [(0.9, True, "sparse"), (0.9, False, "dense"), (0.1, True, "dense")]
)
def test_the_smaller_one(sparsity, sparse, encoding):
    dense, choice = chosen(sparsify(mlp(), sparsity), sparse)
    assert choice.encoding == encoding and (choice.content == dense) == (encoding == "dense")
    assert (choice.bytes_sparse is not None) == sparse and len(choice.verified_on) == 1
    assert choice.parity.relative < 1e-5
    assert any("not smaller" in note for note in choice.notes) == (sparsity < 0.5)


@pytest.mark.lengthy(0)
def test_out_of_the_way_of_wrong_kernels():
    """Stored without zeros, and kept out of the sparse kernels that would compute wrong numbers."""
    dense, choice = chosen(image_model(BROKEN["MAX_POOL_2D"]))
    assert choice.encoding == "sparse" and len(choice.content) < len(dense)
    assert any("stays out of XNNPACK's sparse kernels" in note for note in choice.notes)


def test_none_is_right():
    first, second = sparsify(mlp(), 0.9), sparsify(mlp(), 0.9)
    conversion = convert(Job(first))
    verification = Verification.of(Job(second), conversion)
    with pytest.raises(ExportError, match="does not compute what the model computes.*Received: output 'output_0'"):
        smallest_right(conversion.content, verification)


def test_strict_without_another_runtime():
    job = Job(mlp())
    conversion = convert(job)
    with pytest.raises(ExportError, match="none that answered in time"):
        smallest_right(conversion.content, Verification.of(job, conversion, strict=True))
