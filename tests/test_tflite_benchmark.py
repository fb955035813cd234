"""The benchmark of .tflite files."""

import json
import shlex

import keras
import numpy as np
import pytest
from tflite_models import exported, lstm, mlp, qualifying, several

import keras_sparse as ks

MISSING = ks.tflite.runtimes.available()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for build in (mlp, lstm, several):
        (folder / f"{build.__name__}.tflite").write_bytes(exported(build))
    (folder / "mlp_dense.tflite").write_bytes(exported(mlp, sparse=False))
    return folder


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    """A sparse file that engages XNNPACK's sparse convolutions, and the dense one."""
    files = [tmp_path_factory.mktemp("files") / f"{name}.tflite" for name in ("sparse", "dense")]
    for path, sparse in zip(files, (True, False), strict=True):
        path.write_bytes(exported(qualifying, sparse))
    return files


@pytest.mark.parametrize("kind", ["mlp", "lstm", "several"])
def test_one_file(kind, folder):
    report = ks.tflite.benchmark(folder / f"{kind}.tflite")
    (row,) = report.rows
    assert 0 < row["p25"] <= row["median"] <= row["p75"] < 1000 and row["load"] > 0
    assert row["ratio"] is None and row["rounds"] >= 20
    assert row["bytes"] == (folder / f"{kind}.tflite").stat().st_size
    assert 0 <= row["memory"] < 1 << 30


@pytest.mark.lengthy(0)
def test_baseline(folder):
    report = ks.tflite.benchmark(folder / "mlp.tflite", baseline=folder / "mlp_dense.tflite", threads=2)
    base, row = report.rows
    assert [base["file"], row["file"]] == ["mlp_dense.tflite", "mlp.tflite"]
    assert base["ratio"] == 1.0 and row["ratio"] == pytest.approx(row["median"] / base["median"])
    assert base["rounds"] == row["rounds"]
    assert json.loads(report.to_json())["totals"]["threads"] == 2
    assert "median" in str(report)


@pytest.mark.skipif(MISSING["wasm"] is not None, reason=str(MISSING["wasm"]))
@pytest.mark.lengthy(0)
def test_wasm(convolutions):
    report = ks.tflite.benchmark(*convolutions, runtime="wasm")
    base, row = report.rows
    assert all(0 < one["p25"] <= one["median"] <= one["p75"] for one in (base, row))
    assert base["ratio"] == 1 and row["ratio"] > 0
    assert "memory" not in row and "LiteRT.js" in report.totals["runtime"]


@pytest.mark.slow
@pytest.mark.skipif(MISSING["arm64"] is not None, reason=str(MISSING["arm64"]))
def test_arm64(convolutions):
    report = ks.tflite.benchmark(*convolutions, runtime="arm64")
    base, row = report.rows
    assert sorted(row) == ["bytes", "file", "instructions", "load", "ratio", "runtime"], (
        "no times: they would mean nothing"
    )
    assert row["ratio"] == row["instructions"] / base["instructions"] < 0.8
    assert row["load"] > row["instructions"] and report.totals["unit"] == "instructions"


def test_a_target_is_measured_by_interpreter_and_compiled_model(folder):
    files = folder / "mlp.tflite", folder / "mlp_dense.tflite"
    report = ks.tflite.benchmark(*files, target="xnnpack-x86", seconds=0.05)
    found = [(row["runtime"], row["file"]) for row in report.rows]
    assert found == [(runtime, file.name) for runtime in ("native", "compiled-cpu") for file in reversed(files)]
    assert [row["ratio"] == 1 for row in report.rows] == [True, False] * 2
    assert all(
        row["ratio"] == row["median"] / base["median"]
        for base, row in zip(report.rows[::2], report.rows[1::2], strict=True)
    )


@pytest.mark.skipif(MISSING["ethos-u"] is not None, reason=str(MISSING["ethos-u"]))
@pytest.mark.lengthy(0)
def test_an_npu_is_measured_in_cycles(tmp_path):
    rng = np.random.default_rng(0)
    for name, sparsity in ("dense", 0.0), ("sparse", 0.95):
        model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(10)])
        ks.prune(model, sparsity)
        data = rng.normal(size=(16, 256))
        path = tmp_path / f"{name}.tflite"
        ks.tflite.export(model, path, target="ethos-u85", quantize="int8", representative_data=data)
    report = ks.tflite.benchmark(path, tmp_path / "dense.tflite", target="ethos-u85")
    base, row = report.rows
    assert report.totals["unit"] == "cycles" and row["cpu_operators"] == base["cpu_operators"]
    assert row["ratio"] == row["cycles"] / base["cycles"] < 0.8
    assert row["bytes_encoded"] < 0.2 * base["bytes_encoded"]


