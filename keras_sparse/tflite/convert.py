"""A conversion turns a built Keras model into the bytes of .tflite files, quietly and on every backend.

On the TensorFlow backend it runs in this process. On the others it runs in a fresh Python process under TensorFlow,
from the model saved as a temporary .keras file: `python -m keras_sparse.tflite.convert FOLDER`.
"""

import errno
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import astuple, dataclass, replace

import keras
import numpy as np

from keras_sparse.quiet import quiet
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.halves import halve
from keras_sparse.tflite.signatures import HALF, Input, output_names, signature

__all__ = ["Conversion", "ExportError", "convert", "first_line", "modules"]


class ExportError(ValueError):
    """A model was not exported: it cannot be converted, or the file does not compute what the model computes.

    Example:

    >>> import keras_sparse as ks
    >>> issubclass(ks.tflite.ExportError, ValueError)
    True
    """


@dataclass
class Conversion:
    """What a conversion made.

    Attributes:
        content: The file's bytes; weights are stored dense.
        fixed_batch: Whether the file takes a batch of 1 only, though the model takes any.

    Example:

    >>> Conversion(b"", fixed_batch=False).fixed_batch
    False
    """

    content: object
    fixed_batch: bool


def convert(model, called, quantize=None, samples=None, inference_type=None):
    """Convert a model to .tflite, with TensorFlow's converter and TFLite's built-in operators only.

    Args:
        model: A built Keras model, on any backend.
        called: Its `Signature`.
        quantize: `None`, `"float16"`, `"dynamic"` or `"int8"`.
        samples: For `"int8"`, what to calibrate with: a list of flat lists of arrays, one for each input, in
            batches of one sample or of the model's fixed size.
        inference_type: For `"int8"`, the type of inputs and outputs: `None` (float32), `"int8"` or `"uint8"`.

    Returns:
        A `Conversion`.

    Raises:
        ExportError: If the model cannot be converted.
        OSError: If the disk is full.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.signatures import signature
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> convert(model, signature(model)).content[4:8]
    b'TFL3'
    """
    if keras.config.backend() == "tensorflow":
        with quiet():
            return _convert_here(model, called, quantize, samples, inference_type)
    return _convert_elsewhere(model, called, quantize, samples, inference_type)


def _convert_here(model, called, quantize, samples, inference_type):
    if _computes_in_half(model):
        model = _in_float32(model)
    arguments = model, called, quantize, samples, inference_type
    try:
        return Conversion(_content(*arguments, batch=None), fixed_batch=False)
    except Exception as error:
        _raise_if_disk_full(error)
        # Recurrent layers need a fixed batch size: TFLite has no list of tensors of unknown shape.
        if all(leaf.shape[:1] != (None,) for leaf in called.inputs):
            raise _refusal(model.name, error) from error
    try:
        return Conversion(_content(*arguments, batch=1), fixed_batch=True)
    except Exception as error:
        _raise_if_disk_full(error)
        raise _refusal(model.name, error) from error


def _content(model, called, quantize, samples, inference_type, batch):
    import tensorflow as tf

    # TFLiteConverter.from_concrete_functions drops the weights of Keras 3 models (tensorflow 2.21): go by SavedModel.
    specs = []
    for leaf in called.inputs:
        size = batch if leaf.shape[0] is None else leaf.shape[0]
        specs.append(tf.TensorSpec([size, *leaf.shape[1:]], leaf.dtype, leaf.name))

    names = []

    def serve(*flat):
        outputs = called.call(model, flat)
        names[:] = output_names(outputs)
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    with tempfile.TemporaryDirectory(prefix="keras_sparse-") as folder:
        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint("serve", serve, input_signature=specs)
        archive.write_out(folder, verbose=False)
        if quantize == "int8":
            content = _calibrate_elsewhere(model, called, pathlib.Path(folder), samples, inference_type)
        elif quantize == "float16":
            content = halve(_converter(folder, None).convert())
        else:
            if quantize == "dynamic":
                _check_factors(model.name, _converter(folder, None).convert())
            content = _converter(folder, quantize).convert()
    return _in_order(content, [leaf.name for leaf in called.inputs], names)


def _in_order(content, inputs, outputs):
    """The file with its inputs and outputs in the model's order: the converter has one of its own (by name)."""
    file = File(content)
    graph, signature = file.model.subgraphs[0], file.model.signatureDefs[0]
    changed = False
    for kind, names in ("inputs", inputs), ("outputs", outputs):
        maps = sorted(getattr(signature, kind), key=lambda entry: names.index(entry.name.decode()))
        old = [int(n) for n in getattr(graph, kind)]
        new = [entry.tensorIndex for entry in maps]
        if len(new) > len(old):  # one tensor has several names
            new = list(dict.fromkeys(new))
        if sorted(new) == sorted(old) and new != old:
            setattr(graph, kind, new)
            setattr(signature, kind, maps)
            changed = True
    return file.pack() if changed else content


