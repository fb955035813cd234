"""A job is a conversion to be done: the model, how it is called, and the file that is wanted.

It can be written to a folder, where another process finds it.
"""

import importlib
import json
import pathlib
import zipfile
from dataclasses import astuple, dataclass, replace

import keras
import numpy as np

from keras_sparse.quiet import quiet
from keras_sparse.tflite import signatures
from keras_sparse.tflite.errors import ExportError, first_line
from keras_sparse.tflite.signatures import Input, Signature

__all__ = ["CALIBRATED", "INTEGERS", "QUANTIZE", "Conversion", "Job", "modules"]

QUANTIZE = (None, "float16", "dynamic", "int8", "int16x8")  # how numbers may be stored, and computed with
INTEGERS = ("dynamic", "int8", "int16x8")  # of these, those with weights of 8 bits
CALIBRATED = {"int8": 2**8, "int16x8": 2**16}  # and those that compute in integers: steps of an activation's range


@dataclass
class Conversion:
    """What a conversion made.

    Attributes:
        content: The file's bytes; weights are stored dense.
        fixed_batch: Whether the file takes a batch of 1 only, though the model takes any.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> inputs = keras.Input((5, 4))
    >>> convert(Job(keras.Model(inputs, keras.layers.LSTM(3)(inputs)))).fixed_batch
    True
    """

    content: bytes
    fixed_batch: bool


@dataclass
class Job:
    """A conversion to be done.

    Attributes:
        model: A built Keras model on any backend, or the path of a SavedModel that was made of one.
        signature: Its `Signature`; `None`: what the Keras model itself says.
        quantize: One of `QUANTIZE`.
        samples: Inputs as the model will meet them: a list of flat lists of arrays, one for each input. For `"int8"`
            and `"int16x8"`, which calibrate with them, in batches of one sample or of the model's fixed size.
        inference_type: For these, the type of inputs and outputs: `None` (float32), or the integers that they compute
            in (`"uint8"` for `"int8"`, too).
        name: The model's name, for messages; `None`: what the Keras model itself says.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.job import Job
    >>> job = Job(keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3)]), quantize="float16")
    >>> job.signature.inputs
    [Input(name='x', shape=(None, 4), dtype='float32')]
    """

    model: object
    signature: Signature | None = None
    quantize: str | None = None
    samples: list = ()
    inference_type: str | None = None
    name: str | None = None

    def __post_init__(self):
        self.signature = self.signature or signatures.signature(self.model)
        self.name = self.name or self.model.name

    @property
    def is_saved(self):
        """Whether the model is a SavedModel."""
        return isinstance(self.model, str)

    def to_folder(self, folder):
        """Write all of the job to a folder.

        Raises:
            ExportError: If no other process can load the model, because one of its classes is defined in `__main__`.
        """
        folder, found = pathlib.Path(folder), {}
        if not self.is_saved:
            with quiet():
                self.model.save(folder / "model.keras")
            found = modules(folder / "model.keras")
        if "__main__" in found:
            raise ExportError(
                f"On the {keras.config.backend()} backend the model is converted in another Python process, and that "
                f"cannot find a class which is defined in `__main__`, the script or notebook itself. Move it to a "
                f"module and import it from there. Received: {found['__main__']!r}"
            )
        arrays = {f"{i}_{j}": array for i, batch in enumerate(self.samples) for j, array in enumerate(batch)}
        np.savez(folder / "samples.npz", **arrays)
        record = {
            "model": self.model if self.is_saved else None,
            "modules": sorted(found),
            "inputs": [astuple(leaf) for leaf in self.signature.inputs],  # saving may change the names of a model's own
            "quantize": self.quantize,
            "inference_type": self.inference_type,
            "name": self.name,
        }
        (folder / "job.json").write_text(json.dumps(record))

    @classmethod
    def from_folder(cls, folder):
        """Read a job that another process has written.

        Raises:
            ExportError: If its model cannot be loaded on this backend.
        """
        folder = pathlib.Path(folder)
        record = json.loads((folder / "job.json").read_text())
        inputs = [Input(name, tuple(shape), dtype) for name, shape, dtype in record["inputs"]]
        with np.load(folder / "samples.npz") as file:
            arrays = dict(file)
        step = len(inputs)
        samples = [[arrays[f"{i}_{j}"] for j in range(step)] for i in range(len(arrays) // step)] if arrays else []
        model = record["model"]
        if model is None:
            for module in record["modules"]:
                importlib.import_module(module)
            model = _load(folder / "model.keras")
            signature = replace(signatures.signature(model), inputs=inputs)
        else:
            signature = Signature(inputs, structure=None, keywords=False, typed=True)
        return cls(model, signature, record["quantize"], samples, record["inference_type"], record["name"])


def _load(path):
    try:
        # This file was written a moment ago from the caller's own model: its Lambda layers are the caller's own code.
        return keras.saving.load_model(path, compile=False, safe_mode=False)
    except Exception as error:
        reason = first_line(error)
        raise ExportError(f"The saved model cannot be loaded on the TensorFlow backend. ({reason})") from error


def modules(path, compiled=False):
    """Find the modules that must be imported before a .keras file can be loaded by another process.

    Args:
        path: Of a .keras file that this process has written.
        compiled: Whether its optimizer, losses and metrics are loaded, too.

    Returns:
        Dict from the name of a module to that of a class which it registers; `"__main__"` if nobody can import it.

    Example:

    >>> import os, tempfile, keras
    >>> from keras_sparse.tflite.job import modules
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.keras")
    ...     keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(path)
    ...     modules(path)
    {}
    """
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    if not compiled:
        config.pop("compile_config", None)
    registered = keras.saving.get_custom_objects()
    found, pending = {}, [config]
    while pending:
        item = pending.pop()
        if isinstance(item, (list, dict)):
            pending.extend(item.values() if isinstance(item, dict) else item)
        if not isinstance(item, dict) or not isinstance(item.get("class_name"), str):
            continue
        name = item["config"] if item["class_name"] == "function" else item.get("registered_name")
        known, module = registered.get(name), item.get("module")
        if known is not None:
            module = known.__module__
        elif module is None and name is not None:
            module = "__main__"  # Keras omits it for a class that is neither registered nor importable
        if module and module.split(".")[0] not in ("keras", "builtins"):
            found[module] = name or item["class_name"]
    return found
