"""A benchmark measures how long a .tflite file takes to load and to run on this machine."""

import os
import time

import numpy as np

from keras_sparse.quiet import quiet
from keras_sparse.reports import Report
from keras_sparse.tflite.flatmodel import read

__all__ = ["benchmark"]

_SECONDS = 1.0  # of measuring for each file
_ROUNDS = (20, 1000)  # at least, at most
_SHORTEST = 2e-4  # seconds: a round of a tiny model repeats it until the clock's own cost does not matter


def benchmark(path, baseline=None, threads=1):
    """Measure the latency of a .tflite file with ai-edge-litert on this machine, on random input of batch size 1.

    With a baseline the two files are run in turns, so that both meet the same load of the machine.

    Args:
        path: A .tflite file that you trust: it is run.
        baseline: Another one to compare with, such as the dense encoding of the same model.
        threads: Threads of the interpreter.

    Returns:
        A `Report`. Columns: `file`, `bytes`, `load` and the quartiles `p25`, `median`, `p75` of the latency in
        milliseconds, `ratio` (median over the baseline's median; `None` without a baseline), `rounds`. Ratios here hold
        for this CPU: on x86 with AVX sparse convolutions run as dense ones.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is no valid .tflite file or cannot be run, or `threads` is no positive integer.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = ks.tflite.export(model, path)
    ...     report = ks.tflite.benchmark(path)
    >>> report.rows[0]["p25"] <= report.rows[0]["median"] <= report.rows[0]["p75"]
    True
    """
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"`threads` must be a positive integer. Received: threads={threads!r}")
    runs = [_Run(file, threads) for file in ([baseline] if baseline is not None else []) + [path]]
    with quiet():
        _interleave(runs)
    rows = [run.row(runs[0] if baseline is not None else None) for run in runs]
    formats = dict.fromkeys(("load", "p25", "median", "p75"), ".4f") | {"ratio": ".2f", "bytes": ",d"}
    totals = {"threads": threads, "unit": "ms", "runtime": "ai-edge-litert, this machine's CPU"}
    return Report("Latency", rows, totals, formats=formats)


class _Run:
    """One file, loaded, with the times that it took."""

    def __init__(self, path, threads):
        from ai_edge_litert.interpreter import Interpreter

        self.path = os.fspath(path)
        self.bytes = read(self.path).bytes  # a damaged file raises here, before native code meets it
        self.times = []
        try:
            with quiet():
                start = time.perf_counter()
                self._interpreter = Interpreter(model_path=self.path, num_threads=threads)
                self._interpreter.allocate_tensors()
                self.load = time.perf_counter() - start
                self._feed()
                self._interpreter.invoke()
                self._repeats = 1
                self._repeats = max(1, min(1000, round(_SHORTEST / self._round())))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "The file cannot be run with ai-edge-litert on this machine. "
                f"Received: path={self.path!r} ({str(error).strip()[:300]})"
            ) from error

    def _feed(self):
        rng = np.random.default_rng(0)
        for detail in self._interpreter.get_input_details():
            dtype, shape = np.dtype(detail["dtype"]), detail["shape"]
            # 0 and 1 are valid for token numbers, masks and quantised inputs alike; time does not depend on the values
            values = rng.normal(size=shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
            self._interpreter.set_tensor(detail["index"], values.astype(dtype))

    def _round(self):
        start = time.perf_counter()
        for _ in range(self._repeats):
            self._interpreter.invoke()
        return (time.perf_counter() - start) / self._repeats

    def measure(self):
        self.times.append(self._round())

    def row(self, baseline):
        p25, median, p75 = (float(1e3 * q) for q in np.quantile(self.times, (0.25, 0.5, 0.75)))
        return {
            "file": os.path.basename(self.path),
            "bytes": self.bytes,
            "load": 1e3 * self.load,
            "p25": p25,
            "median": median,
            "p75": p75,
            "ratio": None if baseline is None else float(np.median(self.times) / np.median(baseline.times)),
            "rounds": len(self.times),
        }


def _interleave(runs):
    end = time.perf_counter() + _SECONDS * len(runs)
    least, most = _ROUNDS
    for done in range(most):
        # The one that goes first finds the caches as the other left them: take turns.
        for run in runs if done % 2 else reversed(runs):
            run.measure()
        if done + 1 >= least and time.perf_counter() > end:
            return