def _check_factors(name, content):
    """Refuse infinite factors, such as a constant that was folded into a kernel: the converter would crash on them."""
    for graph in read(content).subgraphs:
        for operator in graph.operators:
            factor = graph.tensors[operator.inputs[1]] if len(operator.inputs) > 1 else None
            if factor is None or not re.search("CONV|MATMUL|FULLY_CONNECTED", operator.name):
                continue
            # In a float file the converter writes the largest number for infinity.
            if factor.stored is not None and not (np.abs(factor.values()) < np.finfo("float32").max).all():
                raise ExportError(
                    f"The model {name!r} cannot be stored in 8 bits: it multiplies with a constant that is NaN or "
                    f"infinite. Received: {factor.name!r}"
                )


def _converter(folder, quantize):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    # Without this flag a model with state, such as a seed generator, needs operators that phones lack.
    converter.experimental_enable_resource_variables = True
    converter.optimizations = [tf.lite.Optimize.DEFAULT] if quantize else []
    return converter


def _calibrate_elsewhere(model, called, folder, samples, inference_type):
    """Convert to int8 in a process of its own: calibration may end it (that of an LSTM does, tensorflow 2.21)."""
    arrays = {f"{i}_{j}": array for i, batch in enumerate(samples) for j, array in enumerate(batch)}
    np.savez(folder / "samples.npz", **arrays)
    job = {"calibrate": [leaf.name for leaf in called.inputs], "name": model.name, "inference_type": inference_type}
    (folder / "job.json").write_text(json.dumps(job))
    _run_elsewhere(model, folder)
    return (folder / "model.tflite").read_bytes()


