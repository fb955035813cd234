"""A conversion turns a built Keras model into the bytes of .tflite files, quietly and on every backend.

On the TensorFlow backend it runs in this process. On the others it runs in a fresh Python process under TensorFlow,
from the model saved as a temporary .keras file: `python -m keras_sparse.tflite.convert FOLDER`. Calibration, which may
end its process, runs in one that is asked for one SavedModel after another: `python -m keras_sparse.tflite.convert`.
"""

import atexit
import contextlib
import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace

import keras

from keras_sparse import states
from keras_sparse.quiet import quiet
from keras_sparse.tflite import converter
from keras_sparse.tflite.encoding import fill
from keras_sparse.tflite.errors import ExportError, first_line, raise_if_disk_full, refusal
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import CALIBRATED, Conversion, Job
from keras_sparse.tflite.sizes import settle
from keras_sparse.tflite.worker import read_ahead

__all__ = ["convert"]

_MOST = 2**31 - 1  # bytes: the offsets of flatbuffers and protobuf have 32 bits with a sign
_WIDTH = 4  # bytes of a float32
_WAITS = 30.0  # seconds that a process waits for a next calibration


def convert(model, signature=None, quantize=None, samples=(), inference_type=None):
    """Convert a model to .tflite, with TensorFlow's converter and TFLite's built-in operators only.

    Zeros that loops begin with are not stored (`encoding.fill`), nor known sizes computed (`sizes.settle`).

    Args:
        model: A `Job`, which says all that follows; or a built Keras model, on any backend.
        signature: As in `Job`, and so are the others.
        quantize: Likewise.
        samples: Likewise.
        inference_type: Likewise.

    Returns:
        A `Conversion`.

    Raises:
        ExportError: If the model cannot be converted, or no file can hold it.
        OSError: If the disk is full.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> convert(Job(model)).content[4:8]
    b'TFL3'
    """
    job = model if isinstance(model, Job) else Job(model, signature, quantize, samples or (), inference_type)
    _check_size(job.model)
    if keras.config.backend() == "tensorflow":
        with quiet(), states.put_back(job.model, begin=True):  # as from a .keras file, which has no states either
            conversion = _convert_here(job)
    else:
        conversion = _convert_elsewhere(job)
    conversion = replace(conversion, content=fill(settle(conversion.content)))
    if job.quantize in CALIBRATED and not _holds_integers(conversion.content):
        raise ExportError(
            f"The converter found nothing in the model {job.name!r} that it can compute in integers of 8 bits: use "
            f"quantize='float16'. Received: quantize={job.quantize!r}"
        )
    return conversion


def _check_size(model):
    """Refuse a model that no file can hold, before the converter has worked on it for long."""
    size = sum(math.prod(weight.shape) * _WIDTH for weight in model.weights)
    if size > _MOST:
        raise ExportError(
            f"A .tflite file holds at most {_MOST:,} bytes (2 GB), and the weights of the model {model.name!r} take "
            f"{size:,} in float32, in which TensorFlow's converter writes them first, whatever `quantize` is. Remove "
            "channels (`ks.shrink`), or export parts of the model as files of their own."
        )


def _holds_integers(content):
    return any(tensor.dtype == "int8" for graph in read(content).subgraphs for tensor in graph.tensors)


def _convert_here(job):
    job = replace(job, model=converter.in_float32(job.model))
    open_batch = any(leaf.shape[:1] == (None,) for leaf in job.signature.inputs)
    # Recurrent layers need a fixed batch size: TFLite has no list of tensors of unknown shape.
    for batch in (None, 1) if open_batch else (None,):
        try:
            return Conversion(_content(job, batch), fixed_batch=batch is not None)
        except Exception as error:
            raise_if_disk_full(error)
            last = error
    raise refusal(job.name, last) from last


def _content(job, batch):
    with tempfile.TemporaryDirectory(prefix="keras_sparse-") as folder:
        saved, outputs = converter.save(job, folder, batch)
        # Calibration may end the process (that of an LSTM does, tensorflow 2.21).
        calibrates = job.quantize in CALIBRATED
        content = _convert_elsewhere(saved).content if calibrates else converter.to_tflite(saved)
    return converter.in_order(content, [leaf.name for leaf in job.signature.inputs], outputs)