@pytest.mark.parametrize("target", ["micro", "qualcomm", "gpu"])
def test_targets_that_nothing_here_measures_for(target, folder):
    if target == "gpu" and ks.tflite.runtimes.RUNTIMES["gpu-cpu"].counts:
        pytest.skip("there is a GPU")
    with pytest.raises(
        ValueError, match=f"Nothing here measures for .*mean nothing|device.*Received: target='{target}'"
    ):
        ks.tflite.benchmark(folder / "mlp.tflite", target=target)
    with pytest.raises(ValueError, match="leave one of the two out. Received: runtime='native', target="):
        ks.tflite.benchmark(folder / "mlp.tflite", runtime="native", target=target)


def test_operators(folder):
    """Block-sparse Dense layers run sparse everywhere; convolutions are another matter (test_tflite_xnnpack.py)."""
    report = ks.tflite.benchmark(folder / "mlp.tflite", baseline=folder / "mlp_dense.tflite", seconds=0.05)
    ran = {(row["file"], row["operator"]): (row["count"], row["ran_sparse"]) for row in report.operators.rows}
    assert ran["mlp.tflite", "FULLY_CONNECTED"] == (2, 2) and ran["mlp_dense.tflite", "FULLY_CONNECTED"] == (2, 0)
    report = ks.tflite.benchmark(folder / "lstm.tflite", seconds=0.05)
    assert sum(row["ran_sparse"] for row in report.operators.rows) == 0
    assert sum(row["stored_sparse"] for row in report.operators.rows) > 0


def test_commands_for_a_phone(folder, tmp_path):
    path = tmp_path / "it's a model.tflite"
    path.write_bytes((folder / "mlp.tflite").read_bytes())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    commands = ks.tflite.benchmark(path, baseline=tmp_path / "b" / path.name, threads=2, seconds=0.05).commands
    pushed = [shlex.split(command) for command in commands if command.startswith("adb push")]
    run = [command for command in commands if "--graph=" in command]
    assert [words[2] for words in pushed[1:]] == [str(tmp_path / "b" / path.name), str(path)]
    assert len({words[3] for words in pushed}) == 3, "each file has its own name on the phone"
    for words, command in zip(pushed[1:], run, strict=True):
        assert f"--graph={words[3]} --num_threads=2 --use_xnnpack=true" in command and "'" not in words[3]


def test_all_parts_are_shown(folder):
    report = ks.tflite.benchmark(folder / "mlp.tflite", seconds=0.05)
    data = json.loads(report.to_json())
    assert data["operators"] == report.operators.rows and data["commands"] == report.commands
    for text in (str(report), report.to_html()):
        assert all(part in text for part in ("median", "FULLY_CONNECTED", "adb shell"))
    assert max(map(len, str(report).splitlines())) <= 120
    commands = str(report).partition("The same on a phone\n")[2].replace("\\\n", "")  # as a shell reads it
    assert commands.splitlines() == report.commands


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, None])
def test_bad_threads(threads, folder):
    with pytest.raises(ValueError, match="positive integer. Received"):
        ks.tflite.benchmark(folder / "mlp.tflite", threads=threads)


@pytest.mark.parametrize("name", ["seconds", "timeout"])
@pytest.mark.parametrize("value", [0, -1, "2", True, None, float("nan"), float("inf")])
def test_bad_durations(name, value, folder):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive number. Received: {name}="):
        ks.tflite.benchmark(folder / "mlp.tflite", **{name: value})


def test_several_files(folder):
    files = [folder / "mlp.tflite"] * 2
    rows = ks.tflite.benchmark(files, baseline=folder / "mlp.tflite", seconds=0.02).rows
    assert [row["file"] for row in rows] == ["mlp.tflite"] * 3 and rows[0]["ratio"] == 1
    with pytest.raises(ValueError, match=r"at least one .tflite file. Received: path=\[\]"):
        ks.tflite.benchmark([])


@pytest.mark.parametrize("runtime", ["x86-no-avx", "micro", "ethos-u", 3])
def test_bad_runtime(runtime, folder):
    message = "`runtime` must be one of 'native', 'wasm', 'arm64', 'compiled-cpu'.*Received: runtime="
    with pytest.raises(ValueError, match=message):
        ks.tflite.benchmark(folder / "mlp.tflite", runtime=runtime)


@pytest.mark.parametrize("runtime", ["wasm", "arm64"])
def test_missing_runtime(runtime, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="nstall|set up"):
        ks.tflite.benchmark(folder / "mlp.tflite", runtime=runtime)


def test_slow_file_is_given_up(folder):
    with pytest.raises(TimeoutError, match="longer than 0.01 seconds"):
        ks.tflite.benchmark(folder / "mlp.tflite", timeout=0.01)


def test_bad_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.benchmark(tmp_path / "none.tflite")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.benchmark(folder / "mlp.tflite", baseline=tmp_path / "none.tflite")
    (tmp_path / "cut.tflite").write_bytes((folder / "mlp.tflite").read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ks.tflite.benchmark(tmp_path / "cut.tflite")
