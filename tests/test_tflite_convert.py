"""Conversion, and silence."""

import os
import sys

import pytest
from tflite_models import mlp

from keras_sparse.quiet import quiet
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.signatures import signature


@pytest.mark.parametrize("quantize", [None, "float16", "dynamic"])
def test_a_conversion_is_a_model(quantize):
    model = mlp()
    conversion = convert(model, signature(model), quantize)
    assert conversion.content[4:8] == b"TFL3" and not conversion.fixed_batch


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
