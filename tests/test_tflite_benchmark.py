"""The benchmark of .tflite files."""

import json

import pytest
from tflite_models import lstm, mlp, several, sparsify

import keras_sparse as ks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for build in (mlp, lstm, several):
        model = sparsify(build(), 0.9, blocks=build is mlp)
        ks.tflite.export(model, folder / f"{build.__name__}.tflite")
        ks.tflite.export(model, folder / f"{build.__name__}_dense.tflite", sparse=False)
    return folder


@pytest.mark.parametrize("kind", ["mlp", "lstm", "several"])
def test_one_file(kind, folder):
    report = ks.tflite.benchmark(folder / f"{kind}.tflite")
    (row,) = report.rows
    assert 0 < row["p25"] <= row["median"] <= row["p75"] < 1000 and row["load"] > 0
    assert row["ratio"] is None and row["rounds"] >= 20
    assert row["bytes"] == (folder / f"{kind}.tflite").stat().st_size


def test_baseline(folder):
    report = ks.tflite.benchmark(folder / "mlp.tflite", baseline=folder / "mlp_dense.tflite", threads=2)
    base, row = report.rows
    assert [base["file"], row["file"]] == ["mlp_dense.tflite", "mlp.tflite"]
    assert base["ratio"] == 1.0 and row["ratio"] == pytest.approx(row["median"] / base["median"])
    assert base["rounds"] == row["rounds"]
    assert json.loads(report.to_json())["totals"]["threads"] == 2
    assert "median" in str(report)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, None])
def test_bad_threads(threads, folder):
    with pytest.raises(ValueError, match="positive integer. Received"):
        ks.tflite.benchmark(folder / "mlp.tflite", threads=threads)


def test_bad_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.benchmark(tmp_path / "none.tflite")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.benchmark(folder / "mlp.tflite", baseline=tmp_path / "none.tflite")
    (tmp_path / "cut.tflite").write_bytes((folder / "mlp.tflite").read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ks.tflite.benchmark(tmp_path / "cut.tflite")
