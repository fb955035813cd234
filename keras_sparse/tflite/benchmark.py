"""A benchmark measures how long a .tflite file takes to load and to run, on this machine or an emulated one."""

import contextlib
import math
import os
import pathlib
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keras_sparse.reports import Report
from keras_sparse.tflite.commands import MEASURING, RUNTIMES, get
from keras_sparse.tflite.flatmodel import damaged, read
from keras_sparse.tflite.runtimes import TIMEOUT, Worker
from keras_sparse.tflite.targets import get as get_target
from keras_sparse.tflite.xnnpack import uses

__all__ = ["BenchmarkReport", "benchmark", "in_turns"]

_ROUNDS = (20, 1000)  # at least, at most
_PATIENCE = 10  # times the seconds asked for: when a slow file stops although it had fewer rounds
_TURN = 5e-3  # seconds: a turn repeats a small model until it is long beside the change to the other process
# The nightly builds that https://developers.google.com/edge/litert/models/measurement names
_BENCHMARK_MODEL = (
    "https://storage.googleapis.com/tensorflow-nightly-public/prod/tensorflow/release/lite/tools/nightly/latest/"
    "android_aarch64_benchmark_model"
)
_PHONE = "/data/local/tmp"


class BenchmarkReport(Report):
    """What `ks.tflite.benchmark` measured. It prints three parts: the measurements, the operators, the commands.

    Attributes:
        operators: A `Report`: for each file and kind of operator how many there are (`count`), how many of them skip
            the zeros of their weights on this runtime (`ran_sparse`), and how many read sparse-encoded weights but
            multiply them as dense ones (`stored_sparse`). It is read from the file by the rules of the runtime.
        commands: Shell commands that measure the same files on an Android phone, with the official `benchmark_model`.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = ks.tflite.export(model, path)
    ...     report = ks.tflite.benchmark(path, seconds=0.1)
    >>> report.operators.rows[0]["operator"]
    'FULLY_CONNECTED'
    >>> report.commands[-1].split()[:2]
    ['adb', 'shell']
    """

    def __init__(self, title, rows, totals, formats, operators, commands):
        super().__init__(title, rows, totals, formats=formats)
        self.operators = operators
        self.commands = commands
        self.below = [operators]

    def to_dict(self):
        """The report as plain data: `{"title", "rows", "totals", "notes", "operators", "commands"}`."""
        return super().to_dict() | {"operators": self.operators.rows, "commands": list(self.commands)}

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        lines = [line for command in self.commands for line in _lines(command)]
        commands = [Text(line, no_wrap=True, overflow="ignore") for line in lines]
        return Group(super().__rich__(), Text(), Text("The same on a phone", style="bold"), *commands)

    def to_html(self):
        """The report as a fragment of HTML: headlines and tables, and the commands."""
        commands = Report("The same on a phone", [{"command": command} for command in self.commands], {})
        return super().to_html() + commands.full().to_html()


def _lines(command, width=120):
    """A shell command in lines that are no longer, broken as a shell reads it and so that it can still be copied."""
    lines = []
    while len(command) > width and "'" not in command:
        end = command.rfind(" ", 0, width - 1) + 1 or width - 1
        lines.append(command[:end] + "\\")
        command = command[end:]
    return [*lines, command]


