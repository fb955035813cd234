"""The commands: what they write and print."""

import os
import sys

import keras
import numpy as np
import pytest
from command_line import check_error, run, run_json, run_ok, small_model

import keras_sparse as ks

# What the commands do.


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_prune(saved, tmp_path, capsys, allocation, criterion):
    out = tmp_path / "sparse.keras"
    arguments = ["prune", saved, "--sparsity", 0.8, "--allocation", allocation, "--criterion", criterion, "-o", out]
    totals = run_json(arguments, capsys)["totals"]
    kernels = [w.numpy() for w in keras.saving.load_model(out).trainable_variables if w.name == "kernel"]
    zeros = [int(np.sum(kernel == 0)) for kernel in kernels]
    assert totals["zeros"] == sum(zeros) == round(0.8 * totals["size"])
    if allocation == "uniform":
        assert zeros == [3200, 4000, 200]
    assert sorted(os.listdir(tmp_path)) == ["model.keras", "sparse.keras"]


@pytest.mark.parametrize("criterion", ["snip", "taylor", "gradient", "movement"])
@pytest.mark.thorough(1)
def test_prune_by_gradients(saved, tmp_path, capsys, criterion):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 40)), rng.normal(size=(50, 5))
    np.savez(tmp_path / "data.npz", x=x, y=y)
    out = tmp_path / "sparse.keras"
    arguments = ["prune", saved, "--sparsity", 0.8, "--criterion", criterion, "--data", tmp_path / "data.npz"]
    run_ok([*arguments, "--allocation", "erk", "-o", out], capsys)
    expected = keras.saving.load_model(saved, compile=False)
    expected.compile("adam", "mse")
    ks.prune(expected, 0.8, criterion, allocation="erk", data=(x, y))
    for value, other in zip(keras.saving.load_model(out).get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("options", [{"criterion": "obs"}, {"criterion": "magnitude", "repair": True}])
def test_prune_on_inputs(saved, tmp_path, capsys, options):
    x = np.random.default_rng(0).normal(size=(50, 40)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=np.zeros(3))
    out, words = tmp_path / "sparse.keras", ["--repair"] if "repair" in options else []
    arguments = ["prune", saved, "--sparsity", 0.8, "--criterion", options["criterion"], "--data"]
    run_ok([*arguments, tmp_path / "data.npz", *words, "-o", out], capsys)
    expected = keras.saving.load_model(saved, compile=False)
    ks.prune(expected, 0.8, data=x, **options)
    for value, other in zip(keras.saving.load_model(out).get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


def test_sensitivity(saved, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(50, 40)).astype("float32")
    np.savez(tmp_path / "x.npz", x=x)
    found = run_json(["sensitivity", saved, "--data", tmp_path / "x.npz", "--levels", 0.5, 0.9], capsys)
    model = keras.saving.load_model(saved, compile=False)
    assert found["rows"] == ks.sensitivity(model, x, (0.5, 0.9)).rows
    pruned = tmp_path / "sparse.keras"
    options = ["--sparsity", 0.6, "--allocation", "dynamic", "--data", tmp_path / "x.npz", "-o", pruned]
    run_ok(["prune", saved, *options], capsys)
    ks.prune(model, 0.6, allocation="dynamic", data=x)
    for value, other in zip(keras.saving.load_model(pruned).get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
@pytest.mark.lengthy(0)
def test_what_is_measured_on_labels_is_the_loss(saved, tmp_path, capsys, criterion):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 40)).astype("float32"), rng.normal(size=(50, 5)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    common = ["--criterion", criterion, "--data", tmp_path / "data.npz"]
    found = run_json(["sensitivity", saved, "--levels", 0.5, 0.9, *common], capsys)
    model = keras.saving.load_model(saved, compile=False)
    model.compile("adam", "mse")
    expected = ks.sensitivity(model, (x, y), (0.5, 0.9), criterion)
    assert found["rows"] == expected.rows and found["totals"]["unit"] == "loss"
    assert found["totals"]["loss"] == pytest.approx(np.mean((model.predict(x, verbose=0) - y) ** 2), rel=1e-4)
    pruned = tmp_path / "sparse.keras"
    run_ok(["prune", saved, "--sparsity", 0.6, "--allocation", "dynamic", *common, "-o", pruned], capsys)
    ks.prune(model, 0.6, criterion, allocation="dynamic", data=(x, y))
    for value, other in zip(keras.saving.load_model(pruned).get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


def test_labels_are_no_use_to_a_model_without_a_loss(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 40)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=rng.normal(size=(50, 5)))
    path = tmp_path / "plain.keras"
    small_model(compile=False).save(path)
    model = keras.saving.load_model(path)
    found = run_json(["sensitivity", path, "--data", tmp_path / "data.npz", "--levels", 0.5], capsys)
    assert found["rows"] == ks.sensitivity(model, x, (0.5,)).rows
    assert any("`y` was left out" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "zeros"),
    [
        (["--pattern", "2:4"], [2000, 2500, 120]),  # 50 inputs: the last two of each unit stay
        (["--pattern", "block_1x4", "--sparsity", 0.5], None),
        (["--pattern", "channel", "--sparsity", 0.6], [2400, 3000, 0]),  # what the model returns stays
        (["--allocation", "global", "--floor", 0.5, "--sparsity", 0.5], [2000, 2500, 125]),
    ],
    ids=["2:4", "block", "channel", "floor"],
)
def test_prune_in_patterns_and_with_a_floor(saved, tmp_path, capsys, arguments, zeros):
    out = tmp_path / "sparse.keras"
    rows = run_json(["prune", saved, *arguments, "-o", out], capsys)["rows"]
    kernels = [row for row in rows if row["path"].endswith("kernel")]
    if zeros is not None:
        assert [row["zeros"] for row in kernels] == zeros
    if arguments[0] == "--pattern":
        assert [row["pattern"] for row in kernels[:2]] == [arguments[1]] * 2


def test_channels_are_pruned_to_a_budget_and_removed(saved, tmp_path, capsys):
    pruned, small = tmp_path / "pruned.keras", tmp_path / "small.keras"
    run_ok(["prune", saved, "--pattern", "channel", "--budget", "macs=0.5", "bytes=0.6", "-o", pruned], capsys)
    totals = run_json(["shrink", pruned, small], capsys)["totals"]
    assert 0.45 < totals["macs_left"] / totals["macs"] <= 0.5
    assert keras.saving.load_model(small).count_params() == totals["parameters_left"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "time=3"], "knows macs, parameters, bytes and milliseconds"),
        (["--budget", "macs=half"], "such as macs=0.5"),
        (["--budget", "macs=0.5", "--sparsity", "0.5"], "in place of `--sparsity`"),
    ],
)
def test_budgets_that_cannot_be_read(saved, tmp_path, capsys, arguments, message):
    check_error(
        run(["prune", saved, "--pattern", "channel", *arguments, "-o", tmp_path / "out.keras"], capsys), message
    )


