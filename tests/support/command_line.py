"""Files that commands get, and how they are run."""

import json

import keras
import pytest

import keras_sparse as ks
from keras_sparse.cli import main


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
