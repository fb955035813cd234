"""A worker is the program that runs one .tflite file in a process of its own and answers requests, one a line.

`keras_sparse.tflite.runtimes` starts it, as a script, under this Python or under one that an emulator runs: it knows
NumPy and ai-edge-litert alone, since keras_sparse need not be there, and importing Keras takes minutes under an
emulator. `worker.mjs` is the same program for LiteRT.js. Requests and answers are JSON objects; arrays travel in
files, as raw bytes.

What runs the file is an engine: LiteRT's interpreter, or the class `Engine` of the script that is named on the command
line (`compiled.py`, `micro.py`, `vela.py`), which stands alone, too. An engine loads a file and tells what it takes,
is given inputs, runs until the outputs are there, and hands these out.

A worker ends with the process that asks, even in the middle of a run.
"""

import contextlib
import importlib
import json
import os
import queue
import runpy
import select
import signal
import sys
import threading
import time

import numpy as np

with contextlib.suppress(ImportError):  # Windows
    import fcntl

__all__ = ["read_ahead", "serve"]

_OPEN = (32, 128, 512, 2048, 8192, 32768)  # sizes that are tried where the file leaves one open


def serve(requests, answers, engine=None, meanwhile=contextlib.nullcontext):
    """Answer each request, such as the line `{"do": "load", "path": "m.tflite", "threads": 1}`, with a line of JSON.

    Args:
        requests: Iterable of lines.
        answers: Where to write the answers: a text stream.
        engine: What runs the file; `None`: LiteRT's interpreter.
        meanwhile: Function that returns a context in which each request is worked at.

    Example:

    >>> import io
    >>> from keras_sparse.tflite.worker import serve
    >>> answers = io.StringIO()
    >>> serve(['{"do": "load", "path": "missing.tflite", "threads": 1}'], answers)
    >>> "error" in json.loads(answers.getvalue())
    True
    """
    session = _Session(engine or _Interpreter())
    for line in requests:
        request = json.loads(line)
        try:
            with meanwhile():
                answer = getattr(session, request.pop("do"))(**request)
        except MemoryError:
            answer = {"error": "out of memory"}
        except Exception as error:  # whatever the runtime's bindings raise goes to the process that asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class _Session:
    """The file that is loaded, and what can be asked of it: each method without underscore is a request."""

    def __init__(self, engine):
        self._engine = engine

    def load(self, path, threads):
        self._engine.prepare()
        before = _peak_memory()
        _mark()
        start = time.perf_counter()
        self._engine.load(path, threads)
        seconds = time.perf_counter() - start
        _mark()
        self._base = before
        return {**self._engine.describe(), "seconds": seconds}

    def feed(self, arrays, path):
        self._engine.set(_read(arrays, path))
        return {}

    def run(self, path):
        self._engine.run()
        return {"arrays": _write(self._engine.get(), path)}

    def stack(self, arrays, inputs, outputs, step):
        """Run on a stack of samples, `step` of them at a time: one request for many runs."""
        stacks, parts = _read(arrays, inputs), []
        for start in range(0, arrays[0]["shape"][0], step):
            self._engine.set({name: values[start : start + step] for name, values in stacks.items()})
            self._engine.run()
            parts.append(self._engine.get())
        return {"arrays": _write({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, outputs)}

    def compile(self, npu):
        """What a compiler says of the file for an NPU, where the engine is one."""
        return self._engine.compile(npu)

    def time(self, repeats):
        self._engine.run()  # the process that ran meanwhile left its own data in the caches
        start = time.perf_counter()
        for _ in range(repeats):
            self._engine.run()
        return {"seconds": (time.perf_counter() - start) / repeats}

    def count(self):
        self._engine.run()
        _mark()
        _mark()  # what lies between these two is the cost of the marks
        self._engine.run()
        _mark()
        return {}

    def memory(self):
        return {"bytes": max(0, _peak_memory() - self._base)}


class _Interpreter:
    """LiteRT's interpreter."""

    def prepare(self):
        importlib.import_module("ai_edge_litert.interpreter")  # this is no part of loading

    def load(self, path, threads):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=path, num_threads=threads)
        self._allocate()

    def describe(self):
        self._inputs = self._by_name("get_input_details")
        self._outputs = self._by_name("get_output_details")
        inputs = [
            {"name": name, "dtype": np.dtype(d["dtype"]).name, "shape": [int(n) for n in d["shape"]]}
            for name, d in self._inputs.items()
        ]
        scales = {
            name: [float(scale), int(zero_point)]
            for name, d in [*self._inputs.items(), *self._outputs.items()]
            for scale, zero_point in [d["quantization"]]
            if scale
        }
        opened = {
            name: [axis for axis, n in enumerate(d["shape_signature"]) if n < 0] for name, d in self._inputs.items()
        }
        return {"inputs": inputs, "outputs": list(self._outputs), "scales": scales, "open": opened}

    def _allocate(self):
        """Get the memory for the file's own sizes; where it leaves some open, besides the batch, for larger ones."""
        try:
            return self._interpreter.allocate_tensors()
        except RuntimeError as error:  # convolutions of one step, for instance, have none left
            refusal = error
        details = self._interpreter.get_input_details()
        opened = [d for d in details if any(n < 0 for n in d["shape_signature"][1:])]
        for size in _OPEN if opened else ():
            for d in opened:
                shape = [int(n) if n >= 0 else 1 if not axis else size for axis, n in enumerate(d["shape_signature"])]
                self._interpreter.resize_tensor_input(d["index"], shape)
            try:
                return self._interpreter.allocate_tensors()
            except RuntimeError:
                continue
        raise refusal

    def _by_name(self, get):
        """The inputs or outputs as the first signature calls them (one tensor may have several names), and the rest."""
        details = {int(detail["index"]): detail for detail in getattr(self._interpreter, get)()}
        found = {}
        for key in list(self._interpreter.get_signature_list())[:1]:
            for name, detail in getattr(self._interpreter.get_signature_runner(key), get)().items():
                if int(detail["index"]) in details:
                    found[name] = details[int(detail["index"])]
        known = {int(detail["index"]) for detail in found.values()}
        return found | {detail["name"]: detail for index, detail in details.items() if index not in known}

    def set(self, inputs):
        resized = False
        for name, values in inputs.items():
            detail = self._inputs[name]
            current = self._interpreter.get_input_details()
            shape = next(list(d["shape"]) for d in current if d["index"] == detail["index"])
            if shape != list(values.shape):
                self._interpreter.resize_tensor_input(detail["index"], list(values.shape), strict=True)
                resized = True
        if resized:
            self._interpreter.allocate_tensors()
        for name, values in inputs.items():
            self._interpreter.set_tensor(self._inputs[name]["index"], values)

    def run(self):
        self._interpreter.invoke()

    def get(self):
        return {name: self._interpreter.get_tensor(detail["index"]) for name, detail in self._outputs.items()}


