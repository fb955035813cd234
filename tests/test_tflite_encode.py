"""Encoding files that others wrote: see test_tflite_verify.py for what comes of them."""

import pytest

import keras_sparse as ks


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.encode(tmp_path / "none.tflite", tmp_path / "out.tflite")
    with pytest.raises(ValueError, match="needs a `target`"):
        ks.tflite.encode(tmp_path / "none.tflite", tmp_path / "out.tflite", None)
