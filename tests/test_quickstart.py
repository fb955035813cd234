import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse import quickstart

FILES = ["model.keras", "model_dense.tflite", "model_small.tflite", "model_sparse.tflite", "plot.png", "report.html"]


@pytest.mark.slow
def test_command(tmp_path):
    output = tmp_path / "made" / "here"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "CUDA_"))}
    command = [sys.executable, "-m", "keras_sparse", "quickstart", "--json", "--output", str(output)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Off a terminal the progress bars are shown once, when all is done; nothing else is on stderr.
    assert [line.split()[0] for line in run.stderr.splitlines()] == ["dense", "pruned", "channels", "export"]
    report = json.loads(run.stdout)
    dense, sparse, small = report["rows"]
    assert [row["model"] for row in report["rows"]] == ["dense", "sparse", "small"]
    assert small["accuracy"] >= 0.95
    assert dense["bytes"] >= 3 * small["bytes"]
    assert small["sparsity"] < 0.01
    assert sparse["accuracy"] >= 0.95
    assert dense["accuracy"] - sparse["accuracy"] <= 0.02
    assert dense["bytes"] >= 500_000
    assert dense["bytes"] >= 4 * sparse["bytes"]
    assert dense["gzip_bytes"] >= 4 * sparse["gzip_bytes"]
    assert max(row["parity"] for row in report["rows"]) <= 1e-5
    assert abs(sparse["sparsity"] - 0.9) < 1e-5

    assert sorted(os.listdir(output)) == FILES
    assert (output / "model_dense.tflite").stat().st_size == dense["bytes"]
    assert (output / "model_sparse.tflite").stat().st_size == sparse["bytes"]
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "conv_2/kernel" in page
    assert str(tmp_path) not in page.replace(str(output), "")  # no trace of temporary files
    model = keras.saving.load_model(output / "model.keras")
    assert ks.report(model).totals["sparsity"] == sparse["sparsity"]
    tensors = ks.tflite.inspect(output / "model_sparse.tflite").rows
    kernels = [tensor for tensor in tensors if len(tensor["shape"]) > 1]
    assert len(kernels) == 5
    # Sparse where that is smaller: about half of the zeros of the first kernel, of 1,152 bytes, do not pay for indices.
    assert {tensor["encoding"] for tensor in kernels if tensor["sparsity"] > 0.75} == {"sparse-csr"}
    assert all(tensor["bytes"] <= 4 * math.prod(tensor["shape"]) for tensor in kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "shape", "sparsity"), [("cifar10", (32, 32, 3), 0.8), ("fashion_mnist", (28, 28), 0.0)]
)
def test_other_datasets(dataset, shape, sparsity, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def split(size):  # as keras.datasets gives them: CIFAR-10 has a channel axis and labels of shape (n, 1)
        labels = rng.permutation(size) % 10
        return rng.integers(0, 256, (size, *shape), "uint8"), labels[:, None] if len(shape) == 3 else labels

    monkeypatch.setattr(getattr(keras.datasets, dataset), "load_data", lambda: (split(256), split(100)))
    (tmp_path / "plot.png").write_text("of an earlier run")
    report = quickstart.run(dataset, sparsity, epochs=1, output=tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert report.totals["epochs"] == 1
    assert abs(report.rows[1]["sparsity"] - sparsity) < 1e-4
    assert max(row["parity"] for row in report.rows) <= 1e-5
    if sparsity:
        assert report.rows[1]["bytes"] < report.rows[0]["bytes"] / 2


def test_the_image_sizes_of_all_datasets_make_a_model():
    for shape in ((8, 8, 1), (28, 28, 1), (32, 32, 3)):
        model = quickstart.build(shape, 10)
        assert model(np.zeros((2, *shape), "float32")).shape == (2, 10)
        assert 125_000 < model.count_params() < 400_000  # the weights, not the graph, decide the size of the file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "imagenet"}, "must be one of digits, mnist, fashion_mnist, cifar10"),
        ({"epochs": 0}, "at least 1. Received: epochs=0"),
        ({"epochs": 2.5}, "whole number"),
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": float("nan")}, "below 1"),
    ],
)
def test_wrong_arguments_leave_nothing(arguments, message, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        quickstart.run(output=output, **arguments)
    assert not output.exists()


def test_what_is_not_installed_is_named_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises
    with pytest.raises(ImportError, match="matplotlib.*pip install"):
        quickstart.run(output=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_dataset_that_cannot_be_read_leaves_nothing(tmp_path, monkeypatch):
    def load_data():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", load_data)
    with pytest.raises(OSError, match="'mnist' cannot be downloaded or read: URL fetch failure"):
        quickstart.run("mnist", output=tmp_path)
    assert os.listdir(tmp_path) == []


def test_output_that_is_a_file(tmp_path):
    output = tmp_path / "out"
    output.write_text("mine")
    for folder in (output, output / "below"):
        with pytest.raises(NotADirectoryError, match="must be a folder"):
            quickstart.run(output=folder)
    assert output.read_text() == "mine"
