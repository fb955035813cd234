import json
import os
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.cli import main
from keras_sparse.cli.command import COMMANDS, argument, command
from keras_sparse.criteria import CRITERIA
from keras_sparse.pruning.allocation import ALLOCATIONS
from keras_sparse.search.goals import CONSTRAINTS
from keras_sparse.search.searchers import SEARCHERS
from keras_sparse.tflite.commands import MEASURING
from keras_sparse.tflite.targets import TARGETS


def small_model(compile=True):
    model = keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Dense(100, activation="relu", name="first"),
            keras.layers.Dense(50, activation="relu", name="second"),
            keras.layers.Dense(5, name="third"),
        ],
        name="small",
    )
    if compile:
        model.compile("adam", "mse")
    return model


@pytest.fixture
def saved(tmp_path):
    """A saved dense model in an otherwise empty folder."""
    path = tmp_path / "model.keras"
    small_model().save(path)
    return path


@pytest.fixture
def searched(tmp_path):
    """A saved classifier, and arrays to search on."""
    model, rng = small_model(compile=False), np.random.default_rng(0)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = rng.normal(size=(64, 40)).astype("float32"), rng.integers(5, size=64)
    np.savez(tmp_path / "data.npz", x=x, y=y, x_train=x, y_train=y)
    model.save(tmp_path / "model.keras")
    return [tmp_path / "model.keras", "--data", tmp_path / "data.npz"]


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "sparse.tflite"
    model = small_model()
    ks.prune(model, 0.9)
    ks.tflite.export(model, path, target="xnnpack")
    return path


def run(arguments, capsys):
    """Run the command line in this process: `(exit code, stdout, stderr)`."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def run_ok(arguments, capsys):
    code, out, err = run(arguments, capsys)
    assert (code, err) == (0, "")
    return out


def run_json(arguments, capsys):
    return json.loads(run_ok([*arguments, "--json"], capsys))


def check_error(result, *parts):
    """Exit code 1, nothing on stdout, one line on stderr that says what was wrong."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("keras-sparse: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err


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


@pytest.mark.parametrize(
    ("arguments", "zeros"),
    [
        (["--pattern", "2:4"], [2000, 2500, 120]),  # 50 inputs: the last two of each unit stay
        (["--pattern", "block_1x4", "--sparsity", 0.5], None),
        (["--pattern", "channel", "--sparsity", 0.6], [2400, 3000, 150]),
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


# Wrong input: exit code 1 and one line.


def damaged(kind, saved, tmp_path):
    """Make a damaged model file and return its path."""
    path = tmp_path / "damaged.keras"
    content = saved.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"this is no model\n" * 100)
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(255 - b for b in content[middle : middle + 64]) + content[middle + 64 :]
        )
    elif kind == "folder":
        path.mkdir()
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
    return path


@pytest.mark.slow
def test_search(searched, tmp_path, capsys):
    output, page, plot = (tmp_path / name for name in ("best.keras", "page.html", "plot.png"))
    files = ["-o", output, "--html", page, "--plot", plot, "--directory", tmp_path / "journal"]
    arguments = ["search", *searched, "--sparsity", 0.8, "--objective", "loss", "macs"]
    more = ["--budget", 10, "--epochs", 1, "--patterns", "unstructured", "block_1x4"]
    content = run_json([*arguments, *files, *more], capsys)
    assert len(content["candidates"]) == 10
    assert content["objective"] == {"loss": "min", "macs": "min"}
    totals = ks.report(keras.saving.load_model(output)).totals
    assert totals["sparsity"] == pytest.approx(content["best"]["values"]["sparsity"])
    assert "Best allocation" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = run_ok([*arguments, "--budget", 3], capsys)
    assert "Front of the search" in text
    check_error(run(["search", *searched, "--sparsity", 0.999], capsys), "reaches sparsities from 0 to 0.99")
    check_error(run(["search", *searched, "--macs", 1], capsys), "reaches macs from")
    check_error(run(["search", *searched, "--workers", 0], capsys), "`--workers` must be a whole number of at least 1")


