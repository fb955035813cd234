"""What the tests of exports do with a file."""

import pathlib

import keras
import pytest
from ai_edge_litert.interpreter import Interpreter

from keras_sparse.quiet import quiet

# Elsewhere each export starts a process of its own (several seconds); test_other_backends covers those.
tensorflow_only = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="slow on other backends")


def run(path, **inputs):
    """The outputs of a file, by the interpreter alone."""
    with quiet():
        return Interpreter(model_path=str(path)).get_signature_runner("serving_default")(**inputs)


def clean(folder):
    """Whether nothing was left in a folder."""
    return list(pathlib.Path(folder).iterdir()) == []
