"""Vela: what Ethos-U NPUs take of a file, and what zeros are worth there."""

import keras
import numpy as np
import pytest
from tflite_models import exported, mlp

import keras_sparse as ks
from keras_sparse.tflite import runtimes
from keras_sparse.tflite.commands import get
from keras_sparse.tflite.vela import Engine

MISSING = runtimes.available()["ethos-u"]
needs_vela = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install ethos-u-vela" in get("ethos-u").missing()
    with pytest.raises(ValueError, match="runs none"):
        Engine().run()


@needs_vela
def test_floats_stay_on_the_cpu():
    with runtimes.Worker(exported(mlp, sparse=False), "ethos-u") as worker:
        made = worker.compile("ethos-u55-128")
        worker.compile("ethos-u65-256")
        assert made["npu_operators"] == 0 and made["cpu_operators"] > 0
        with pytest.raises(ValueError, match="runtime 'ethos-u'.*runs none"):
            worker.run()


@needs_vela
@pytest.mark.slow
def test_zeros_are_skipped(tmp_path):
    """Arm's promise, in its compiler's numbers: 95 % zeros of a plain, densely encoded file of integers."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, activation="relu") for n in (512, 256)]
    model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    options = {"quantize": "int8", "representative_data": np.random.default_rng(0).normal(size=(32, 784))}
    forecast = ks.tflite.check(model, "ethos-u85", sparsity=0.95)
    made = []
    for sparsity in (0.0, 0.95):
        ks.prune(model, sparsity)
        ks.tflite.export(model, tmp_path / "m.tflite", sparse=False, batch_size=1, **options)
        with runtimes.Worker(tmp_path / "m.tflite", "ethos-u") as worker:
            made.append(worker.compile("ethos-u85-128"))
    assert made[1]["bytes_encoded"] < 0.08 * made[0]["bytes_encoded"]
    assert made[1]["cycles"] < 0.35 * made[0]["cycles"]
    assert forecast.cycles == pytest.approx([one["cycles"] for one in made], rel=0.15)
    assert any("0.29 of the dense" in note for note in forecast.notes)