def _read(arrays, path):
    """The arrays that the process that asks has written to a file: `{name: array}`."""
    return {
        a["name"]: np.fromfile(path, a["dtype"], int(np.prod(a["shape"])), offset=a["offset"]).reshape(a["shape"])
        for a in arrays
    }


def _write(values, path):
    """Write arrays to a file, and tell where each stands."""
    arrays, offset = [], 0
    with open(path, "wb") as file:
        for name, value in values.items():
            value = np.asarray(value)  # `ascontiguousarray` would give a single number an axis
            file.write(value.tobytes())
            arrays.append({"name": name, "dtype": value.dtype.name, "shape": value.shape, "offset": offset})
            offset += value.nbytes
    return arrays


def _mark():
    """Tell the emulator's counter (instructions.c) to write down where it stands: it watches for this system call."""
    if hasattr(os, "getppid"):
        os.getppid()


def _peak_memory():
    """Bytes of memory that this process has held at most."""
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _leash(requests):
    """While this holds, the process ends when the one at the other end of a pipe has ended.

    The kernel of Linux sees to it: native code may hold Python's lock for as long as it computes. It acts on anything
    that happens to the pipe, but the process that asks writes nothing before it has the answer.
    """
    flags = fcntl.fcntl(requests, fcntl.F_GETFL)
    fcntl.fcntl(requests, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(requests, fcntl.F_SETFL, flags | os.O_ASYNC)
    poll = select.poll()
    poll.register(requests, 0)
    if poll.poll(0):  # it has ended before
        _end()
    try:
        yield
    finally:
        fcntl.fcntl(requests, fcntl.F_SETFL, flags)


def _end():
    os.kill(os.getpid(), signal.SIGTERM)


def read_ahead(requests, seconds=None):
    """Yield the lines of a pipe; end the process as soon as they end, unless native code holds Python's lock.

    Args:
        requests: Iterable of lines.
        seconds: How long to wait for a line before there are no more; `None`: for ever.

    Example:

    >>> import itertools, threading
    >>> from keras_sparse.tflite.worker import read_ahead
    >>> open_still = itertools.chain(["a line"], iter(threading.Event().wait, None))
    >>> list(read_ahead(open_still, seconds=0.5))
    ['a line']
    """
    lines = queue.SimpleQueue()

    def read():
        for line in requests:
            lines.put(line)
        _end()

    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        while True:
            yield lines.get(timeout=seconds)


if __name__ == "__main__":
    # Native code may print: only answers go where the answers are read.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    script, *arguments = sys.argv[1:] or [None]
    runs = script and runpy.run_path(script)["Engine"](*arguments)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
        serve(sys.stdin, channel, runs, lambda: _leash(sys.stdin))
    else:
        serve(read_ahead(sys.stdin), channel, runs)
