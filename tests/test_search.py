"""The whole search: what it finds, how it ends, who computes it, and how it goes on after it was killed."""

import concurrent.futures
import io
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import search_models
from search_models import data, facts, search

import keras_sparse as ks
from keras_sparse.graph import uses
from keras_sparse.search.journal import Journal

OTHERS = ("random", "reinforce")
SPAWN = multiprocessing.get_context("spawn")
SUPPORT = pathlib.Path(search_models.__file__).parent


@pytest.mark.slow
def test_found_allocation_goes_into_pruning_and_beats_uniform():
    body = [keras.layers.Dense(40, activation="relu"), keras.layers.Dense(40, activation="relu"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *body])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(*data(seed=1), epochs=10, verbose=0)
    before = [np.array(v) for v in model.get_weights()]
    sets = {"train": data(seed=1), "val": data(seed=2)}
    results = ks.search.search(model, sets, objective="loss", constraints={"sparsity": 0.8}, budget=40)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert len(results.candidates) == 40
    assert [one.number for one in results.candidates] == list(range(40))
    assert results.best in results.front
    assert results.best.values["loss"] == min(one.values["loss"] for one in results.candidates)
    uniform = results.candidates[0]
    assert results.best.values["loss"] < uniform.values["loss"]
    for one in results.candidates:
        assert one.values["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert one.error is None
    assert len({one.point for one in results.candidates}) == 40
    report = ks.prune(model, results.best.allocation)
    assert report.totals["sparsity"] == pytest.approx(results.best.values["sparsity"])
    model.set_weights(before)
    model.fit(*data(seed=1), epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(results.best.allocation, end=0.5)])
    assert ks.report(model).totals["sparsity"] == pytest.approx(results.best.values["sparsity"])


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
@pytest.mark.parametrize("searcher", ["evolution", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.thorough(1)
def test_every_searcher_on_every_kind_of_model(kind, searcher):
    first, again = (facts(search(kind=kind, searcher=searcher, budget=9)) for _ in range(2))
    assert first == again
    assert first != facts(search(kind=kind, searcher=searcher, budget=9, seed=1))
    assert not any(error for *_, error, _ in first)


def test_it_begins_with_known_allocations():
    results = search(budget=3, epochs=0)
    uniform, by_shape, by_size = ([s for s, _ in one.allocation.values()] for one in results.candidates)
    assert uniform == pytest.approx([0.7, 0.7], abs=0.02)
    # ERK: densities as the sum of the dimensions over their product, (18 / 72, 15 / 36), that keep 32 of 108 weights.
    assert by_shape == pytest.approx([1 - 18 * 32.4 / 33 / 72, 1 - 15 * 32.4 / 33 / 36], abs=0.06)
    assert by_size[0] != by_size[1]


def test_several_objectives_make_a_front():
    results = search(objective={"accuracy": "max", "sparsity": "max"}, constraints=None, budget=24, epochs=0)
    values = [(one.values["accuracy"], one.values["sparsity"]) for one in results.candidates]
    brute = [a for a in values if not any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in values)]
    assert sorted((one.values["accuracy"], one.values["sparsity"]) for one in results.front) == sorted(brute)
    assert len(results.front) > 2
    assert results.best.values["accuracy"] == max(value for value, _ in values)


def test_constraints_are_limits():
    results = search(constraints={"macs": 40}, budget=24, epochs=0)
    assert results.best.violation == 0
    assert results.best.values["macs"] <= 40
    over = [one for one in results.candidates if one.values["macs"] > 40]
    assert over
    assert all(one.violation == pytest.approx(one.values["macs"] / 40 - 1) for one in over)
    assert not {one.number for one in over} & {one.number for one in results.front}
    assert results.reference["macs"] == 108


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"sparsity": 0.999}, r"reaches sparsities from 0 to 0\.99"),
        ({"macs": 0.5}, r"reaches macs from \d+ to 108"),
    ],
)
def test_what_cannot_be_met_is_said_before(constraints, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        search(constraints=constraints, budget=10**6)
    assert time.monotonic() - start < 60


def unequal(convolution=8):
    """Weights of a convolution are used 100 times, those of a dense layer once."""
    layers = keras.layers
    body = [layers.Conv2D(convolution, 3, activation="relu"), layers.Flatten(), layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((12, 12, 1)), *body])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def reachable(model, constraints, **options):
    """Whether a search of a space would begin, by the checks before it."""
    space, measured = ks.search.Space(model, **options), []
    counts = uses(model, np.zeros((1, *model.input_shape[1:]), "float32"))
    counts = {i: counts[w.variable] for i, w in enumerate(ks.selection.weights(model)) if w.variable in counts}
    macs = sum(counts[part.index] * part.size for part in space.parts)

    def evaluate(allocation):
        """A file in which blocks are smaller."""
        kept = [(1 - s) * (10 if p == "unstructured" else 1) for s, p in allocation.values()]
        measured.append(100 + 100 * sum(kept))
        return {"bytes": measured[-1]}

    goals = ks.search.goals.Goals("loss", constraints)
    goals.check_reachable(space, {"macs": float(macs), "bytes": 5000.0}, lambda: counts, evaluate)
    return measured


