"""Trackers and tuners beside the callbacks: the code of the guide, the real packages, each in a process of its own.

MLflow patches `fit`, and all of them write to folders and start threads.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

import keras_sparse as ks

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guides" / "trackers.md").read_text(encoding="utf-8")


def run_section(title, folder, check):
    """Run what a section of the guide shows and then `check`, in a folder; what that last prints is JSON."""
    setup = re.search(r"<!-- setup\n(.*?)-->", PAGE, re.DOTALL)[1]
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    code = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert code
    environment = {**os.environ, "WANDB_SILENT": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    program = "\n".join([setup, *code, "import json", check])
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_mlflow_logs_the_sparsity_and_the_front(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pandas")
    sparsity, front = run_section(
        "MLflow",
        tmp_path,
        """
client = mlflow.MlflowClient()
sparsity = [metric.value for metric in client.get_metric_history(run.info.run_id, "sparsity")]
macs = [metric.value for metric in client.get_metric_history(front.info.run_id, "macs")]
print(json.dumps([sparsity, [macs, [candidate.values["macs"] for candidate in results.front]]]))
""",
    )
    assert len(sparsity) == 4 and sparsity == sorted(sparsity)
    assert sparsity[-1] == pytest.approx(0.75)
    assert sorted(front[0]) == sorted(front[1]) and front[0]


@pytest.mark.slow
def test_wandb_logs_the_sparsity_and_keeps_a_sparse_checkpoint(tmp_path):
    pytest.importorskip("wandb")
    logged, kept = run_section(
        "Weights & Biases",
        tmp_path,
        """
kept = ks.report(keras.saving.load_model("best.keras")).totals["sparsity"]
print(json.dumps([logged, kept]))
""",
    )
    assert logged == kept == pytest.approx(0.75)


@pytest.mark.slow
def test_keras_tuner_keeps_the_best_sparse_checkpoint(tmp_path):
    pytest.importorskip("keras_tuner")
    trials = run_section(
        "KerasTuner",
        tmp_path,
        """
trials = tuner.oracle.get_best_trials(9)
models = tuner.get_best_models(9)
count = int(0.8 * len(x))  # where Keras splits
found = []
for trial, model in zip(trials, models):
    loss = model.evaluate(x[count:], y[count:], verbose=0)[0]
    found.append([trial.hyperparameters["sparsity"], ks.report(model).totals["sparsity"], trial.score, loss])
print(json.dumps(found))
""",
    )
    assert trials
    for asked, got, score, loss in trials:
        assert got == pytest.approx(asked, abs=0.01)  # the file is of an epoch at the target,
        assert loss == pytest.approx(score, rel=1e-4)  # and of the one that the score is of


def network(width=8):
    layers = [keras.layers.Dense(width, "relu"), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile("adam", "categorical_crossentropy")
    return model


class BestElsewhere(keras.callbacks.Callback):
    """As the one that MLflow's autologging adds: `save_best_only`, and no `best`."""

    save_best_only = True


def test_a_checkpoint_that_is_none_of_keras():
    x, y = np.ones((8, 6), "float32"), np.eye(3, dtype="float32")[np.arange(8) % 3]
    history = network().fit(x, y, 4, 2, verbose=0, callbacks=[ks.callbacks.Pruning(0.5), BestElsewhere()])
    assert history.history["sparsity"][-1] == 0.5


def test_tensorboard_reads_the_sparsity(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("tensorflow")
    x, y = np.ones((8, 6), "float32"), np.eye(3, dtype="float32")[np.arange(8) % 3]
    board = keras.callbacks.TensorBoard(tmp_path)
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = network().fit(x, y, 4, 3, verbose=0, callbacks=[ks.callbacks.Pruning(0.5), board, log])
    expected = history.history["sparsity"]
    lines = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    column = lines[0].index("sparsity")
    np.testing.assert_allclose([float(line[column]) for line in lines[1:]], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util

        events = EventAccumulator(str(tmp_path / "train"), {"tensors": 0})
        events.Reload()
        found = [tensor_util.make_ndarray(event.tensor_proto) for event in events.Tensors("epoch_sparsity")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.lengthy(0)
def test_scikit_learn_clones_and_fits_again():
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV

    def compiled(X, y, width=8):
        return network(width)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)).astype("float32"), np.arange(32) % 3
    options = {"epochs": 2, "verbose": 0, "callbacks": [ks.callbacks.Pruning(0.5)]}
    first = keras.wrappers.SKLearnClassifier(compiled).fit(x, y, **options)
    kept = [ks.selection.as_array(weight) for weight in first.model_.weights]
    again = clone(first).fit(x, y, **options)
    again.fit(x[:16], y[:16], **options)
    grid = {"model_kwargs": [{"width": 4}, {"width": 8}]}
    search = GridSearchCV(keras.wrappers.SKLearnClassifier(compiled), grid, cv=2).fit(x, y, **options)
    for fitted in (first, again, search.best_estimator_):
        assert ks.report(fitted.model_).totals["sparsity"] == 0.5
    for before, weight in zip(kept, first.model_.weights, strict=True):  # one model's masks are not the other's
        np.testing.assert_array_equal(ks.selection.as_array(weight), before)
