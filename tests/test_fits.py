"""Fits one after another: broken off, with new weights, compiled anew."""

import gc
import json
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from fit_algorithms import (
    ALGORITHMS,
    BACKEND,
    EAGER,
    LOSS,
    QUICK,
    Masked,
    dense_model,
    fit,
    has_class,
    is_plain,
    kernels,
    train,
    zeros,
)

import keras_sparse as ks

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def interrupt(model, algorithm, sparsity, step=7):
    if algorithm.prepare is not None:
        algorithm.prepare(model, sparsity)
    with pytest.raises(KeyboardInterrupt):
        fit(model, algorithm.make(sparsity), Masked(interrupt_at=step))
    assert is_plain(model)


def optimizer_config(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))["compile_config"]["optimizer"]


def check_file(model, path):
    """Save a model, and compare it with what is loaded."""
    model.save(path)
    assert "keras_sparse" not in json.dumps(optimizer_config(path))
    loaded = keras.saving.load_model(path)
    assert is_plain(loaded, type(model.optimizer))
    state, expected = loaded.optimizer.variables, model.optimizer.variables
    assert len(state) == len(expected)
    for a, b in zip([*loaded.weights, *state], [*model.weights, *expected], strict=True):
        np.testing.assert_array_equal(ks.selection.as_array(a), ks.selection.as_array(b))


# The table: each callback, whatever came before its fit


@each_algorithm
@pytest.mark.thorough(3)
def test_a_fit_after_an_interrupted_one_begins_anew(algorithm, tmp_path):
    model = dense_model(gated=algorithm.gated)
    interrupt(model, algorithm, 0.5)
    check_file(model, tmp_path / "interrupted.keras")
    train(model, algorithm, 0.8)
    check_file(model, tmp_path / "model.keras")


