"""Tables of time: what layers take at other widths, on a real runtime and on one that counts weights."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.tflite.timing import TimeTable

L = keras.layers


def network():
    stack = [L.Dense(512, "relu", name="a"), L.Dense(512, "relu", name="b"), L.Dense(8, name="head")]
    return keras.Sequential([keras.Input((256,)), *stack])


def table_of(model):
    channels = ks.graph.Channels(model)
    return TimeTable(channels, [group.channels for group in channels.groups if not group.reasons])


def everything(labels):
    return np.ones(np.shape(labels), bool)


def test_times_are_measured_where_seconds_are():
    with pytest.raises(ValueError, match="runtime='arm64'"):
        ks.prune(network(), ks.Budget(milliseconds=1.0, runtime="arm64"), pattern="channel")


@pytest.mark.slow
def test_tables_of_a_real_runtime():
    model = network()
    before = model.get_weights()
    table = table_of(model)
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
    assert [row["layer"] for row in table.rows] == ["a", "b", "head"]
    assert all(row["milliseconds"] == sorted(row["milliseconds"]) for row in table.rows)
    assert table.milliseconds(everything) == pytest.approx(table.whole)
    report = ks.prune(model, ks.Budget(milliseconds=0.5 * table.whole), pattern="channel")
    assert 0 < report.totals["milliseconds_measured"] < table.whole