def test_the_range_of_macs_is_that_of_all_allocations():
    """All points that have the total, against the limit that is refused."""
    model = unequal(2)
    space = ks.search.Space(model, (0.0, 0.5, 0.9, 0.97))
    least = min(
        sum(u * (1 - s) * part.size for (s, _), part, u in zip(found.values(), space.parts, (100, 1), strict=True))
        for found, missed in (space.scaled(point, 0.8) for point in space.points())
        if not missed
    )
    assert reachable(model, {"sparsity": 0.8, "macs": least + 0.1}, sparsities=(0.0, 0.5, 0.9, 0.97)) == []
    with pytest.raises(ValueError, match="reaches macs from") as refused:
        reachable(model, {"sparsity": 0.8, "macs": 100}, sparsities=(0.0, 0.5, 0.9, 0.97))
    low, high = map(float, re.search("from (.*) to ([0-9.]*)", str(refused.value)).groups())
    assert least - 4 <= low <= least  # but for what is rounded
    assert high == pytest.approx(100 * 18 + 600 - 0.8 * 618, abs=100)


def test_limits_on_bytes_look_at_every_pattern():
    options = {"sparsities": (0.5, 0.9), "patterns": ("unstructured", "block_4x4")}
    assert reachable(unequal(), {"bytes": 130.0}, **options) == pytest.approx([300, 120])
    with pytest.raises(ValueError, match=r"bytes go from 120 to 300 \(the model itself: 5000\)"):
        reachable(unequal(), {"bytes": 59.0}, **options)
    assert len(reachable(unequal(), {"bytes": 200.0, "sparsity": 0.7}, **options)) == 4


@keras.saving.register_keras_serializable("tests")
class Moody(keras.layers.Layer):
    """Fails, or gives NaN, on kernels that are sparse in a certain way."""

    def __init__(self, mood="raise", **kwargs):
        super().__init__(**kwargs)
        self.mood = mood
        self.inner = keras.layers.Dense(12, activation="relu")

    def get_config(self):
        return super().get_config() | {"mood": self.mood}

    def build(self, shape):
        self.inner.build(shape)
        super().build(shape)

    def call(self, x):
        zeros = keras.ops.sum(keras.ops.cast(keras.ops.equal(self.inner.kernel, 0), "float32"))
        if self.mood == "nan":
            return self.inner(x) + keras.ops.where(zeros > 36, float("nan"), 0.0)
        if float(keras.ops.convert_to_numpy(zeros)) > 36:
            raise OverflowError("in a bad mood")
        return self.inner(x)