def benchmark(path, baseline=None, runtime=None, threads=1, seconds=1.0, timeout=TIMEOUT, target=None):
    """Measure a .tflite file on random input of batch size 1: latency, loading, memory, instructions or cycles.

    Each file runs in a process of its own. Several are run in turns, so that all meet the same load of the machine. A
    run ends when the outputs have been read: a GPU computes on after its call has returned.

    Args:
        path: A .tflite file that you trust: it is run; or a list of several.
        baseline: Another one to compare with, such as the dense encoding of the same model.
        runtime: `"native"`, the default: LiteRT's interpreter on this CPU. On x86 with AVX it runs sparse convolutions
            as dense ones, so ratios do not hold for phones. `"wasm"`: LiteRT.js in Node, which runs them sparse; needs
            `npm install @litertjs/core`. `"arm64"`: LiteRT under `qemu-aarch64`, which counts the instructions of a
            phone's CPU exactly; its time would mean nothing and is not shown. Needs `ks.tflite.setup_arm64()`.
            `"compiled-cpu"`: LiteRT's `CompiledModel` on this CPU; `"gpu"`, `"gpu-cpu"`: on a GPU, if there is one.
        threads: Threads of the interpreter; only 1 on `"arm64"`.
        seconds: How long to measure each file; at least 20 rounds, or for ten times as long. Not used by `"arm64"`.
        timeout: Seconds that each step, such as loading a file, may take.
        target: Instead of a runtime, the name of a target (`ks.tflite.targets`): what measures for it here is used.
            `"xnnpack"`: instructions of an ARM64 CPU. `"xnnpack-x86"`: time by the interpreter and, beside it, by
            `CompiledModel`. `"ethos-u85"` and its like: cycles, as Arm's compiler estimates them.

    Returns:
        A `BenchmarkReport`. Columns: `file`, `bytes`, `runtime`; `load` in milliseconds; `memory`, the bytes that
        loading and running the file added to the process's peak (not on `"wasm"`); the quartiles `p25`, `median`,
        `p75` of the latency in milliseconds; `rounds`; `ratio`, median over the baseline's median on the same runtime
        (`None` without a baseline). On `"arm64"` `load` and `instructions` count instructions, and `ratio` compares
        those. For Ethos-U targets `cycles`, `bytes_encoded` (what the NPU reads in place of the weights),
        `npu_operators` and `cpu_operators`, and `ratio` compares cycles.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is no valid .tflite file or cannot be run, an argument is wrong, or nothing here measures
            for the target.
        TimeoutError: If a step took longer than `timeout`.
        RuntimeMissing: If the runtime is not installed; an `OSError` that says what to install.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = ks.tflite.export(model, path)
    ...     report = ks.tflite.benchmark(path, seconds=0.1)
    >>> report.rows[0]["p25"] <= report.rows[0]["median"] <= report.rows[0]["p75"]
    True
    """
    runtimes, npu = _chosen(runtime, target)
    for name, value in ("seconds", seconds), ("timeout", timeout):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
    files = ([baseline] if baseline is not None else []) + (list(path) if isinstance(path, (list, tuple)) else [path])
    if not files:
        raise ValueError(f"`path` must name at least one .tflite file. Received: path={path!r}")
    models = [read(file) for file in files]
    files = [os.fspath(file) for file in files]
    operators = [row for file, model in zip(files, models, strict=True) for row in _operators(file, model, runtimes[0])]
    [measure] = {_MEASURES[runtime.counts] for runtime in runtimes}
    with contextlib.ExitStack() as stack:
        places = [(runtime, *place) for runtime in runtimes for place in zip(files, models, strict=True)]
        workers = [stack.enter_context(Worker(file, runtime.name, threads, timeout)) for runtime, file, _ in places]
        measured = measure.take(workers, [runtime for runtime, *_ in places], seconds, npu)
    rows, bases = [], {}
    for (runtime, file, model), numbers in zip(places, measured, strict=True):
        base = bases.setdefault(runtime.name, numbers[measure.compares])
        ratio = None if baseline is None else numbers[measure.compares] / base
        rows.append(
            {"file": os.path.basename(file), "bytes": model.bytes, "runtime": runtime.name, **numbers, "ratio": ratio}
        )
    formats = dict.fromkeys(("p25", "median", "p75"), ".4f") | {"ratio": ".3f", "load": measure.load}
    formats |= dict.fromkeys(("bytes", "memory", "instructions", "cycles", "bytes_encoded"), ",d")
    title = ", ".join(runtime.title for runtime in runtimes)
    totals = {"runtime": title, "threads": threads, "unit": measure.unit}
    commands = _commands([pathlib.Path(file) for file in files], threads)
    return BenchmarkReport("Benchmark", rows, totals, formats, Report("Operators", operators, {}), commands)


def _chosen(runtime, target):
    """The runtimes that measure, and what Vela calls the NPU."""
    if target is None:
        return [get("native" if runtime is None else runtime, MEASURING)], ""
    if runtime is not None:
        raise ValueError(
            f"`target` chooses the runtime: leave one of the two out. Received: runtime={runtime!r}, target={target!r}"
        )
    target = get_target(target)
    runtimes = [RUNTIMES[name] for name in target.measures]
    silent = [runtime.title for runtime in runtimes if runtime.counts is None]
    if silent or not runtimes:
        why = f"the time of {silent[0]} would mean nothing" if silent else "that needs the device"
        raise ValueError(
            f"Nothing here measures for {target.title}: {why}. Bytes are those of the file (`ks.tflite.inspect`). "
            f"Received: target={target.name!r}"
        )
    return runtimes, target.npu


