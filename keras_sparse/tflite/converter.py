"""TensorFlow's converter makes a .tflite file of a model, by way of a SavedModel, in this process."""

import json
import os
import re
import tempfile
import zipfile
from dataclasses import replace

import keras
import numpy as np

from keras_sparse.tflite.biases import own_biases
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.errors import ExportError, first_line
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.halves import halve
from keras_sparse.tflite.job import CALIBRATED
from keras_sparse.tflite.signatures import HALF, output_names

__all__ = ["in_float32", "in_order", "save", "to_tflite"]


def save(job, folder, batch):
    """Write the model of a job as a SavedModel.

    Args:
        job: A `Job` of a Keras model.
        folder: Where to write it.
        batch: The batch size where the model's is open; `None` leaves it open.

    Returns:
        `(the same job of the SavedModel, names of its outputs)`.

    Example:

    >>> import tempfile, keras
    >>> from keras_sparse.tflite.converter import save
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     job, outputs = save(Job(model), folder, batch=None)
    >>> job.is_saved, outputs
    (True, ['output_0'])
    """
    import tensorflow as tf

    # TFLiteConverter.from_concrete_functions drops the weights of Keras 3 models (tensorflow 2.21): go by SavedModel.
    specs = []
    for leaf in job.signature.inputs:
        size = batch if leaf.shape[0] is None else leaf.shape[0]
        specs.append(tf.TensorSpec([size, *leaf.shape[1:]], leaf.dtype, leaf.name))

    names = []

    def serve(*flat):
        outputs = job.signature.call(job.model, flat)
        names[:] = output_names(outputs)
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    archive = keras.export.ExportArchive()
    archive.track(job.model)
    archive.add_endpoint("serve", serve, input_signature=specs)
    archive.write_out(folder, verbose=False)
    return replace(job, model=str(folder)), names


def to_tflite(job):
    """Convert a SavedModel; returns the bytes of the .tflite file.

    Args:
        job: A `Job` of a SavedModel. `"int8"` and `"int16x8"` calibrate in this process, which some models end.

    Raises:
        ExportError: If `"dynamic"` meets a constant that is infinite.

    Example:

    >>> import tempfile, keras
    >>> from keras_sparse.tflite.converter import save, to_tflite
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     job, _ = save(Job(model), folder, batch=None)
    ...     to_tflite(job)[4:8]
    b'TFL3'
    """
    import tensorflow as tf

    if job.quantize == "float16":
        return halve(_converter(job.model, None).convert())
    if job.quantize == "dynamic":
        _check_factors(job.name, _converter(job.model, None).convert())
    converter = _converter(job.model, job.quantize)
    if job.quantize == "int16x8":
        converter.target_spec.supported_ops = [
            tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        ]
    if job.quantize in CALIBRATED:
        names = [leaf.name for leaf in job.signature.inputs]
        converter.representative_dataset = lambda: (dict(zip(names, batch, strict=True)) for batch in job.samples)
    if job.inference_type is not None:
        converter.inference_input_type = converter.inference_output_type = tf.as_dtype(job.inference_type)
    content = converter.convert()
    return own_biases(content) if job.quantize in CALIBRATED else content


def _converter(folder, quantize):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    # Without this flag a model with state, such as a seed generator, needs operators that phones lack.
    converter.experimental_enable_resource_variables = True
    converter.optimizations = [tf.lite.Optimize.DEFAULT] if quantize else []
    return converter


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


def in_order(content, inputs, outputs):
    """Bring the inputs and outputs of a file into the model's order: the converter has one of its own (by name).

    Args:
        content: The file's bytes.
        inputs: Names of the inputs in the model's order.
        outputs: Of the outputs.

    Returns:
        The bytes of the new file; of the same, if nothing changed.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.converter import in_order
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    >>> content = convert(Job(keras.Model([a, b], keras.layers.Add()([a, b])))).content
    >>> graph = read(in_order(content, ["b", "a"], ["output_0"])).subgraphs[0]
    >>> [graph.tensors[n].name.split("_")[-1] for n in graph.inputs]
    ['b:0', 'a:0']
    """
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


def in_float32(model):
    """A copy of a model that computes in float32: TFLite's built-in operators do not compute in half precision.

    Args:
        model: A built Keras model.

    Returns:
        The copy, or the model itself if it does not compute in half precision.

    Raises:
        ExportError: If the model cannot be saved and loaded again.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.converter import in_float32
    >>> dense = keras.layers.Dense(3, dtype="mixed_float16")
    >>> in_float32(keras.Sequential([keras.Input((4,)), dense])).layers[-1].compute_dtype
    'float32'
    """
    if not _computes_in_half(model):
        return model
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


def _computes_in_half(layer):
    return layer.compute_dtype in HALF or any(_computes_in_half(inner) for inner in getattr(layer, "layers", ()))


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