def moody(mood):
    model = keras.Sequential([keras.Input((6,)), Moody("nan"), keras.layers.Dense(3)])
    model.layers[0].mood = mood
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], run_eagerly=keras.backend.backend() != "jax", jit_compile=False)
    return model


@pytest.mark.parametrize("mood", ["nan", "raise"])
def test_a_candidate_that_fails_is_recorded(mood, tmp_path):
    if mood == "raise" and keras.config.backend() == "jax":
        pytest.skip("JAX does not run eagerly")
    model = moody(mood)
    space = ks.search.Space(model, (0.2, 0.4, 0.6, 0.8))
    results = ks.search.search(model, data(), space, searcher="random", budget=12, directory=tmp_path)
    failed = [one for one in results.candidates if one.error]
    assert 0 < len(failed) < 12
    for one in results.candidates:
        assert bool(one.error) == (one.allocation["^" + re.escape(space.parts[0].path) + "$"][0] > 0.5)
        assert not one.error or ("finite" if mood == "nan" else "in a bad mood") in one.error
    assert not results.best.error
    assert results.totals["failed"] == len(failed)
    assert f"{len(failed)} candidates failed" in str(results)
    # What failed is not tried again.
    assert facts(ks.search.search(model, data(), space, searcher="random", budget=12, directory=tmp_path)) == facts(
        results
    )


def test_all_candidates_failing_is_an_error():
    model = moody("nan")
    with pytest.raises(RuntimeError, match=r"(?s)All 4 candidates failed.*Traceback.*no finite numbers"):
        ks.search.search(model, data(), ks.search.Space(model, (0.8, 0.9)), budget=8)


def test_a_model_that_fails_itself_is_an_error():
    x, y = data()
    with pytest.raises(RuntimeError, match=r"(?s)The model itself cannot be evaluated.*no finite numbers"):
        ks.search.search(search_models.model(), (x * np.float32("nan"), y))


def test_candidates_that_take_too_long_are_recorded():
    with pytest.raises(RuntimeError, match="took longer than"):
        search(timeout=1e-9, budget=4)


@pytest.mark.slow
def test_time_limit_ends_between_batches():
    results = search(time_limit=1e-9, budget=100)
    assert len(results.candidates) == 8


@pytest.mark.slow
def test_threads_find_the_same():
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert facts(search(executor=executor, budget=16)) == facts(search(budget=16))


class Own(ks.search.Searcher):
    """Asks for what it is told to."""

    def __init__(self, asked, batch=8):
        super().__init__(batch)
        self.asked, self.told = asked, []

    def ask(self):
        return self.asked

    def tell(self, points, costs, violations=None):
        self.told += zip(points, costs, violations, strict=True)


@pytest.mark.parametrize("asked", [[(1, 2), (1, 2), (3, 2)], np.array([[1, 2], [1, 2], [3, 2]])], ids=["ints", "array"])
def test_points_that_are_asked_for_again_are_not_evaluated_again(tmp_path, asked):
    own = Own(asked)
    found = search(tmp_path, searcher=own, budget=5, epochs=0)
    assert [one.point for one in found.candidates] == [(1, 2), (3, 2)]
    first, second = ([costs[0] for _, costs, _ in own.told if _ is not None][i] for i in (0, 2))
    assert [point for point, *_ in own.told] == [(1, 2), (1, 2), (3, 2), (1, 2), (1, 2)]
    assert [costs for _, costs, _ in own.told] == [[first], [first], [second], [first], [first]]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3


def test_a_search_ends_when_it_knows_the_whole_space():
    model = search_models.model()
    found = ks.search.search(model, data(), ks.search.Space(model, (0.0, 0.5)), budget=60, objective=["loss", "macs"])
    assert sorted(one.point for one in found.candidates) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({one.point for one in found.front}) == len(found.front)


@pytest.mark.parametrize("asked", [[], [(1,)], [(99, 0)], [(1.0, 2.0)], [None]], ids=str)
@pytest.mark.thorough(2)
def test_wrong_points_of_a_searcher(asked):
    with pytest.raises(ValueError, match="at least one point|ints that are each below"):
        search(searcher=Own(asked), budget=5, epochs=0)