def in_turns(timers, seconds):
    """Measure several programs in turns, so that all of them meet the same load of the machine.

    Args:
        timers: List of functions `timer(repeats) -> seconds`, the mean over that many runs.
        seconds: How long to measure each; at least 20 rounds, or for ten times as long.

    Returns:
        A list with an array for each timer: the seconds of a run, one number for each round.

    Example:

    >>> import time
    >>> from keras_sparse.tflite.benchmark import in_turns
    >>> [len(times) for times in in_turns([lambda repeats: 1e-3, lambda repeats: 2e-3], seconds=1e-9)]
    [1, 1]
    """
    repeats = [max(1, min(1000, math.ceil(_TURN / timer(1)))) for timer in timers]
    times, start = [], time.perf_counter()
    for done in range(_ROUNDS[1]):
        elapsed = (time.perf_counter() - start) / len(timers)
        if done and (elapsed > _PATIENCE * seconds or (done >= _ROUNDS[0] and elapsed > seconds)):
            break
        # The one that goes first finds the machine as the other left it: take turns at that, too.
        order = range(len(timers)) if done % 2 else reversed(range(len(timers)))
        times.append([0.0] * len(timers))
        for i in order:
            times[-1][i] = timers[i](repeats[i])
    return list(np.transpose(times))


def _times(workers, runtimes, seconds, npu):
    for worker in workers:
        worker.feed()
    rows = []
    timed = in_turns([worker.time for worker in workers], seconds)
    for worker, runtime, own in zip(workers, runtimes, timed, strict=True):
        p25, median, p75 = (1e3 * float(q) for q in np.quantile(own, (0.25, 0.5, 0.75)))
        memory = {"memory": worker.memory()} if runtime.tells_memory else {}
        row = {"load": 1e3 * worker.load} | memory | {"p25": p25, "median": median, "p75": p75}
        rows.append(row | {"rounds": len(own)})
    return rows


def _instructions(workers, runtimes, seconds, npu):
    for worker in workers:
        worker.feed()
    return [{"load": worker.load, "instructions": worker.count()} for worker in workers]


def _cycles(workers, runtimes, seconds, npu):
    columns = ("cycles", "bytes_encoded", "npu_operators", "cpu_operators")
    return [{name: compiled[name] for name in columns} for compiled in (worker.compile(npu) for worker in workers)]


@dataclass(frozen=True)
class _Measure:
    """How something is measured, the column that a ratio compares, the unit, and how loading is shown."""

    take: Callable
    compares: str
    unit: str
    load: str = ",d"


_MEASURES = {  # by what a runtime counts
    "seconds": _Measure(_times, "median", "ms", ".2f"),
    "instructions": _Measure(_instructions, "instructions", "instructions"),
    "cycles": _Measure(_cycles, "cycles", "cycles"),
}


def _operators(file, model, runtime):
    with damaged(file):
        found = uses(model)
        counts = Counter(operator.name for subgraph in model.subgraphs for operator in subgraph.operators)
    for name, count in counts.items():
        own = [use for use in found if use.operator == name]
        sparse = sum(_skips_zeros(use, runtime) for use in own)
        row = {"file": os.path.basename(file), "operator": name, "count": count}
        yield row | {"ran_sparse": sparse, "stored_sparse": len(own) - sparse}


def _skips_zeros(use, runtime):
    # TFLite's sparse FullyConnected is on everywhere.
    return use.sparse and (use.operator == "FULLY_CONNECTED" or runtime.sparse_convolutions)


def _commands(files, threads):
    commands = [f"curl -LO {_BENCHMARK_MODEL}"]
    commands.append(f"adb push {_BENCHMARK_MODEL.rpartition('/')[2]} {_PHONE}/benchmark_model")
    commands.append(f"adb shell chmod +x {_PHONE}/benchmark_model")
    for number, file in enumerate(files):
        same = any(file.name == other.name for other in files[:number])
        name = re.sub(r"[^\w.-]", "_", file.stem + "_2" * same + file.suffix)
        commands.append(f"adb push {shlex.quote(str(file))} {_PHONE}/{name}")
        options = f"--num_threads={threads} --use_xnnpack=true --num_runs=100 --enable_op_profiling=true"
        commands.append(f"adb shell {_PHONE}/benchmark_model --graph={_PHONE}/{name} {options}")
    return commands
