"""A verification of any .tflite file, whoever wrote it: the same numbers as its model, on an accelerator of choice."""

import os

import numpy as np

from keras_sparse.registry import did_you_mean
from keras_sparse.reports import Report
from keras_sparse.tflite import signatures
from keras_sparse.tflite.acceptance import accepted
from keras_sparse.tflite.commands import RUNTIMES
from keras_sparse.tflite.flatmodel import UNPACK, read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.parity import KnownOutputs, Reference
from keras_sparse.tflite.rounding import TOLERANCE, allowed
from keras_sparse.tflite.runtimes import Worker
from keras_sparse.tflite.samples import in_batches_of, representative_batches
from keras_sparse.tflite.targets import NOT_SPARSE
from keras_sparse.tflite.verification import NEAR, allowed_elsewhere, precision

__all__ = ["ACCELERATORS", "VerifyReport", "coarsest", "reference_of_file", "verify"]

# What people call the runtimes that apps use, and the names of all that run files.
_HERE = RUNTIMES["native"]
ACCELERATORS = {"cpu": _HERE, "gpu": RUNTIMES["gpu-cpu"]}
ACCELERATORS |= {name: runtime for name, runtime in RUNTIMES.items() if runtime.runs and name not in ACCELERATORS}
_SAMPLES = 4


class VerifyReport(Report):
    """How far a file's outputs are from its model's, on one accelerator.

    Attributes:
        right: Whether they are within the tolerance.
        parity: Largest absolute difference.
        parity_relative: The same, relative to the largest magnitude of the output.
        accelerated: Whether all of the file ran on the accelerator; `None` where nobody tells.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = ks.tflite.export(model, path)
    ...     report = ks.tflite.verify(path, model)
    >>> report.right, report.parity_relative < 1e-5
    (True, True)
    """

    def __init__(self, title, totals, notes):
        super().__init__(title, [], totals, notes, dict.fromkeys(("parity", "parity_relative", "tolerance"), ".1e"))
        for name in ("right", "parity", "parity_relative", "accelerated"):
            setattr(self, name, totals[name])


def verify(path, model, accelerator="cpu", data=None, tolerance=None):
    """Compare any .tflite file with its model: also one that `model.export`, a quantizer or a colleague wrote.

    The file is run in a process of its own, with bounded time and memory.

    Args:
        path: The file.
        model: What it should compute: a built Keras model, the path of a .keras file, or that of another .tflite file
            with the same inputs and outputs, which is run on this machine's CPU.
        accelerator: `"cpu"`; `"gpu"`, with the CPU behind it as most apps ask for; or a name of `ks.tflite.runtimes`
            that runs files, such as `"wasm"`, `"micro"`, `"x86-no-avx"`.
        data: Inputs as the model will meet them, in any form that `fit` takes, if `model` is a Keras model; `None`:
            random ones.
        tolerance: How far an output may be from the model's, relative to its largest magnitude; `None`: what its
            type of weights costs, 1e-3 for float32, and for fewer bits a few times of what rounding does to the outputs
            of this model; on other accelerators than the CPU at most 5 %, or twice of what it is off on this machine's
            CPU. Files of integers are allowed up to 40 % where `data` is `None`, or `model` a file: random inputs may
            be beyond what they were calibrated for.

    Returns:
        A `VerifyReport`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no .tflite file, cannot be run on the accelerator, or does not fit the model; if
            `accelerator` is none.
        RuntimeMissing: If the accelerator's runtime is not installed; an `OSError` that says what to install.
        TimeoutError: If it takes too long.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = model.export(path, format="litert", verbose=False)
    ...     right = ks.tflite.verify(path, model).right
    ...     _ = model.layers[0].bias.assign([1.0, 2.0, 3.0])
    ...     still = ks.tflite.verify(path, model).right
    >>> right, still
    (True, False)
    """
    if not isinstance(accelerator, str) or accelerator not in ACCELERATORS:
        names = ", ".join(map(repr, ACCELERATORS))
        hint = did_you_mean(accelerator, ACCELERATORS)
        raise ValueError(f"`accelerator` must be one of {names}. Received: accelerator={accelerator!r}{hint}")
    runtime, flat = ACCELERATORS[accelerator], read(path)
    content = flat.content
    reference = _reference(content, model, data)
    parity = reference.compare_on(runtime.name, content)
    limit = tolerance
    if tolerance is None:
        limit = _limit(flat, model, reference, data)
        if runtime.name != _HERE.name and limit > TOLERANCE["float32"]:
            limit = max(limit, TOLERANCE[runtime.precision])
            if limit > NEAR:  # a smaller one holds wherever the file runs
                limit = allowed_elsewhere(limit, reference.compare_on(_HERE.name, content))
    notes = []
    if flat.is_sparse:
        notes.append(f"{NOT_SPARSE}.")
    if parity.accelerated is False:
        notes.append("In part on the CPU: the accelerator does not take all of its operators.")
    right = bool(parity.relative <= limit)
    if not right:
        notes.append(f"Wrong: output {parity.worst!r} differs by {parity.relative:.3g} of its magnitude.")
        if tolerance is None and parity.relative <= TOLERANCE[coarsest(flat)]:
            notes.append(
                f"Rounding its weights would explain {limit:.2g}. Inputs of very different sizes can make more of "
                "it in 8 bits: if you know that they do, allow it with `tolerance`."
            )
    totals = {
        "runtime": runtime.title,
        "right": right,
        "parity": parity.absolute,
        "parity_relative": parity.relative,
        "tolerance": limit,
        "accelerated": parity.accelerated,
    }
    return VerifyReport(f"{os.path.basename(path)} on {runtime.title}", totals, notes)