@pytest.mark.slow
def test_numbers_may_be_of_numpy(tmp_path):
    options = {"seed": 1, "batch_size": 32, "constraints": {"macs": 50}, "epochs": 0, "budget": 2}
    found = search(tmp_path, **options)
    numpy = {"seed": np.int64(1), "batch_size": np.int64(32), "constraints": {"macs": np.int64(50)}}
    assert facts(search(tmp_path, **options | numpy)) == facts(found)


class Interrupted(ks.search.RandomSearch):
    def tell(self, points, costs, violations=None):
        raise KeyboardInterrupt


def test_an_interrupted_search_leaves_the_model_alone_and_nothing_behind(tmp_path):
    model = search_models.model()
    before = [np.array(v) for v in model.get_weights()]
    optimizer = model.optimizer
    with pytest.raises(KeyboardInterrupt):
        sets = {"train": data(), "val": data(seed=2)}
        ks.search.search(model, sets, searcher=Interrupted(batch=2), epochs=1, directory=tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer is optimizer
    assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 0
    assert os.listdir(tmp_path) == ["journal.jsonl"]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3


def same(one, other):
    """Whether two searches in different processes are the same: but for the last bits of what was computed."""
    return [(a[:2], a[3:], a[2].keys()) for a in one] == [(b[:2], b[3:], b[2].keys()) for b in other] and all(
        np.allclose(list(a[2].values()), list(b[2].values()), rtol=1e-3) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow
def test_a_journal_ends_where_an_uninterrupted_search_does(tmp_path):
    whole = facts(search(budget=20))
    assert facts(search(tmp_path, budget=11)) == whole[:11]
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    # Killed in the middle of a line, and of a letter.
    journal.write_bytes("".join(lines[:9]).encode() + lines[9][:25].encode() + b"\xc3")
    assert facts(search(tmp_path, budget=20)) == whole
    assert len(journal.read_text().splitlines()) == 21
    # Nothing is left to do, and nothing is done again.
    stamp = journal.stat().st_mtime_ns
    assert facts(search(tmp_path, budget=20)) == whole
    assert journal.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"searcher": "random"}, {"epochs": 0}, {"constraints": {"sparsity": 0.6}}, {"objective": "accuracy"}],
    ids=lambda changed: next(iter(changed)),
)
@pytest.mark.thorough(1)
def test_the_journal_of_another_search_is_refused(tmp_path, changed):
    search(tmp_path, budget=1)
    with pytest.raises(ValueError, match="journal is of another search"):
        search(tmp_path, budget=1, **changed)


def other_model(changed, name):
    """A model that keeps the weights of any other call, whatever `changed` is."""
    layers = keras.layers
    inputs = keras.Input((6,), name=f"inputs_{name}")
    activation = "tanh" if changed == "activation" else "relu"
    hidden = layers.Dense(12, activation, kernel_initializer="ones", name=f"hidden_{name}")(inputs)
    hidden = layers.RandomRotation(0.1)(hidden[:, None, :, None])[:, 0, :, 0]
    outputs = layers.Dense(3, "softmax", kernel_initializer="ones", name=f"outputs_{name}")(hidden)
    model = keras.Model(inputs, outputs, name=name)
    losses = keras.losses.SparseCategoricalCrossentropy(ignore_class=1 if changed == "loss" else None)
    metrics = ["accuracy"] + [keras.metrics.SparseTopKCategoricalAccuracy(2)] * (changed == "metrics")
    model.compile("adam", losses, metrics=metrics)
    return model


