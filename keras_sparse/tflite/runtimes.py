"""A runtime is a program that runs .tflite files: it is found, started in a process of its own, and asked.

A .tflite file is run by native code, which a damaged file can crash or keep busy for ever. So it never runs in the
process of the caller, and what runs it has a limit of time and, on Linux, of memory.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading

import numpy as np

from keras_sparse.tflite.commands import RUNTIMES, RuntimeMissing, available, get
from keras_sparse.tflite.flatmodel import damaged, described, read

__all__ = ["RUNTIMES", "TIMEOUT", "RuntimeMissing", "Worker", "available", "run"]

TIMEOUT = 120.0  # seconds for one request
_MEMORY = 4 << 30  # bytes that a process may write to
_TYPES = {
    "float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
}  # fmt: skip
_OUTPUT = 1 << 30  # bytes that it may leave in one file


def run(file, inputs, runtime="native", threads=1, timeout=TIMEOUT):
    """Run a .tflite file on given inputs, in a process of its own.

    Args:
        file: Path of a .tflite file, or its content as bytes. It is run: use files that you trust.
        inputs: Dict from the name of each input, as the file's signature calls it, to an array; or a list of such
            dicts, which are run one after another. Arrays are converted to the input's type; `None` stands for random
            numbers.
        runtime: `"native"` (ai-edge-litert on this CPU), `"x86-no-avx"` (the same under `qemu-x86_64`, as a CPU without
            AVX), `"wasm"` (LiteRT.js in Node) or `"arm64"` (ai-edge-litert under `qemu-aarch64`). All but the first
            run XNNPACK's sparse kernels; so does the first on ARM. By LiteRT's `CompiledModel`: `"compiled-cpu"`,
            `"gpu"` (the GPU alone) and `"gpu-cpu"` (what the GPU refuses runs on the CPU, as most apps ask for).
            `"micro"` is TFLite Micro.
        threads: Threads of the interpreter.
        timeout: Seconds that loading the file and each run may take.

    Returns:
        Dict from the name of each output to an array; for a list of inputs, a list of dicts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no valid .tflite file, cannot be run, or does not take such inputs; if `runtime` or
            `threads` is none that exists.
        TypeError: If `inputs` is of another type.
        TimeoutError: If it took longer than `timeout`.
        RuntimeMissing: If the runtime is not installed; an `OSError`.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = ks.tflite.export(model, path)
    ...     outputs = ks.tflite.runtimes.run(path, {"x": [[1, 2, 3, 4]]})
    >>> outputs["output_0"].shape
    (1, 3)
    """
    many = isinstance(inputs, (list, tuple))
    with Worker(file, runtime, threads, timeout) as worker:
        outputs = []
        for each in inputs if many else [inputs]:
            worker.feed(each)
            outputs.append(worker.run())
    return outputs if many else outputs[0]


class Worker:
    """A process that has loaded one .tflite file: a context manager that ends with it.

    Args:
        file: Path of a .tflite file, or its content as bytes.
        runtime: One of `RUNTIMES`.
        threads: Threads of the interpreter.
        timeout: Seconds that each request may take.

    Attributes:
        inputs: List of `{"name", "dtype", "shape"}`: what the file takes, with an open batch size as 1.
        outputs: Names of its outputs.
        scales: `{name: (scale, zero point)}` of the inputs and outputs that are quantised: a stored integer `q` means
            `scale * (q - zero point)`. Empty on `"wasm"`, which does not tell.
        resizes: Whether it runs batches of any size, as files with an open batch size do but on `"wasm"`.
        load: Seconds that loading took, by the process's own clock; instructions where the runtime counts them.
        accelerated: Whether all of the file runs on the accelerator that was asked for; `None` where nobody tells.

    Raises:
        As `run`.

    Example:

    >>> from keras_sparse.tflite.runtimes import Worker
    >>> Worker(b"no model")
    Traceback (most recent call last):
    ...
    ValueError: Expected a .tflite file. ...
    """

    def __init__(self, file, runtime="native", threads=1, timeout=TIMEOUT):
        self._runtime = _checked(runtime, threads)
        self._what = described(file)
        # A damaged file should raise here, before native code meets it: that follows a sparse index wherever it leads.
        subgraphs = read(file).subgraphs
        with damaged(file):
            _ = [tensor.zeros for subgraph in subgraphs for tensor in subgraph.tensors]
        self._timeout, self._process = timeout, None
        self._late = False
        with contextlib.ExitStack() as stack:
            self._folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keras_sparse-")))
            if isinstance(file, bytes):
                (self._folder / "model.tflite").write_bytes(file)
                file = self._folder / "model.tflite"
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            stack.callback(self._end)
            self._start()
            loaded = self._ask("load", path=os.path.abspath(file), threads=threads)
            self.inputs = [leaf | {"shape": [max(1, n) for n in leaf["shape"]]} for leaf in loaded["inputs"]]
            self._open = loaded.get("open", {})  # axes of any size; LiteRT.js cannot resize
            self.resizes = any(0 in axes for axes in self._open.values())
            self._check_types(self.inputs)
            self.outputs = loaded["outputs"]
            self.accelerated = loaded.get("accelerated")
            self.scales = {name: tuple(scale) for name, scale in loaded.get("scales", {}).items()}
            self.load = self._counts(-2) if self._runtime.counts == "instructions" else loaded["seconds"]
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def feed(self, inputs=None):
        """Set the inputs of the next runs: a dict from name to array, or `None` for random numbers of a fixed seed."""
        arrays = self._write(self._random() if inputs is None else inputs)
        self._ask("feed", arrays=arrays, path=str(self._folder / "inputs"))

    def fits(self, inputs):
        """Whether it takes a dict from the name of each input to an array: of the file's sizes, where none is open."""
        for leaf in self.inputs:
            shape, opened = inputs[leaf["name"]].shape, self._open.get(leaf["name"], [])
            if len(shape) != len(leaf["shape"]):
                return False
            sizes = enumerate(zip(shape, leaf["shape"], strict=True))
            if any(given != size and axis not in opened for axis, (given, size) in sizes):
                return False
        return True

    def run(self):
        """Run once: a dict from the name of each output to an array."""
        path = self._folder / "outputs"
        return self._read(self._ask("run", path=str(path)), path)

    def predict(self, inputs):
        """Run on many samples, as many at a time as the file is made for: a phone's one, if the batch size is open.

        Args:
            inputs: Dict from the name of each input to an array with the samples along its first axis.

        Returns:
            Dict from the name of each output to an array, likewise. Not on `"wasm"`.
        """
        self._check_size()
        step = self.inputs[0]["shape"][0] if self.inputs and self.inputs[0]["shape"] else 1
        count = len(next(iter(inputs.values()))) if inputs else 0
        filled = {name: _fill(np.asarray(values), -count % step) for name, values in inputs.items()}
        arrays = self._write(filled)
        path = self._folder / "outputs"
        answer = self._ask("stack", arrays=arrays, inputs=str(self._folder / "inputs"), outputs=str(path), step=step)
        return {name: values[:count] for name, values in self._read(answer, path).items()}

    def _write(self, inputs):
        """Write arrays to a file for the process, and tell where each stands."""
        if not isinstance(inputs, dict):
            raise TypeError(
                "`inputs` must be a dict from the name of each input to an array, or a list of such dicts. "
                f"Received: {type(inputs).__name__}"
            )
        known = {leaf["name"]: leaf for leaf in self.inputs}
        if set(inputs) != set(known):
            raise ValueError(
                f"`inputs` must hold an array for each input of the file: {sorted(known)}. Received: {sorted(inputs)}"
            )
        arrays, offset = [], 0
        with open(self._folder / "inputs", "wb") as file:
            for name, values in inputs.items():
                leaf = known[name]
                values = np.asarray(values).astype(leaf["dtype"])
                free = [0, *self._open.get(name, [])] if self._runtime.resizes else []
                wanted = [None if axis in free else n for axis, n in enumerate(leaf["shape"])]
                fits = len(wanted) == values.ndim and all(
                    n in (None, m) for n, m in zip(wanted, values.shape, strict=True)
                )
                if not fits:
                    shape = str(tuple(wanted)).replace("None", "any")
                    raise ValueError(
                        f"The input {name!r} takes arrays of shape {shape} on the runtime {self._runtime.name!r}. "
                        f"Received: an array of shape {values.shape}"
                    )
                file.write(values.tobytes())
                arrays.append({"name": name, "dtype": leaf["dtype"], "shape": list(values.shape), "offset": offset})
                offset += values.nbytes
        return arrays

    def _read(self, answer, path):
        outputs = {}
        self._check_types(answer["arrays"])
        for array in answer["arrays"]:
            count = int(np.prod(array["shape"]))
            values = np.fromfile(path, array["dtype"], count, offset=array["offset"])
            outputs[array["name"]] = values.reshape(array["shape"])
        return outputs

    def time(self, repeats=1):
        """Run `repeats` times, and once before: seconds for each."""
        return self._ask("time", repeats=repeats)["seconds"]

    def count(self):
        """Instructions of one run, exactly, where the runtime counts them."""
        self._ask("count")
        return self._counts(-2) - self._counts(-3)

    def memory(self):
        """Bytes that loading and running the file added to the most that the process has held. Not on `"wasm"`."""
        return self._ask("memory")["bytes"]

    def compile(self, npu):
        """What a compiler says of the file for an NPU, a dict, where the runtime is one: see `vela.Engine.compile`."""
        return self._ask("compile", npu=npu)

    def _check_size(self):
        size = sum(float(np.prod(leaf["shape"], dtype=float)) * 8 for leaf in self.inputs)
        if size > _OUTPUT:
            raise ValueError(f"The file takes more than {_OUTPUT >> 30} GiB of inputs. Received: {self._what}")

    def _check_types(self, tensors):
        others = sorted({tensor["dtype"] for tensor in tensors} - _TYPES)
        if others:
            raise ValueError(f"Only numbers can be passed to a file and back. Received: {self._what} with {others}")

    def _counts(self, position):
        counts = [int(line) for line in (self._folder / "counts").read_text().split()]
        return counts[position + 1] - counts[position]

    def _random(self):
        self._check_size()
        rng = np.random.default_rng(0)
        inputs = {}
        for leaf in self.inputs:
            # 0 and 1 are valid for token numbers, masks and quantised inputs alike; time does not depend on the values
            floats = leaf["dtype"].startswith("float")
            inputs[leaf["name"]] = rng.normal(size=leaf["shape"]) if floats else rng.integers(0, 2, leaf["shape"])
        return inputs

    def _start(self):
        line, environment = self._runtime.start(self._folder)
        self._process = subprocess.Popen(
            line,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        if sys.platform == "linux":
            import resource

            with contextlib.suppress(OSError):  # it may have ended already
                for kind, size in ("RLIMIT_DATA", _MEMORY), ("RLIMIT_FSIZE", _OUTPUT), ("RLIMIT_CORE", 0):
                    resource.prlimit(self._process.pid, getattr(resource, kind), (size, size))

    def _end(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _ask(self, what, **request):
        timer = threading.Timer(self._timeout, self._kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": what, **request}).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline(1 << 24))
        except (BrokenPipeError, OSError, ValueError):
            answer = {"error": self._why_it_ended()}
        finally:
            timer.cancel()
        if self._late:
            raise TimeoutError(f"The file took longer than {self._timeout:g} seconds. Received: {self._what}")
        if "error" in answer:
            if self._runtime.absent and re.search(self._runtime.absent, self._said()):
                raise RuntimeMissing(self._runtime.install)
            reason = " ".join(f"{self.objections()} {answer['error']}".split())[:300]
            raise ValueError(
                f"The file cannot be run on the runtime {self._runtime.name!r}. Received: {self._what} ({reason})"
            )
        return answer

    def _kill(self):
        self._late = True
        self._process.kill()

    def _why_it_ended(self):
        status = self._process.wait()
        lines = self._said()[-2000:].strip().splitlines()
        if status < 0:
            died = f"the process was ended by {signal.Signals(-status).name}"
        else:
            died = f"the process ended with exit status {status}"
        return f"{died}: {lines[-1]}" if lines else died

    def objections(self):
        """What the process has printed of operators that it does not take, in a line."""
        told = re.findall(self._runtime.says, self._said(), re.MULTILINE) if self._runtime.says else []
        return " ".join(" ".join(dict.fromkeys(told[:3])).split())

    def _said(self):
        """The end of what the process has printed."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 20_000))
        return self._errors.read().decode(errors="replace")


def _fill(values, missing):
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing else values


def _checked(runtime, threads):
    runtime = get(runtime)
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"`threads` must be a positive integer. Received: threads={threads!r}")
    if runtime.max_threads is not None and threads > runtime.max_threads:
        raise ValueError(
            f"`threads` must be at most {runtime.max_threads} on the runtime {runtime.name!r}. Received: "
            f"threads={threads!r}"
        )
    return runtime