def reference_of_file(content, other):
    """What another file computes on this machine's CPU from random inputs, a `Reference` to compare `content` with.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.verify import reference_of_file
    >>> content = convert(Job(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))).content
    >>> reference_of_file(content, content).compare_on("native", content).relative
    0.0
    """
    rng, inputs, outputs = np.random.default_rng(0), [], []
    with Worker(other) as worker, Worker(content) as taken:
        if [leaf["shape"] for leaf in worker.inputs] != [leaf["shape"] for leaf in taken.inputs]:
            raise ValueError(
                "The reference must take the same inputs as the file. Received: shapes "
                f"{[leaf['shape'] for leaf in worker.inputs]} and {[leaf['shape'] for leaf in taken.inputs]}"
            )
        for _ in range(_SAMPLES):
            drawn = {leaf["name"]: _drawn(rng, leaf) for leaf in worker.inputs}
            worker.feed(drawn)
            found = worker.run()
            scales = worker.scales
            inputs.append({name: _real(values, scales.get(name)) for name, values in drawn.items()})
            outputs.append({name: _real(values, scales.get(name)) for name, values in found.items()})
    return KnownOutputs("the reference", inputs, outputs)


def _drawn(rng, leaf):
    if leaf["dtype"].startswith("float"):
        return rng.normal(size=leaf["shape"]).astype(leaf["dtype"])
    narrow = leaf["dtype"] in ("int8", "uint8")
    return rng.integers(0, 100 if narrow else 2, leaf["shape"]).astype(leaf["dtype"])


def _real(values, scale):
    return values if scale is None else scale[0] * (values.astype("float64") - scale[1])


def _reference(content, model, data):
    if isinstance(model, (str, os.PathLike)) and os.fspath(model).endswith(".tflite"):
        read(model)
        return reference_of_file(content, os.fspath(model))
    model = accepted(model)
    signature = signatures.signature(model)
    batches = random_batches(model, signature) if data is None else representative_batches(data, signature)
    with Worker(content) as worker:
        size = worker.inputs[0]["shape"][0] if worker.inputs and worker.inputs[0]["shape"] else 1
        resizes = worker.resizes
    fixed = signature.inputs[0].shape[0]
    batches = (
        batches if fixed is not None or (resizes and data is None) else in_batches_of(size, batches)[: 2 * _SAMPLES]
    )
    return Reference(model, signature, batches)


def _limit(flat, model, reference, data):
    """How far a right file may be from the model's outputs."""
    kind = coarsest(flat)
    if kind == "int8":
        kind = _arithmetic(flat)
        if data is None and kind != "dynamic":  # random inputs may be beyond what it was calibrated for
            return TOLERANCE["int8"]
    if isinstance(reference, KnownOutputs):
        return TOLERANCE[kind]
    return max(TOLERANCE[precision(accepted(model))], allowed(reference, kind))


def _arithmetic(flat):
    """How a file with weights of 8 bits computes, as `export` calls it."""
    computed = _computed(flat)
    return "int16x8" if "int16" in computed else "int8" if "int8" in computed else "dynamic"


def _computed(flat):
    """The types of all numbers that a file computes with and does not store."""
    return {
        graph.tensors[number].dtype
        for graph in flat.subgraphs
        for operator in graph.operators
        for number in (() if operator.name in UNPACK else operator.inputs)
        if number >= 0 and graph.tensors[number].stored is None
    }


def coarsest(flat):
    """The coarsest type of the weights of a `FlatModel`, and of what it computes, as `TOLERANCE` calls it.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.verify import coarsest
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> coarsest(read(convert(Job(model, quantize="float16")).content))
    'float16'
    """
    tensors = [t for graph in flat.subgraphs for t in graph.tensors if t.stored is not None and len(t.shape) >= 2]
    found = {tensor.dtype for tensor in tensors}
    if _computed(flat) & {"int8", "int16"}:  # whatever the weights are that no kernel takes in integers
        return "int8"
    return next((name for name in ("int8", "float16") if name in found), "float32")