@pytest.mark.parametrize("changed", ["activation", "loss", "metrics"])
def test_a_journal_of_the_same_weights_in_another_model_is_refused(tmp_path, changed):
    options = {"objective": "loss", "budget": 1, "directory": tmp_path}
    first = ks.search.search(other_model(None, "one"), data(), **options)
    with pytest.raises(ValueError, match=r"journal is of another search.*\['architecture'\]"):
        ks.search.search(other_model(changed, "two"), data(), **options)
    # Only names differ, and seeds that nobody gave.
    assert facts(ks.search.search(other_model(None, "two"), data(), **options)) == facts(first)


HEADER, ENTRY = b'{"seed": 0}\n', b'{"number": 0, "point": [1], "values": {"loss": 0.5}}\n'


@pytest.mark.parametrize(
    "content",
    [
        *(HEADER + line + b"\n" + ENTRY for line in (b"{broken", b"null", b"5", b"{}", b'{"number": 0}', b"", b"\xff")),
        b"[]\n" + ENTRY,
        HEADER + b'{"number": 0, "point": [1], "values": 3}\n',
    ],
)
def test_damaged_journals_are_refused(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(HEADER + ENTRY)
    assert len(Journal(path, {"seed": 0}).entries) == 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Journal(path, {"seed": 0})


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody can ask whether a process lives")
def test_what_killed_searches_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = {pid: tmp_path / f"{ks.search.run._prefix(pid)}abc" for pid in (process.pid, os.getppid())}
    for folder in left.values():
        folder.mkdir()
    (tmp_path / "keras_sparse-notes").mkdir()
    search(tmp_path, budget=1, epochs=0)
    assert sorted(os.listdir(tmp_path)) == sorted(["journal.jsonl", left[os.getppid()].name, "keras_sparse-notes"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"searcher": "evolutoin"}, ValueError, "Did you mean 'evolution'"),
        ({"objective": "acuracy"}, ValueError, r"must be of \['accuracy'"),
        ({"objective": {"loss": "less"}}, ValueError, "'min' or 'max'"),
        ({"objective": []}, ValueError, "name something"),
        ({"objective": 3}, TypeError, "a list of names"),
        ({"constraints": {"size": 3}}, ValueError, r"\['sparsity', 'bytes', 'macs', 'latency_ms'\]"),
        ({"constraints": {"sparsity": 90}}, ValueError, "below 1"),
        ({"constraints": {"bytes": "1k"}}, TypeError, "number"),
        ({"constraints": 0.9}, TypeError, "dict"),
        ({"budget": 0}, ValueError, "at least 1"),
        ({"budget": 2.5}, ValueError, "whole number"),
        ({"epochs": -1}, ValueError, "at least 0"),
        ({"timeout": 0}, ValueError, "above 0"),
        ({"time_limit": "1h"}, ValueError, "above 0"),
        ({"space": 3}, TypeError, "Space"),
    ],
)
@pytest.mark.thorough(3)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        search(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runtime": "phone"}, ValueError, "`runtime` must be one of"),
        ({"runtime": "arm64"}, ValueError, "`runtime` must be one of 'native', 'wasm'"),
        ({"executor": "threads"}, TypeError, "concurrent.futures.Executor"),
        ({"directory": 5}, TypeError, "path of a folder"),
        ({"data": {"train": data(), "validation": data()}}, ValueError, r"\['train', 'validation'\]"),
        ({"data": list(data())}, TypeError, "must be a tuple"),
    ],
)
def test_wrong_data_and_workers(options, error, message):
    with pytest.raises(error, match=message):
        ks.search.search(search_models.model(), **{"data": data()} | options)


def test_wrong_models_and_data():
    model = search_models.model()
    with pytest.raises(ValueError, match="a dict of .'train'.$"):
        ks.search.search(model, {"train": data()})
    with pytest.raises(ValueError, match="needs data="):
        ks.search.search(model, data(), epochs=1)
    with pytest.raises(ValueError, match="must be compiled"):
        ks.search.search(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), data())
    other = keras.Sequential([keras.Input((6,)), keras.layers.Dense(7)])
    with pytest.raises(ValueError, match="The space is of another model"):
        ks.search.search(model, data(), ks.search.Space(other))


