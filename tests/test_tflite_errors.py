"""Errors: one line that a user can act on."""

import errno
import re

import pytest

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


@pytest.mark.parametrize("text", ["No space left on device", "write: File too large", "Disk quota exceeded"])
def test_a_full_disk(text):
    with pytest.raises(OSError, match="No space left for temporary files") as error:
        raise_if_disk_full(RuntimeError(f"Failed to write: {text}"))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError):
        raise_if_disk_full(FileNotFoundError("gone"))
    assert raise_if_disk_full(ValueError("another")) is None
