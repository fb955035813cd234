"""Searches that go on after they were killed, and those in other processes."""

import concurrent.futures
import io
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import search_models
from search_models import data, facts, search

import keras_sparse as ks
from keras_sparse.search.journal import Journal

SPAWN = multiprocessing.get_context("spawn")
SUPPORT = pathlib.Path(search_models.__file__).parent


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
@pytest.mark.lengthy(0)
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
    model.compile("adam", losses, metrics=metrics, run_eagerly=True)
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
@pytest.mark.exhaustive  # as below, in a cluster that Dask starts itself
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


class Nobody(concurrent.futures.Executor):
    """Takes tasks and has no workers, as Dask's when none has started; those that come after a while fail."""

    def __init__(self, seconds=None):
        self.seconds = seconds

    def submit(self, function, *args, **kwargs):
        future = concurrent.futures.Future()
        if self.seconds is not None:
            threading.Timer(self.seconds, self.fail, [future]).start()
        return future

    def fail(self, future):
        if future.set_running_or_notify_cancel():
            future.set_exception(OSError("came late"))


@pytest.mark.slow
def test_a_search_without_workers_ends_or_says_that_it_waits():
    """At the same time, since both take a minute."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads, pytest.warns(UserWarning, match="No worker has answered"):
        waits = threads.submit(search, executor=Nobody(62), budget=4)
        with pytest.raises(RuntimeError, match=r"No worker has answered in 60 seconds.*wait_for_workers.*timeout=0\.1"):
            search(executor=Nobody(), budget=4, timeout=0.1)
        with pytest.raises(OSError, match="came late"):
            waits.result()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_dask_in_processes_that_were_started_apart_finds_the_same(tmp_path):
    distributed = pytest.importorskip("distributed")
    address, processes = tmp_path / "scheduler.json", []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}

    def start(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(address), "--no-dashboard"]
        with (tmp_path / f"{len(processes)}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
            )

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        while not address.exists() and processes[0].poll() is None:
            time.sleep(0.1)
        with distributed.Client(scheduler_file=str(address), timeout=120) as client:
            with pytest.raises(TimeoutError, match="0/1"):  # what would wait for ever in a search
                client.wait_for_workers(1, timeout=0.5)
            for _ in range(2):
                start("worker", "--nthreads", "1", "--host", "127.0.0.1")
            client.wait_for_workers(2, timeout=240)
            found = facts(search(executor=client.get_executor(), budget=8))
            used = client.run(eval, "'keras' in __import__('sys').modules")
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)
    assert same(found, facts(search(budget=8)))
    assert list(used.values()) == [True, True]  # both have evaluated something