def test_results_print_plot_and_become_json():
    results = search(budget=10, objective=["loss", "macs"], constraints=None, epochs=0)
    text = str(results)
    assert "Front of the search" in text
    assert f"Best allocation: candidate {results.best.number}" in text
    assert results.candidates[0].allocation.keys() <= set(json.loads(results.to_json())["best"]["allocation"])
    content = json.loads(results.to_json())
    assert content["objective"] == {"loss": "min", "macs": "min"}
    assert len(content["candidates"]) == 10
    assert content["front"] == [one.number for one in results.front]
    assert content["reference"]["sparsity"] == 0.0
    assert "<table" in results.to_html()
    pytest.importorskip("matplotlib")
    file = io.BytesIO()
    results.plot().savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_progress_shows_the_best_so_far():
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    results = search(budget=9, console=console, epochs=0)
    shown = console.file.getvalue()
    assert "9/9" in shown
    assert f"best loss {results.best.values['loss']:.4g}" in shown
    quiet = Console(file=io.StringIO(), width=100)
    search(budget=1, console=quiet, epochs=0)
    assert quiet.file.getvalue() == ""


# Other processes.


@pytest.mark.slow
def test_processes_find_the_same(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    found = []
    for workers in (1, 2):
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=SPAWN) as executor:
            found.append(facts(search(executor=executor, kind="subclassed", budget=9)))
    assert found[0] == found[1]
    assert same(found[0], facts(search(kind="subclassed", budget=9)))
    # Nothing of what backends print when they start; TensorFlow advises against loops of short fits.
    assert [line for line in capfd.readouterr().err.splitlines() if line.strip() and "retracing" not in line] == []


def anonymous():
    """A model whose metric other processes cannot find."""

    def mean_output(y, outputs):
        return keras.ops.mean(outputs)

    made = search_models.model()
    made.compile("adam", made.loss, metrics=[mean_output])
    return made


@pytest.mark.slow
def test_what_workers_cannot_load_is_said_at_once(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert ks.search.search(anonymous(), data(), executor=executor, budget=1, objective="loss").candidates
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN) as executor:
        with pytest.raises(RuntimeError, match=r"(?s)The workers cannot load the model.*Traceback"):
            ks.search.search(anonymous(), data(), executor=executor, objective="loss", directory=tmp_path)
        assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1
        # What can be imported need not be registered.
        made = search_models.model()
        made.compile("adam", made.loss, metrics=[search_models.confidence])
        found = ks.search.search(made, data(), executor=executor, budget=1, objective="loss")
    assert set(found.best.values) == {"loss", "confidence", "sparsity"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="nothing forks there")
@pytest.mark.filterwarnings("ignore")  # Python and JAX warn of forks themselves
def test_forked_processes_are_refused():
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as executor:
        with pytest.raises(RuntimeError, match="forks its processes.*spawn"):
            search(executor=executor, budget=2)


@pytest.mark.slow
def test_a_dead_worker_ends_the_search_and_the_journal_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))

    class Dying(concurrent.futures.ProcessPoolExecutor):
        def submit(self, function, /, *arguments):
            return super().submit(os._exit, 3)

    with Dying(1, mp_context=SPAWN) as executor:
        with pytest.raises(RuntimeError, match=r"(?s)A worker process died.*same\s+`directory`"):
            search(tmp_path, executor=executor, budget=8)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1
    assert len(search(tmp_path, budget=8).candidates) == 8


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    code = f"import search_models; search_models.main({str(tmp_path)!r})"
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, SUPPORT)))}
    journal = tmp_path / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) > 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(journal.read_text().splitlines())
    assert 6 < before < 25
    assert same(facts(search(tmp_path)), facts(search()))
    assert len(journal.read_text().splitlines()) == 25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_dask_finds_the_same(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = facts(search(executor=client.get_executor(), budget=8))
    assert same(found, facts(search(budget=8)))
