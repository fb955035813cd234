"""Errors: one line that a user can act on."""

import errno
import re

import keras
import numpy as np
import pytest
from exported_files import tensorflow_only
from keras import layers, ops

import keras_sparse as ks
from keras_sparse.tflite.errors import ExportError, first_line, raise_if_disk_full, refusal


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("", "no message"),
        ("\n  one.\ntwo", "one"),
        ('<unknown>:0: error: loc(callsite("a")): bad op', "bad op"),
        ("Exception encountered when calling Dense.call().\n\nshapes differ", "Exception .* shapes differ"),
        ("x" * 1000, "x{300}"),
    ],
)
def test_first_line(message, line):
    assert re.fullmatch(f"ValueError: {line}", first_line(ValueError(message)))


def test_refusals():
    error = refusal("net", RuntimeError("Some ops are missing\nTF Select ops: B, A\nCustom ops: C"))
    assert isinstance(error, ExportError) and "no built-in operator for: A, B, C." in str(error)
    assert "gave up: RuntimeError: bad." in str(refusal("net", RuntimeError("bad.")))
    own = ExportError("own")
    assert refusal("net", own) is own


@tensorflow_only
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (lambda x: ops.argmax(x, -1), lambda x: ops.top_k(x, 1)[1][..., 0]),
        (lambda x: ops.argmin(x, -1), lambda x: ops.top_k(-x, 1)[1][..., 0]),
    ],
)
@pytest.mark.lengthy(0)
def test_class_numbers(wrong, right, tmp_path):
    """What the error advises is exported, and the same."""
    x = keras.Input((8,))
    y = layers.Dense(5)(x)
    with pytest.raises(ExportError, match=r"for: BitwiseAnd.*top_k\(x, 1\)\[1\]\[..., 0\]` is the same"):
        ks.tflite.export(keras.Model(x, wrong(y)), tmp_path / "m.tflite")
    model, data = keras.Model(x, [wrong(y), right(y)]), np.random.default_rng(0).normal(size=(50, 8))
    np.testing.assert_array_equal(*model.predict(data, verbose=0))
    assert ks.tflite.export(keras.Model(x, right(y)), tmp_path / "m.tflite").parity == 0


def test_lookups():
    error = refusal("net", RuntimeError("TF Select ops: HashTableV2, LookupTableFindV2"))
    assert "export the part of the model behind it, and let the app look up." in str(error)


@pytest.mark.parametrize("text", ["No space left on device", "write: File too large", "Disk quota exceeded"])
def test_a_full_disk(text):
    with pytest.raises(OSError, match="No space left for temporary files") as error:
        raise_if_disk_full(RuntimeError(f"Failed to write: {text}"))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError):
        raise_if_disk_full(FileNotFoundError("gone"))
    assert raise_if_disk_full(ValueError("another")) is None