@each_algorithm
@pytest.mark.thorough(3)
@pytest.mark.lengthy(1)
def test_a_file_of_the_middle_of_a_fit_is_trained_with_other_arguments(algorithm, tmp_path):
    model = dense_model(gated=algorithm.gated, **EAGER)
    if algorithm.prepare is not None:
        algorithm.prepare(model, 0.5)
    fit(model, algorithm.make(0.5), keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
    loaded = keras.saving.load_model(tmp_path / "2.keras")
    assert has_class(loaded.optimizer, keras.optimizers.Adam)
    # It keeps what the file brought, for a fit that resumes; this one does not.
    train(loaded, algorithm, 0.8)
    check_file(loaded, tmp_path / "again.keras")


@each_algorithm
@pytest.mark.thorough(3)
def test_a_second_fit_begins_anew_from_the_zeros_of_the_first(algorithm):
    model = dense_model(gated=algorithm.gated)
    train(model, algorithm, 0.5)
    train(model, algorithm, 0.8)
    assert ks.optimizers.find(model) is None


@each_algorithm
@pytest.mark.thorough(3)
@pytest.mark.lengthy(1)
def test_new_weights_know_nothing_of_old_masks(algorithm):
    model = dense_model(gated=algorithm.gated, **EAGER)
    first = model.get_weights()
    interrupt(model, algorithm, 0.8, step=11)
    model.set_weights(first)
    train(model, algorithm, 0.5)
    assert ks.optimizers.find(model) is None


@each_algorithm
@pytest.mark.thorough(3)
def test_a_model_that_is_compiled_anew_begins_anew(algorithm, tmp_path):
    model = dense_model(gated=algorithm.gated, **EAGER)
    old = model.optimizer
    train(model, algorithm, 0.5)
    model.compile(keras.optimizers.RMSprop(0.01), LOSS, **QUICK)
    train(model, algorithm, 0.8, kind=keras.optimizers.RMSprop)
    assert "sparse_state" not in vars(old) and has_class(old, keras.optimizers.Adam)
    check_file(model, tmp_path / "model.keras")


@each_algorithm
@pytest.mark.thorough(3)
def test_each_fit_of_a_loop_ends_at_the_target(algorithm):
    model, callback = dense_model(gated=algorithm.gated), algorithm.make(0.5)
    train(model, algorithm, 0.5, callback, epochs=2)
    for again in (callback, algorithm.make(0.5)):
        before, record = kernels(model), Masked()
        fit(model, again, record, epochs=2)
        assert algorithm.met(model, 0.5) and is_plain(model) and not record.alive
        assert any((a != b).any() for a, b in zip(before, kernels(model), strict=True))


# What was found at fault once, and what is next to it


@each_algorithm
def test_an_interrupted_fit_ends_at_once(algorithm):
    model = dense_model(gated=algorithm.gated, **EAGER)
    gc.disable()
    try:
        interrupt(model, algorithm, 0.5)
        assert ks.optimizers.find(model) is None
    finally:
        gc.enable()


def test_an_interrupted_fit_says_what_it_leaves():
    with pytest.warns(UserWarning, match=r"broken off at sparsity 0\.[1-9]\d*\. .*own optimizer"):
        interrupt(dense_model(**EAGER), ALGORITHMS["pruning"], 0.8)


CELL = """
import keras, numpy as np, keras_sparse as ks
class Interrupt(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise KeyboardInterrupt
model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(10), keras.layers.Dense(3)])
model.compile("adam", "mse")
pruning = ks.callbacks.Pruning(0.5, schedule="one_shot")
model.fit(np.ones((8, 12)), np.ones((8, 3)), verbose=0, callbacks=[pruning, Interrupt()])
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="about notebooks")
def test_an_interrupted_fit_ends_with_its_cell_of_a_notebook(tmp_path):
    pytest.importorskip("IPython")
    (tmp_path / "cell.py").write_text(CELL)
    program = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "import sys\n"
        "shell = InteractiveShell.instance()\n"
        "shell.run_cell(open(sys.argv[1]).read())\n"
        "assert sys.last_traceback is not None\n"
        "shell.run_cell('print(ks.optimizers.find(model), np.count_nonzero(model.get_weights()[0]))')\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "cell.py")], capture_output=True, text=True)
    assert run.stdout.endswith("None 60\n"), run.stdout + run.stderr
    assert "broken off at sparsity 0.500" in run.stderr


@pytest.mark.lengthy(0)
def test_a_program_that_keeps_the_last_traceback_keeps_no_fit(tmp_path):
    model = dense_model(**EAGER)
    try:
        fit(model, ks.callbacks.Pruning(0.5), Masked(interrupt_at=7))
    except KeyboardInterrupt as error:
        kept = error
    # The fit is not known to be over, so its file is one of the middle of a fit: it loads all the same.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert has_class(loaded.optimizer, keras.optimizers.Adam)
    train(model, ALGORITHMS["pruning"], 0.8)
    train(loaded, ALGORITHMS["pruning"], 0.8)
    del kept
    assert is_plain(model)


@pytest.mark.parametrize("times", [{"begin": 0, "end": 9, "frequency": 1}, {"begin": 0.0, "end": 0.75}], ids=str)
def test_a_file_of_the_last_epoch_is_pruned_further_over_the_whole_fit(times, tmp_path):
    model = dense_model(**EAGER)
    fit(model, ks.callbacks.Pruning(0.3), keras.callbacks.ModelCheckpoint(tmp_path / "last.keras"))
    loaded = keras.saving.load_model(tmp_path / "last.keras")
    seen = fit(loaded, ks.callbacks.Pruning(0.8, schedule="linear", **times))["sparsity"]
    assert 0.3 <= seen[0] < 0.5 and seen[0] < seen[1] < seen[2] == pytest.approx(0.8)


def test_weights_that_are_loaded_know_nothing_of_old_masks(tmp_path):
    model = dense_model(**EAGER)
    fit(model, epochs=1)
    model.save_weights(tmp_path / "first.weights.h5")
    interrupt(model, ALGORITHMS["pruning"], 0.8, step=10)
    model.load_weights(tmp_path / "first.weights.h5")
    assert zeros(model) == [0, 0]
    train(model, ALGORITHMS["pruning"], 0.5)


def test_identities_of_recurrent_kernels_are_trained():
    sequences = np.random.default_rng(0).random((32, 4, 3)).astype("float32")
    eye = keras.initializers.Identity()
    for layer in (
        keras.layers.SimpleRNN(12, recurrent_initializer=eye),
        keras.layers.GRU(8, recurrent_initializer=eye),
    ):
        model = keras.Sequential([keras.Input((4, 3)), layer, keras.layers.Dense(1)])
        model.compile("adam", "mse", **QUICK)
        pruning = ks.callbacks.Pruning(0.5)
        model.fit(sequences, sequences.sum((1, 2)), epochs=2, batch_size=8, verbose=0, callbacks=[pruning])
        kernel = ks.selection.as_array(layer.cell.recurrent_kernel)
        assert (kernel == 0).sum() == kernel.size / 2
