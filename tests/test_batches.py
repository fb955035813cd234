"""Batches of inputs; the forms of data and the errors are tested in test_neurons.py, through their user."""

import numpy as np
import pytest

from keras_sparse import batches


def test_structures_are_sliced_alike_and_float64_becomes_floatx():
    data = {"a": np.arange(10.0).reshape(5, 2), "b": [np.arange(5), np.array(list("vwxyz"))]}
    batches.check(data)
    parts = list(batches.of(data, batch_size=3))
    assert [part["a"].shape for part in parts] == [(3, 2), (2, 2)]
    assert [part["a"].dtype for part in parts] == ["float32"] * 2
    np.testing.assert_array_equal(parts[1]["a"], data["a"][3:])
    np.testing.assert_array_equal(parts[1]["b"][0], [3, 4])
    assert parts[0]["b"][1].tolist() == ["v", "w", "x"]


def test_targets_are_left_out():
    x, y = np.ones((2, 3)), np.zeros(2)
    parts = list(batches.of(iter([(x, y), (x, y, y), (x,), x, ({"a": x}, y)])))
    assert [part.shape for part in parts[:4]] == [(2, 3)] * 4
    assert parts[4]["a"].shape == (2, 3)


def test_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.arange(6.0).reshape(3, 2))
    batches.check(frame)
    assert [part.tolist() for part in batches.of(frame, batch_size=2)] == [[[0, 1], [2, 3]], [[4, 5]]]
