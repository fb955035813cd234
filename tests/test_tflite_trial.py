"""Trials: what `check` says of a target is what its runtime does."""

import keras
import pytest
from keras import layers
from tflite_models import exported, lstm, mlp, sparsify

import keras_sparse as ks
from keras_sparse.tflite.targets import get
from keras_sparse.tflite.trial import tried

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")
MISSING = ks.tflite.runtimes.available()


def sign():
    inputs = keras.Input((8,))
    return keras.Model(inputs, keras.ops.sign(layers.Dense(8)(inputs)))


@pytest.mark.parametrize(
    ("build", "target", "runtime", "verdict", "reason"),
    [
        (mlp, "gpu", "gpu-cpu", "runs dense", "90% zeros that the model has now gain nothing there"),
        (lstm, "gpu", "gpu-cpu", "in part on the CPU", "WHILE: Operation is not supported"),
        (mlp, "micro", "micro", "runs dense", "ks.shrink"),
        (sign, "micro", "micro", "refused", "op code SIGN"),
        (mlp, "xnnpack-wasm", "wasm", "runs sparse", ""),
        (mlp, "ethos-u85", "ethos-u", "runs sparse", "2 of 3 operators|3 of 3 operators"),
        (mlp, "qualcomm", "native", "not tried", "on the device"),
    ],
)
@pytest.mark.thorough(4)
@pytest.mark.lengthy(0)
def test_what_a_check_says(build, target, runtime, verdict, reason, request):
    if MISSING[runtime] is not None:
        pytest.skip(MISSING[runtime])
    keras.utils.set_random_seed(0)
    model = build() if "sparse" in verdict else sparsify(build(), 0.9)
    report = ks.tflite.check(model, target)
    notes = " ".join(report.notes)
    if get(target).npu:  # an activation may stay behind
        assert report.verdict in (verdict, "in part on the CPU") and "cycles" in notes
        return
    assert report.verdict == verdict == report.totals["verdict"]
    assert reason in notes


@pytest.mark.parametrize(
    ("name", "install"), [("gpu", "setup-gpu"), ("micro", "tflite-micro"), ("ethos-u55", "tflite-micro")]
)
def test_a_missing_runtime_says_nothing(name, install, monkeypatch, tmp_path):
    content = exported(mlp, sparse=False)
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    if name != "gpu":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = tried(content, get(name))
    assert (made.verdict, made.made) == ("not tried", {}) and install in made.reason