def test_prune_with_filters(saved, tmp_path, capsys):
    out = tmp_path / "sparse.keras"
    arguments = ["prune", saved, "--sparsity", 0.5, "--filters", "first", "--filters", "third", "-o", out]
    table = run_ok(arguments, capsys)
    assert f"Written: {out}" in table
    sparsity = {row["path"]: row["sparsity"] for row in ks.report(keras.saving.load_model(out)).rows}
    assert (sparsity["first/kernel"], sparsity["second/kernel"], sparsity["third/kernel"]) == (0.5, 0.0, 0.5)


def test_prune_may_replace_its_input_and_keeps_the_training_configuration(saved, tmp_path, capsys):
    run_ok(["prune", saved, "--sparsity", 0.9, "-o", saved], capsys)
    model = keras.saving.load_model(saved)
    assert ks.report(model).totals["zeros"] == 3600 + 4500 + 225
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert os.listdir(tmp_path) == ["model.keras"]


def test_prune_without_the_training_configuration(tmp_path, capsys):
    @keras.saving.register_keras_serializable("gone")
    def loss(y_true, y_pred):
        return keras.ops.mean(keras.ops.abs(y_true - y_pred))

    model = small_model(compile=False)
    model.compile("adam", loss)
    model.save(tmp_path / "model.keras")
    keras.saving.get_custom_objects().pop("gone>loss")
    out = tmp_path / "sparse.keras"
    notes = run_json(["prune", tmp_path / "model.keras", "--sparsity", 0.5, "-o", out], capsys)["notes"]
    assert any(note.startswith("Optimizer and losses were left out") for note in notes)
    assert ks.report(keras.saving.load_model(out)).totals["sparsity"] == 0.5


def test_report(saved, tmp_path, capsys):
    expected = ks.report(keras.saving.load_model(saved, compile=False))
    assert run_json(["report", saved], capsys) == expected.to_dict()
    html, plot = tmp_path / "report.html", tmp_path / "plot.png"
    assert run_ok(["report", saved, "--html", html, "--plot", plot], capsys) == f"{expected}\n"
    page = html.read_text(encoding="utf-8")
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert "second/kernel" in page
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["model.keras", "plot.png", "report.html"]


