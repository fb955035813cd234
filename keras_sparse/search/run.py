"""A search asks for candidates, has them evaluated by workers and tells the searcher what they cost, in batches."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import tempfile
import time
import traceback
import warnings

import keras
import numpy as np

from keras_sparse import pruning, selection
from keras_sparse.quiet import shows_progress
from keras_sparse.registry import check_whole, is_real
from keras_sparse.search import searchers
from keras_sparse.search.evaluation import Evaluation, Forked, arrays
from keras_sparse.search.goals import Goals
from keras_sparse.search.journal import Journal
from keras_sparse.search.results import Candidate, SearchResults
from keras_sparse.search.space import Space
from keras_sparse.tflite import commands

__all__ = ["search"]

_LINKS = ("input_layers", "output_layers", "keras_history")  # where the configs of models refer to layers by name
_GRACE = 60  # seconds that a worker may take to start, beyond what a candidate may take


def search(
    model,
    data,
    space=None,
    searcher="evolution",
    objective=None,
    constraints=None,
    budget=100,
    time_limit=None,
    timeout=None,
    epochs=0,
    batch_size=128,
    seed=0,
    runtime="native",
    executor=None,
    directory=None,
    console=None,
):
    """Search for where a trained model can be sparse.

    Each candidate starts from the model's weights, on a private copy: it is pruned to its allocation by magnitude,
    trained for `epochs` with its zeros kept and the model's optimizer begun anew, its batch normalizations are
    re-estimated (on training data, or on the validation inputs where there are none), and it is evaluated on validation
    data. The model itself is never touched.

    A seed is a search: candidates are asked for and told in batches of a fixed size, each is numbered, and its training
    draws from `seed` plus its number. So the results do not depend on how many workers there are, nor on which of them
    is faster, as far as the backend itself computes the same each time (threads on the torch backend share what dropout
    draws from: there, use processes); measured latencies differ, of course.

    The first candidates are allocations that are known to be good: uniform, by the Erdos-Renyi-Kernel rule, and by one
    threshold over all weights (with a constraint on the sparsity; without one, uniform ones at several sparsities).

    Args:
        model: A built and compiled Keras model that can be saved.
        data: Validation data `(x, y)` or `(x, y, sample_weight)`, or what yields such batches and ends; or a dict
            `{"train": ..., "val": ...}` of both. All of it is kept in memory.
        space: A `Space` of the model; `None` is `Space(model)`.
        searcher: A `Searcher` or its name: `"random"`, `"evolution"`, `"reinforce"`.
        objective: What to make good: the name of a metric of `model.evaluate`, or `"sparsity"` (share of zeros over the
            space's weights), `"macs"` (multiplications of one sample with weights that are not zero), `"bytes"` (of
            the .tflite file), `"latency_ms"`; a list of them for a Pareto front; a dict to `"min"` or `"max"` where
            the name does not tell. `None` is the first metric, or the loss.
        constraints: Dict. `"sparsity"`: candidates are scaled to at least this share of zeros over the space, as far
            as the grid goes for each weight. `"bytes"`, `"macs"`, `"latency_ms"`: at most this much.
        budget: How many points the searcher is asked for. One that it has asked for before is not evaluated again, and
            the search ends earlier where it knows all points of the space.
        time_limit: Seconds after which no more candidates are asked for.
        timeout: Seconds that a candidate may take; one that takes longer is recorded as failed.
        epochs: Of training for each candidate, on `data["train"]`.
        batch_size: Samples in a batch.
        seed: A whole number of at least 0.
        runtime: For latency, as in `ks.tflite.benchmark`.
        executor: A `concurrent.futures.Executor` for the evaluations, such as a `ProcessPoolExecutor` with fresh
            interpreters (`mp_context=multiprocessing.get_context("spawn")`), a `ThreadPoolExecutor`, or Dask's
            `Client.get_executor()` on machines that share the file system of `directory`. `None` evaluates here, one
            after another. Processes compute on one thread each.
        directory: Folder of the journal: a search that was killed goes on where it was when it is started again.
        console: A `rich.console.Console` for the progress bar. `None`: stderr, if that is a terminal.

    Returns:
        A `SearchResults`; `results.best.allocation` goes into `ks.callbacks.Pruning(...)` and `ks.prune(model, ...)`.

    Raises:
        ValueError: If an argument is wrong, no point of the space meets a constraint (with the range that it can
            reach), or the journal is of another search.
        TypeError: If an argument is of the wrong type.
        RuntimeError: If every candidate failed, with the first traceback; if the executor forks its processes, or one
            of them died.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    >>> model = keras.Sequential([keras.Input((8,)), *layers])
    >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    >>> x, y = np.random.default_rng(0).normal(size=(60, 8)), np.arange(60) % 3
    >>> results = ks.search.search(model, (x, y), constraints={"sparsity": 0.5}, budget=4)
    >>> len(results.candidates), round(results.best.values["sparsity"], 3)
    (4, 0.5)
    """
    selection.check_model(model)
    if not getattr(model, "compiled", False):
        raise ValueError("`model` must be compiled: candidates are scored by `model.evaluate`. Received: no loss")
    check_whole("budget", budget)
    check_whole("batch_size", batch_size)
    check_whole("seed", seed, least=0)
    check_whole("epochs", epochs, least=0)
    for name, value in (("time_limit", time_limit), ("timeout", timeout)):
        if value is not None and (not is_real(value) or not value > 0):
            raise ValueError(f"`{name}` must be a number of seconds above 0, or None. Received: {name}={value!r}")
    budget, batch_size, seed, epochs = int(budget), int(batch_size), int(seed), int(epochs)
    commands.get(runtime, commands.TIMING)
    if executor is not None and not isinstance(executor, concurrent.futures.Executor):
        raise TypeError(
            "`executor` must be a `concurrent.futures.Executor`, such as `ThreadPoolExecutor(2)`, or None. "
            f"Received: executor={executor!r}"
        )
    if directory is not None and not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"`directory` must be the path of a folder, or None. Received: directory={directory!r}")
    train, test = _split(data)
    if epochs and train is None:
        raise ValueError(
            'Training candidates for `epochs` needs data={"train": ..., "val": ...}. '
            f"Received: epochs={epochs} without training data"
        )
    searcher, goals = searchers.get(searcher), Goals(objective, constraints)
    space = Space(model) if space is None else space
    _check_space(space, model)
    with contextlib.ExitStack() as stack:
        # Two searches may share a directory one after the other, and the model of one is not the other's.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=_prefix(os.getpid()), dir=_made(directory)))
        evaluation = Evaluation(
            folder, [part.index for part in space.parts], goals.measures, epochs, batch_size, timeout, runtime
        )
        stack.callback(evaluation.forget)
        evaluation.prepare(model, train, test, processes=executor is not None)
        reference = evaluation(None, seed)
        if "error" in reference:
            raise RuntimeError(f"The model itself cannot be evaluated:\n{reference['error']}")
        reference.pop("seconds")
        goals.settle(reference)
        goals.check_reachable(
            space, reference, evaluation.uses, lambda allocation: evaluation(space.indexed(allocation), seed)
        )
        header = {
            "space": space.digest(),
            "model": _digest(model.get_weights()),
            "architecture": _digest([np.frombuffer(_architecture(model).encode(), "uint8")]),
            "data": _digest(keras.tree.flatten([train, test])),
            "searcher": [type(searcher).__name__, searcher.get_config()],
            "objective": goals.directions,
            "constraints": goals.constraints,
            "training": [epochs, batch_size, _optimizer(model) if epochs else None],
            "seed": seed,
            "runtime": runtime,
        }
        journal = Journal(None if directory is None else pathlib.Path(directory) / "journal.jsonl", header)
        searcher.start(space, seed, _known(space, model, goals.sparsity))
        run = _Run(space, searcher, goals, evaluation, journal, executor, seed)
        with _progress(console, budget) as advance:
            run.all(budget, time_limit, advance)
    failed = [candidate for candidate in run.candidates if candidate.error]
    if len(failed) == len(run.candidates):
        raise RuntimeError(f"All {len(failed)} candidates failed. The first one:\n{failed[0].error}")
    return SearchResults(run.candidates, goals, reference)


class _Run:
    """The loop of a search and what it has found."""

    def __init__(self, space, searcher, goals, evaluation, journal, executor, seed):
        self.candidates = []
        self._space, self._searcher, self._goals = space, searcher, goals
        self._evaluation, self._journal, self._executor, self._seed = evaluation, journal, executor, seed
        self._best, self._checked = None, False

    def all(self, budget, time_limit, advance):
        start, asked, known = time.monotonic(), 0, {}
        while asked < budget and len(known) < self._space.size():
            if time_limit is not None and known and time.monotonic() - start > time_limit:
                break
            points = self._ask()[: budget - asked]
            asked += len(points)
            new = list(dict.fromkeys(point for point in points if point not in known))
            self.candidates += self._evaluate(new, advance)
            known |= {one.point: one for one in self.candidates[len(known) :]}
            batch = [known[point] for point in points]
            costs = [None if one.error else self._goals.costs(one.values) for one in batch]
            self._searcher.tell(points, costs, [one.violation for one in batch])

    def _ask(self):
        points = [self._space.check(point) for point in self._searcher.ask()]
        if not points:
            raise ValueError(f"`ask` must return at least one point. Received: [] from {self._searcher!r}")
        return points

    def _evaluate(self, points, advance):
        """The candidates of a batch in its order, in whatever order their evaluations end."""
        batch, waiting, check = [], {}, None

        def finish(candidate, values, new=True):
            if new:
                self._journal.write(candidate.number, {"point": list(candidate.point), "values": values})
            values = dict(values)
            candidate.error, candidate.seconds = values.pop("error", None), values.pop("seconds", None)
            candidate.values = values
            if not candidate.error:
                candidate.violation += self._goals.violation(values)
            advance(self._better(candidate))

        try:
            for number, point in enumerate(points, len(self.candidates)):
                allocation, missed = self._space.scaled(point, self._goals.sparsity)
                candidate = Candidate(number, point, allocation, {}, violation=missed)
                batch.append(candidate)
                known = self._journal.entries.get(number)
                arguments = self._space.indexed(allocation), self._seed + number
                if known is not None and tuple(known["point"]) == point:
                    finish(candidate, known["values"], new=False)
                elif self._executor is None:
                    finish(candidate, self._evaluation(*arguments))
                else:
                    if not self._checked:
                        self._checked, check = True, self._submit(self._evaluation.check)
                    waiting[self._submit(self._evaluation, *arguments)] = candidate
            if check is not None:
                _raise_unless_loaded(check, self._evaluation.timeout)
            for future, values in self._ended(set(waiting)):
                finish(waiting[future], values)
        finally:
            for future in waiting:
                future.cancel()
        return batch

    def _submit(self, *task):
        with _workers():
            return self._executor.submit(*task)

    def _ended(self, pending):
        """Yield futures with what they found, as they end."""
        timeout, last = self._evaluation.timeout, time.monotonic()
        while pending:
            done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                try:
                    with _workers():
                        values = future.result()
                except (Forked, _Broken):
                    raise
                except Exception:  # of the executor: its worker could not be reached, or not understand the task
                    values = {"error": traceback.format_exc()}
                yield future, values
                last = time.monotonic()
            # Evaluations end by themselves when their time is over. This is for those that hang in native code.
            if timeout is not None and time.monotonic() - last > _patience(timeout):
                for future in pending:
                    yield future, {"error": f"TimeoutError: no answer, although it may take {timeout} seconds"}
                return

    def _better(self, candidate):
        """What the progress bar says, now that there is another candidate."""
        if not candidate.error and not candidate.violation:
            best = candidate if self._best is None else self._best
            self._best = min(best, candidate, key=lambda one: self._goals.costs(one.values)[0])
        name = next(iter(self._goals.directions))
        return "search" if self._best is None else f"search, best {name} {self._best.values[name]:.4g}"


def _patience(timeout):
    """Seconds after which a worker that has not answered will not."""
    return 2 * timeout + _GRACE


def _raise_unless_loaded(check, timeout):
    """Raise if the workers cannot load the model, before the budget is spent on finding it out, or do not answer."""
    limit = _GRACE if timeout is None else _patience(timeout)
    if not concurrent.futures.wait([check], limit).done:
        silent = (
            f"No worker has answered in {limit:.0f} seconds. Some executors (Dask's) wait for workers for ever: see "
            f"that there are some, with `client.wait_for_workers(1, timeout=300)`. Received: timeout={timeout!r}"
        )
        if timeout is not None:
            raise RuntimeError(silent)
        warnings.warn(silent, stacklevel=2)  # they may be on their way
    with _workers():
        problem = check.result()
    if problem is not None:
        raise RuntimeError(
            "The workers cannot load the model. They import what it is made of: put classes and functions of your own "
            "into a module that they can import, or register them there with "
            f"`keras.saving.register_keras_serializable`, or use threads. Received:\n{problem}"
        )


class _Broken(RuntimeError):
    """The executor takes no more work."""


@contextlib.contextmanager
def _workers():
    """Say what a broken pool of workers means."""
    try:
        yield
    except concurrent.futures.BrokenExecutor as error:
        raise _Broken(
            "A worker process died: it crashed, or the system ended it for want of memory. With a new executor and the "
            "same `directory`, the search goes on where it was. A script that starts processes must do so under "
            f"`if __name__ == '__main__':`. Received: {error}"
        ) from error


def _known(space, model, sparsity):
    """Points to begin with: uniform allocations, and those of ERK and of one threshold over all weights."""
    if sparsity is None:
        return [space.nearest([level] * len(space.choices)) for level in (0.5, 0.75, 0.9)]
    weights = selection.weights(model)
    shapes = [part.shape for part in space.parts]
    zeros = iter(pruning.erk_counts(shapes, [part.size for part in space.parts], sparsity))
    by_shape = [sum(next(zeros) for _ in choice.parts) / choice.size for choice in space.choices]
    sizes = [[np.abs(weights[part.index].numpy()).ravel() for part in choice.parts] for choice in space.choices]
    threshold = np.quantile(np.concatenate([own for parts in sizes for own in parts]), sparsity)
    by_size = [float(np.mean(np.concatenate(parts) <= threshold)) for parts in sizes]
    return [space.nearest(found) for found in ([sparsity] * len(space.choices), by_shape, by_size)]


def _split(data):
    """The training data, or `None`, and the validation data, as arrays."""
    if isinstance(data, list) and len(data) in (2, 3):
        raise TypeError("`data` must be a tuple (x, y) or (x, y, sample_weight). Received: a list")
    parts = data if isinstance(data, dict) else {"val": data}
    if "val" not in parts or set(parts) - {"train", "val"}:
        raise ValueError(
            f'`data` needs validation data: (x, y), or {{"train": ..., "val": ...}}. Received: a dict of {list(parts)}'
        )
    found = {name: arrays(value, f"`data[{name!r}]`" if parts is data else "`data`") for name, value in parts.items()}
    return found.get("train"), found["val"]


def _check_space(space, model):
    if not isinstance(space, Space):
        raise TypeError(f"`space` must be a `ks.search.Space`. Received: {space!r} of type {type(space).__name__}")
    weights = selection.weights(model)
    for part in space.parts:
        own = weights[part.index] if part.index < len(weights) else None
        if own is None or tuple(own.variable.shape) != part.shape or own.path != part.path:
            raise ValueError(
                f"The space is of another model: {part.path} of shape {part.shape} is not in {model.name!r}. "
                "Make it with `ks.search.Space(model)`."
            )


def _made(directory):
    """The folder, which is there, and has no copies of models whose searches were killed."""
    if directory is not None:
        os.makedirs(directory, exist_ok=True)
        for path in pathlib.Path(directory).glob("keras_sparse-*"):
            owner = re.match(_prefix("([0-9]+)"), path.name)
            if owner and not _lives(int(owner[1])):
                shutil.rmtree(path, ignore_errors=True)
    return directory


def _prefix(process):
    """How the names of temporary folders of a process of this machine begin."""
    machine = re.sub(r"\W", "_", platform.node())
    return f"keras_sparse-{machine}-{process}-"


def _lives(process):
    if os.name != "posix":
        return True  # elsewhere to ask would end it
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _optimizer(model):
    config = keras.saving.serialize_keras_object(model.optimizer)["config"]
    return {key: value for key, value in config.items() if key != "name"}


def _architecture(model):
    """What a model computes and is measured by, as text: without the names of layers, which count on in a notebook."""
    content = keras.saving.serialize_keras_object(model)
    compiled = content.pop("compile_config", None) or {}
    measured = {key: compiled.get(key) for key in ("loss", "loss_weights", "metrics", "weighted_metrics")}
    numbers = {}

    def plain(item, key=None):
        if isinstance(item, dict):
            # Seeds are drawn when a layer is made, if none is given; those that count are drawn anew for a candidate.
            left = {key: value for key, value in item.items() if key not in ("seed", "build_config")}
            return {own: plain(value, key if key in _LINKS else own) for own, value in left.items()}
        if isinstance(item, (list, tuple)):
            return [plain(value, key) for value in item]
        named = isinstance(item, str) and key in ("name", *_LINKS)
        return numbers.setdefault(item, len(numbers)) if named else item

    return json.dumps(plain([content, measured]), sort_keys=True, default=lambda item: type(item).__name__)


def _digest(found):
    total = hashlib.sha256()
    for array in found:
        if array is not None:
            value = np.ascontiguousarray(array)
            total.update(json.dumps([list(value.shape), str(value.dtype)]).encode() + value.tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def _progress(console, total):
    """Yield a function that counts a candidate and says something new."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True) if console is None else console
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, disable=not shows_progress(console)) as progress:
        task = progress.add_task("search", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)