def _calibrated(folder, job):
    import tensorflow as tf

    names = job["calibrate"]
    with np.load(folder / "samples.npz") as file:
        samples = dict(file)
    converter = _converter(folder, "int8")
    converter.representative_dataset = lambda: (
        {name: samples[f"{i}_{j}"] for j, name in enumerate(names)} for i in range(len(samples) // len(names))
    )
    if job["inference_type"] is not None:
        converter.inference_input_type = converter.inference_output_type = tf.as_dtype(job["inference_type"])
    try:
        return Conversion(converter.convert(), fixed_batch=False)
    except Exception as error:
        _raise_if_disk_full(error)
        raise _refusal(job["name"], error) from error


def _computes_in_half(layer):
    return layer.compute_dtype in HALF or any(_computes_in_half(inner) for inner in getattr(layer, "layers", ()))


def _in_float32(model):
    """A copy of the model that computes in float32: TFLite's built-in operators do not compute in half precision."""
    with tempfile.TemporaryDirectory(prefix="keras_sparse-") as folder:
        source, target = os.path.join(folder, "half.keras"), os.path.join(folder, "single.keras")
        model.save(source)
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "config.json":
                    content = json.dumps(_float32_config(json.loads(content))).encode()
                new.writestr(name, content)
        policy = keras.config.dtype_policy()
        try:
            keras.config.set_dtype_policy("float32")  # for layers that a subclassed model makes in __init__
            return keras.saving.load_model(target, compile=False, safe_mode=False)
        except Exception as error:
            raise ExportError(
                f"TFLite does not compute in half precision, so the model {model.name!r} must be rebuilt in float32, "
                "and loading its saved form failed. Make it savable (`get_config`, registered classes), or build it "
                f"under the policy 'float32' and copy the weights. Received: policy {model.dtype_policy.name!r} "
                f"({first_line(error)})"
            ) from error
        finally:
            keras.config.set_dtype_policy(policy)


def _float32_config(config):
    if isinstance(config, list):
        return [_float32_config(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _float32_config(value) for key, value in config.items()}
    if isinstance(config.get("dtype"), str):
        config["dtype"] = HALF.get(config["dtype"], config["dtype"])
    if config.get("class_name") == "DTypePolicy":
        name = config["config"]["name"]
        config["config"] = {"name": HALF.get(name, name)}
    return config


def _convert_elsewhere(model, called, quantize, samples, inference_type):
    with tempfile.TemporaryDirectory(prefix="keras_sparse-") as folder:
        folder = pathlib.Path(folder)
        with quiet():
            model.save(folder / "model.keras")
        found = modules(folder / "model.keras")
        if "__main__" in found:
            raise ExportError(
                f"On the {keras.config.backend()} backend the model is converted in another Python process, and that "
                f"cannot find a class which is defined in `__main__`, the script or notebook itself. Move it to a "
                f"module and import it from there. Received: {found['__main__']!r}"
            )
        job = {
            "modules": sorted(found),
            "inputs": [astuple(leaf) for leaf in called.inputs],  # saving a model may change the names of its inputs
            "quantize": quantize,
            "samples": len(samples or []),
            "inference_type": inference_type,
        }
        for number, batch in enumerate(samples or []):
            np.savez(folder / f"samples_{number}.npz", *batch)
        (folder / "job.json").write_text(json.dumps(job))
        result = _run_elsewhere(model, folder)
        return Conversion((folder / "model.tflite").read_bytes(), result["fixed_batch"])


def _run_elsewhere(model, folder):
    """Do the job in a folder in another Python process, under TensorFlow; returns its result."""
    environment = os.environ | {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",  # the graphics card belongs to the caller
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
    }
    command = [sys.executable, "-m", "keras_sparse.tflite.convert", str(folder)]
    run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(
            f"The conversion process of the model {model.name!r} ended without a result. "
            + ("TensorFlow crashed; another `quantize` may work. " if run.returncode < 0 else "")
            + f"Received: exit status {run.returncode} ({last[:300]})"
        ) from None
    if "disk" in result:
        raise OSError(errno.ENOSPC, result["disk"])
    if "error" in result:
        raise ExportError(result["error"])
    return result


def modules(path, compiled=False):
    """Find the modules that must be imported before a .keras file can be loaded by another process.

    Args:
        path: Of a .keras file that this process has written.
        compiled: Whether its optimizer, losses and metrics are loaded, too.

    Returns:
        Dict from the name of a module to that of a class which it registers; `"__main__"` if nobody can import it.

    Example:

    >>> import os, tempfile, keras
    >>> from keras_sparse.tflite.convert import modules
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


def _main(folder):
    """Do the job that `folder/job.json` describes; leave `model.tflite` and `result.json` there."""
    folder = pathlib.Path(folder)
    job = json.loads((folder / "job.json").read_text())
    try:
        if "calibrate" in job:
            conversion = _calibrated(folder, job)
        else:
            conversion = _convert_saved(folder, job)
        (folder / "model.tflite").write_bytes(conversion.content)
        result = {"fixed_batch": conversion.fixed_batch}
    except ExportError as error:
        result = {"error": str(error)}
    except OSError as error:
        result = {"disk": str(error)}
    except Exception as error:
        result = {"error": f"The model cannot be converted ({first_line(error)})."}
    (folder / "result.json").write_text(json.dumps(result))


def _convert_saved(folder, job):
    for module in job["modules"]:
        importlib.import_module(module)
    try:
        # This file was written a moment ago from the caller's own model: its Lambda layers are the caller's own code.
        model = keras.saving.load_model(folder / "model.keras", compile=False, safe_mode=False)
    except Exception as error:
        reason = first_line(error)
        raise ExportError(f"The saved model cannot be loaded on the TensorFlow backend. ({reason})") from error
    samples = []
    for number in range(job["samples"]):
        with np.load(folder / f"samples_{number}.npz") as file:
            samples.append(list(file.values()))
    inputs = [Input(name, tuple(shape), dtype) for name, shape, dtype in job["inputs"]]
    called = replace(signature(model), inputs=inputs)
    return _convert_here(model, called, job["quantize"], samples, job["inference_type"])


def _raise_if_disk_full(error):
    if isinstance(error, OSError):
        raise error
    if re.search(r"No space left on device|File too large|Disk quota exceeded", str(error)):
        raise OSError(errno.ENOSPC, f"No space left for temporary files in {tempfile.gettempdir()!r}") from error


def _refusal(name, error):
    """What a user can act on, out of the converter's wall of text."""
    if isinstance(error, ExportError):
        return error
    missing = re.findall(r"^(?:TF Select|Custom) ops: *(.+)$", str(error), re.MULTILINE)
    if missing:
        operators = ", ".join(sorted({name.strip() for line in missing for name in line.split(",")}))
        reason = f"TFLite has no built-in operator for: {operators}. Replace the layer that uses it"
    else:
        reason = f"TensorFlow's converter gave up: {first_line(error)}"
    return ExportError(f"The model {name!r} cannot be converted to .tflite. {reason}.")


def first_line(error):
    """Type and essence of an error whose message is a wall of text.

    Example:

    >>> first_line(ValueError("no room" + chr(10) + "at the inn"))
    'ValueError: no room'
    """
    text = re.sub(r"loc\(.*?\)+: ?|<unknown>:0: |error: |\x1b\[\d*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    # Keras puts the layer first and what went wrong after it.
    text = " ".join(lines[:2]) if lines[0].startswith("Exception encountered") else lines[0]
    return f"{type(error).__name__}: {text[:300].rstrip('.')}"


if __name__ == "__main__":
    _main(sys.argv[1])