@pytest.mark.parametrize(
    ("options", "encoding", "dtype"),
    [
        (["--target", "xnnpack"], "sparse", "float32"),
        (["--target", "xnnpack", "--dense"], "dense", "float32"),
        (["--target", "xnnpack", "--quantize", "float16"], "sparse", "float16"),
        (["--target", "xnnpack", "--quantize", "dynamic", "--representative-data", "data.npz"], "sparse", "int8"),
    ],
)
@pytest.mark.lengthy(1)
def test_export_and_inspect(saved, tmp_path, capsys, options, encoding, dtype):
    model = keras.saving.load_model(saved, compile=False)
    ks.prune(model, 0.9)
    model.save(saved)
    file = tmp_path / "model.tflite"
    file.write_bytes(b"an older file, to be replaced")
    np.savez(tmp_path / "data.npz", x=np.ones((3, *model.input_shape[1:])), y=np.zeros(3))
    options = [tmp_path / option if option.endswith(".npz") else option for option in options]
    totals = run_json(["export", saved, file, *options], capsys)["totals"]
    assert totals["encoding"] == encoding
    assert totals["bytes_file"] == file.stat().st_size
    assert totals["zeros_kept"] == totals["zeros_model"] == 8325
    rows = run_json(["inspect", file], capsys)["rows"]
    assert sum(row["zeros"] for row in rows if row["sparsity"] > 0.85) == 8325
    assert dtype in {row["dtype"] for row in rows if row["sparsity"] > 0.85}
    assert any(row["encoding"].startswith("sparse") for row in rows) == (encoding == "sparse")
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "model.keras", "model.tflite"]


def test_inspect_prints_the_table_of_the_library(sparse_file, capsys):
    report = ks.tflite.inspect(sparse_file)
    assert run_ok(["inspect", sparse_file], capsys) == f"{report}\n"
    assert run_ok(["inspect", sparse_file, "--full"], capsys) == f"{report.full()}\n"


@pytest.mark.lengthy(0)
def test_benchmark(sparse_file, capsys):
    report = run_json(["benchmark", sparse_file, "--baseline", sparse_file, "--threads", 2], capsys)
    assert report["totals"]["threads"] == 2
    assert len(report["rows"]) == 2
    assert report["rows"][0]["ratio"] == 1.0
    assert report["rows"][1]["median"] > 0
    assert report["operators"][0]["file"] == sparse_file.name and report["commands"][-1].startswith("adb shell")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["benchmark", "{file}", "--runtime", "wasm"], "Install Node.js"),
        (["benchmark", "{file}", "--runtime", "arm64"], "keras-sparse setup-arm64"),
        (["setup-arm64"], "apt-get install gcc"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="emulators exist on Linux only")
def test_missing_runtimes(arguments, what, sparse_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path / "cache"))
    check_error(run([argument.format(file=sparse_file) for argument in arguments], capsys), what)
    assert os.listdir(tmp_path) == []


def test_import_finds_custom_classes(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_layers_of_cli.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    registered = dict(keras.saving.get_custom_objects())
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_layers_of_cli

    model = keras.Sequential([keras.Input((3,)), my_layers_of_cli.Twice(), keras.layers.Dense(2)])
    model.save("model.keras")
    # As in a new process.
    del sys.modules["my_layers_of_cli"]
    for name in set(keras.saving.get_custom_objects()) - set(registered):
        del keras.saving.get_custom_objects()[name]

    check_error(run(["report", "model.keras"], capsys), "'model.keras'", "--import MODULE")
    check_error(
        run(["report", "model.keras", "--import", "no_such_module"], capsys), "`--import no_such_module` failed"
    )
    assert run_json(["report", "model.keras", "--import", "my_layers_of_cli"], capsys)["totals"]["parameters"] == 8
    sys.modules.pop("my_layers_of_cli", None)


def test_compare(saved, sparse_file, tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 40)), rng.integers(0, 5, 40)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    html, plot = tmp_path / "out.html", tmp_path / "out.png"
    (tmp_path / "other").mkdir()
    again = tmp_path / "other" / "model.keras"
    again.write_bytes(saved.read_bytes())
    arguments = ["compare", saved, sparse_file, "--data", tmp_path / "data.npz", "--seconds", 0.01]
    report = run_json([*arguments, "--metrics", "accuracy", "f1", "--html", html, "--plot", plot], capsys)
    expected = ks.compare({"a": saved, "b": sparse_file}, x, y, ["accuracy", "f1"], seconds=0).rows
    assert [row["model"] for row in report["rows"]] == ["model.keras", "sparse.tflite"]
    for row, other in zip(report["rows"], expected, strict=True):
        for name in ("accuracy", "f1", "sparsity", "bytes", "gzip_bytes", "parameters"):
            assert row[name] == other[name]
        assert row["latency_ms"] > 0
    assert len(report["differences"]) == 1
    assert "Against model.keras" in html.read_text(encoding="utf-8")
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = run_ok(["compare", saved, again, "--data", tmp_path / "data.npz", "--seconds", 0, "--metrics"], capsys)
    assert "other/model.keras" in text  # two files of one name go by their paths
    assert "accuracy" not in text
    check_error(run([*arguments, "--metrics", "nope"], capsys), "nope")
