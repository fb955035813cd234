"""The command line with wrong input, full disks and interrupts."""

import json
import os
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from command_line import check_error, run, run_json, run_ok, small_model

import keras_sparse as ks
from keras_sparse.cli import main
from keras_sparse.cli.command import COMMANDS, argument, command
from keras_sparse.criteria import CRITERIA
from keras_sparse.pruning.allocation import ALLOCATIONS
from keras_sparse.search.goals import CONSTRAINTS
from keras_sparse.search.searchers import SEARCHERS
from keras_sparse.tflite.commands import MEASURING
from keras_sparse.tflite.targets import TARGETS


@pytest.fixture
def searched(tmp_path):
    """A saved classifier, and arrays to search on."""
    model, rng = small_model(compile=False), np.random.default_rng(0)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = rng.normal(size=(64, 40)).astype("float32"), rng.integers(5, size=64)
    np.savez(tmp_path / "data.npz", x=x, y=y, x_train=x, y_train=y)
    model.save(tmp_path / "model.keras")
    return [tmp_path / "model.keras", "--data", tmp_path / "data.npz"]


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "m.keras", "--target", "GPU"], "--target: invalid choice: 'GPU'. Did you mean 'gpu'?"),
        (["prune", "m.keras", "--criterion", "magnitud"], "invalid choice: 'magnitud'. Did you mean 'magnitude'?"),
        (["export", "m.keras", "m.tflite", "--quantize", "INT8"], "invalid choice: 'INT8'. Did you mean 'int8'?"),
        (["check", "m.keras", "--target", "phone"], "invalid choice: 'phone' (choose from"),
    ],
)
def test_choices_that_are_none(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


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


@pytest.mark.lengthy(0)
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