def _convert_elsewhere(job):
    """Do the job in another Python process, under TensorFlow."""
    with tempfile.TemporaryDirectory(prefix="keras_sparse-") as folder:
        folder = pathlib.Path(folder)
        job.to_folder(folder)
        if job.is_saved:
            status, said = _Process.calibrate(folder)
        else:  # it may import code of the user's, which may be another the next time
            alone = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
            run = subprocess.run(_command(folder), **alone, env=_environment())
            status, said = run.returncode, run.stderr
        try:
            result = json.loads((folder / "result.json").read_text())
        except (OSError, ValueError):
            if status < 0:
                hint, last = "TensorFlow crashed; another `quantize` may work. ", f"signal {-status}"
                if job.quantize in CALIBRATED:
                    hint = "TensorFlow crashed, as it does on calibrating recurrent layers: use quantize='dynamic'. "
            else:
                hint, last = "", (said.strip().splitlines() or ["no message"])[-1][:300]
            raise ExportError(
                f"The conversion process of the model {job.name!r} ended without a result. {hint}"
                f"Received: exit status {status} ({last})"
            ) from None
        if "disk" in result:
            raise OSError(errno.ENOSPC, result["disk"])
        if "error" in result:
            raise ExportError(result["error"])
        return Conversion((folder / "model.tflite").read_bytes(), result["fixed_batch"])


def _command(*arguments):
    return [sys.executable, "-m", "keras_sparse.tflite.convert", *map(str, arguments)]


def _environment():
    return os.environ | {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",  # the graphics card belongs to the caller
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
    }


class _Process:
    """A Python process that calibrates SavedModels; one is kept for the next, since TensorFlow takes long to start."""

    kept = None

    def __init__(self):
        self.owner, self.errors = os.getpid(), tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.popen = subprocess.Popen(_command(), **pipes, text=True, env=_environment())

    @classmethod
    def calibrate(cls, folder):
        """Do the job in a folder. Returns the exit status of a new process that it ended, else 0, and its words."""
        process, cls.kept = cls.kept, None
        if process is not None and process.owner != os.getpid():
            process = None  # of the process that this one was forked from
        while True:
            new = process is None
            if new:
                process = cls()
            try:
                if process.does(folder):
                    process, cls.kept = cls.kept, process
                    return 0, ""
                status = process.popen.wait()
                process.errors.seek(0)
                said = process.errors.read()
            finally:  # of an interrupt as well
                if process is not None:
                    process.end()
            if new:
                return status, said
            process = None  # it had ceased to wait, or was ended while it did

    def does(self, folder):
        """Whether it has done the job, and not ended before."""
        try:
            print(folder, file=self.popen.stdin, flush=True)
        except OSError:
            return False
        return self.popen.stdout.readline() == "done\n"

    def end(self):
        """End it, if it is a process of this one's."""
        if self.owner == os.getpid():
            self.popen.kill()
            self.popen.wait()
            with contextlib.suppress(OSError):  # what it has not read
                self.popen.stdin.close()
            self.popen.stdout.close()
            self.errors.close()

    @classmethod
    def end_kept(cls):
        """End the one that waits."""
        if cls.kept is not None:
            cls.kept.end()


atexit.register(_Process.end_kept)


def _serve():
    """Do the jobs in the folders that are asked for, until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TensorFlow prints is no answer
    for line in read_ahead(sys.stdin, _WAITS):
        _main(line.rstrip("\n"))
        print("done", file=answers, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # at once: a thread reads on


def _main(folder):
    """Do the job in a folder; leave `model.tflite` and `result.json` there."""
    folder = pathlib.Path(folder)
    try:
        job = Job.from_folder(folder)
        conversion = _convert_saved(job) if job.is_saved else _convert_here(job)
        (folder / "model.tflite").write_bytes(conversion.content)
        result = {"fixed_batch": conversion.fixed_batch}
    except ExportError as error:
        result = {"error": str(error)}
    except OSError as error:
        result = {"disk": str(error)}
    except Exception as error:
        result = {"error": f"The model cannot be converted ({first_line(error)})."}
    (folder / "result.json").write_text(json.dumps(result))


def _convert_saved(job):
    try:
        return Conversion(converter.to_tflite(job), fixed_batch=False)
    except Exception as error:
        raise_if_disk_full(error)
        raise refusal(job.name, error) from error


if __name__ == "__main__":
    _main(*sys.argv[1:]) if sys.argv[1:] else _serve()