@pytest.mark.slow
def test_search_in_two_processes(searched, capsys):
    arguments = ["search", *searched, "--sparsity", 0.8, "--budget", 4, "--epochs", 1]
    one, two = (run_json([*arguments, "--workers", workers], capsys) for workers in (1, 2))
    assert [each["values"] for each in one["candidates"]] == [each["values"] for each in two["candidates"]]


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "flipped", "folder", "other zip"])
@pytest.mark.parametrize("command", ["prune", "report", "export"])
@pytest.mark.thorough(6)
def test_damaged_model(command, kind, saved, tmp_path, capsys):
    path = damaged(kind, saved, tmp_path)
    before = sorted(os.listdir(tmp_path))
    more = {"prune": ["--sparsity", 0.5, "-o", tmp_path / "o.keras"], "report": [], "export": [tmp_path / "o.tflite"]}
    check_error(run([command, path, *more[command]], capsys), "damaged.keras")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "folder"])
@pytest.mark.parametrize("command", ["inspect", "benchmark"])
def test_damaged_tflite(command, kind, sparse_file, tmp_path, capsys):
    path = tmp_path / "damaged.tflite"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        content = sparse_file.read_bytes()
        path.write_bytes({"empty": b"", "text": b"no model" * 99, "truncated": content[: len(content) // 3]}[kind])
    check_error(run([command, path], capsys), "damaged.tflite")


@pytest.mark.parametrize("output", ["no_such_folder/o", "model.keras/o", "a_folder"])
@pytest.mark.parametrize("command", ["prune", "export", "html", "plot"])
def test_output_that_cannot_be_written(command, output, saved, tmp_path, capsys):
    output += {"prune": ".keras", "export": ".tflite", "html": ".html", "plot": ".png"}[command]
    if output.startswith("a_folder"):
        (tmp_path / output).mkdir()
    arguments = {
        "prune": ["prune", saved, "--sparsity", 0.5, "-o", tmp_path / output],
        "export": ["export", saved, tmp_path / output],
        "html": ["report", saved, "--html", tmp_path / output],
        "plot": ["report", saved, "--plot", tmp_path / output],
    }[command]
    before = sorted(os.listdir(tmp_path))
    check_error(run(arguments, capsys), output)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("command", ["prune", "export"])
def test_full_disk_leaves_the_old_file(command, saved, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    out = tmp_path / {"prune": "o.keras", "export": "o.tflite"}[command]
    out.write_bytes(b"old")
    arguments = {"prune": ["prune", saved, "--sparsity", 0.5, "-o", out], "export": ["export", saved, out]}[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # files of more than 4 kB fail as on a full disk
    try:
        result = run(arguments, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_error(result)
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == sorted(["model.keras", out.name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "{model}", "--sparsity", "90", "-o", "{folder}/o.keras"], "Did you mean 0.9?"),
        (["prune", "{model}", "--sparsity", "nan", "-o", "{folder}/o.keras"], "at least 0 and below 1"),
        (["prune", "{model}", "--sparsity", "0.5", "-o", "{folder}/o.h5"], "must end in '.keras'"),
        (["prune", "{model}", "--sparsity", "0.5", "--filters", "nothing", "-o", "{folder}/o.keras"], "'nothing'"),
        (["prune", "{model}", "--sparsity", "0.5", "--filters", "(", "-o", "{folder}/o.keras"], "regular expression"),
        (["export", "{model}", "{folder}/o.bin"], "must end in '.tflite'"),
        (["report", "{folder}"], "Expected the path of a .keras file"),
        (["report", "{model}", "--plot", "{folder}/plot.xyz"], "xyz"),
        (["benchmark", "{tflite}", "--threads", "0"], "positive integer"),
        (["compare", "{model}", "--data", "{folder}/no.npz"], "no.npz"),
        (["compare", "{model}", "{model}", "--data", "{model}"], "Received twice"),
        (["compare", "{model}", "--data", "{model}"], "Expected an .npz file"),
        (["quickstart", "--epochs", "0"], "at least 1"),
        (["quickstart", "--sparsity", "1"], "below 1"),
        (["quickstart", "--output", "{model}"], "model.keras"),
    ],
)
def test_wrong_values(arguments, message, saved, sparse_file, tmp_path, capsys):
    arguments = [a.format(model=saved, folder=tmp_path, tflite=sparse_file) for a in arguments]
    check_error(run(arguments, capsys), message)
    assert os.listdir(tmp_path) == ["model.keras"]


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["prune", "m.keras"], ["quickstart", "--dataset", "x"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: keras-sparse")


def help_of(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_each_command_has_an_example_that_parses(command, capsys):
    words = help_of(command, capsys).split("example:\n  ")[1].splitlines()[0].split()
    assert words[:2] == ["keras-sparse", command]
    if any(word.endswith((".keras", ".tflite")) for word in words):
        check_error(run(words[1:], capsys), "There is no such file")  # which is found out after parsing


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("prune", [*CRITERIA, *ALLOCATIONS]),
        ("check", [target.name for target in TARGETS]),
        ("benchmark", MEASURING),
        ("search", [*SEARCHERS, *(f"--{name.replace('_', '-')} N" for name in CONSTRAINTS)]),
    ],
)
def test_choices_are_what_the_library_has(command, names, capsys):
    text = " ".join(help_of(command, capsys).split())
    assert [name for name in names if name not in text] == []


def test_a_command_is_registered_with_its_arguments(capsys):
    @command(argument("--size", type=int, default=3), example="--size 5")
    def _count_sheep(options, stderr):
        """Count sheep."""
        return ks.reports.Report("Sheep", [], {"sheep": options.size})

    try:
        assert run_json(["count-sheep", "--size", 4], capsys)["totals"] == {"sheep": 4}
        assert "keras-sparse count-sheep --size 5" in help_of("count-sheep", capsys)
    finally:
        del COMMANDS["count-sheep"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"keras-sparse {ks.__version__}\n"


def test_interrupted(tmp_path, monkeypatch, capsys):
    (tmp_path / "module_of_someone_impatient.py").write_text("raise KeyboardInterrupt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run(["report", "m.keras", "--import", "module_of_someone_impatient"], capsys)
    assert result == (130, "", "keras-sparse: interrupted\n")


# A process of its own, as a user starts it.


def process(arguments, **options):
    # Nothing of the test run's own silencing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "CUDA_", "PYTHONWARN"))}
    command = [sys.executable, "-m", "keras_sparse", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"]], ids=" ".join)
def test_help_answers_before_keras_is_imported(arguments):
    code = (
        "import runpy, sys\n"
        "sys.argv[:1] = sys.orig_argv = ['keras-sparse']\n"  # as its script starts
        "try:\n    runpy.run_module('keras_sparse', run_name='__main__')\n"
        "except SystemExit as exit:\n    assert exit.code == 0\n"
        "print(sorted({'keras', 'numpy', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "keras-sparse" in done.stdout


@pytest.mark.slow
def test_public_names_and_registered_classes_are_there_on_the_command_line():
    code = (
        "import sys\n"
        "sys.argv[:] = sys.orig_argv = ['keras-sparse']\n"
        "import keras_sparse as ks\nassert 'keras' not in sys.modules\n"
        "functions = [name for name in ks.__all__ if callable(getattr(ks, name))]\n"
        "import keras\nassert 'keras_sparse>L0' in keras.saving.get_custom_objects()\nprint(functions)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([name for name in ks.__all__ if callable(getattr(ks, name))])


def test_nothing_but_the_report_reaches_the_terminal(saved, tmp_path):
    run = process(["export", saved, tmp_path / "model.tflite", "--json"])
    assert run.stderr == ""
    assert run.returncode == 0
    assert json.loads(run.stdout)["totals"]["bytes_file"] == (tmp_path / "model.tflite").stat().st_size


@pytest.mark.slow
def test_error_in_a_process(tmp_path):
    run = process(["inspect", tmp_path / "missing.tflite"])
    check_error((run.returncode, run.stdout, run.stderr), "missing.tflite")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_reader_that_has_seen_enough(sparse_file):
    command = [sys.executable, "-m", "keras_sparse", "inspect", str(sparse_file)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b""
    run.stderr.close()
    assert run.wait() in (1, -signal.SIGPIPE)
