"""An export is a verified .tflite file: converted, stored the smaller way, compared with its model, accounted for."""

import os

import numpy as np

from keras_sparse import files, selection
from keras_sparse.reports import Report
from keras_sparse.tflite.acceptance import accepted
from keras_sparse.tflite.convert import ExportError, convert
from keras_sparse.tflite.encoding import OUTWEIGHED, encode
from keras_sparse.tflite.flatmodel import gzip_size, read
from keras_sparse.tflite.halves import kept_whole
from keras_sparse.tflite.inspect import brief_name
from keras_sparse.tflite.parity import Reference, in_batches_of, random_batches, representative_batches
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.verification import TOLERANCE, Verification, sparse_runtimes
from keras_sparse.tflite.xnnpack import uses

__all__ = ["ExportError", "ExportReport", "export"]

QUANTIZE = (None, "float16", "dynamic", "int8")
INFERENCE_TYPES = ("int8", "uint8")
_INTEGERS = ("dynamic", "int8")
_SAMPLES = 16  # of representative data that an int8 file is compared on, one by one
_ALIKE = 0.03  # share of an output's magnitude: one that differs less between samples hardly depends on them
_WEIGHTS = ("float32", "float16", "bfloat16", "int8")  # types that weights are stored in


class ExportReport(Report):
    """What `ks.tflite.export` wrote, and the proof that it is right.

    Rows: one for each weight tensor in the file, with the weight of the model that it holds and how it will run.

    Attributes:
        path: The file.
        encoding: `"sparse"` or `"dense"`: how the file stores its weights.
        bytes_file: Size of the file.
        bytes_gzip: Size of the file in a zip archive, such as an app's package.
        bytes_dense: Size of the dense encoding.
        bytes_gzip_dense: Size of the dense encoding in a zip archive.
        bytes_sparse: Size of the sparse encoding; `None` if it was not asked for.
        parity: Largest absolute difference between the file's outputs and the model's.
        parity_relative: The same, relative to the largest magnitude of the output.
        zeros: List of `{"weight", "model", "file"}`: zeros of each kernel in the model and in the file; `"file"` is
            `None` where the converter split or merged the weight.
        runs_sparse: List of `{"tensor", "operator", "where"}`: multiplications that skip zeros, and on which runtime.
        verified_on: List of the runtimes that the file was compared on.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = ks.tflite.export(model, os.path.join(folder, "model.tflite"))
    >>> report.encoding, report.parity < 1e-5
    ('dense', True)
    """

    def __init__(self, path, rows, totals, notes, zeros, runs_sparse):
        sizes = ("bytes_file", "bytes_gzip", "bytes_dense", "bytes_gzip_dense", "bytes_sparse", "bytes", "zeros")
        formats = dict.fromkeys((*sizes, "zeros_model"), ",d")
        formats |= dict.fromkeys(("parity", "parity_relative"), ".1e") | {"sparsity": ".2%"}
        formats["shape"] = lambda shape: "x".join(map(str, shape))
        formats["zeros_kept"] = lambda kept: f"{kept:,d} of {totals['zeros_model']:,d}"
        columns = dict.fromkeys(("weight", "shape", "dtype", "encoding", "block", "sparsity", "bytes", "runs"))
        columns["weight"] = lambda row: row["weight"] or brief_name(row["tensor"])
        columns["runs"] = lambda row: row["runs"].partition(",")[0]
        super().__init__(f"Export to {path}", rows, totals, notes, formats, columns)
        self.path = path
        self.zeros = zeros
        self.runs_sparse = runs_sparse
        for name in ("encoding", *sizes[:5], "parity", "parity_relative", "verified_on"):
            setattr(self, name, totals[name])


def export(
    model,
    path,
    sparse=True,
    quantize=None,
    representative_data=None,
    verify="auto",
    inference_type=None,
    batch_size=None,
):
    """Write a model as a .tflite file that is proven to compute what the model computes.

    The model is converted, and weights with many zeros are encoded without them: weight by weight, where the encoding
    is smaller and known to be read right. The file is run and every output is compared with the Keras model's before
    anything is left at `path`: with ai-edge-litert on this machine; and, if XNNPACK's sparse kernels could touch the
    file, on those runtimes that are installed here and have these kernels on (x86 CPUs with AVX have not):
    `"x86-no-avx"` and `"wasm"` of `ks.tflite.runtimes`. An encoding with which those kernels would compute wrong
    numbers gives way to one that they do not touch, or to the dense one, with a note.

    Args:
        model: A built Keras model on any backend, or the path of a .keras file.
        path: Where to write; must end in `.tflite`. An existing file is replaced.
        sparse: Whether a sparse encoding may be used. `False`: dense encoding.
        quantize: `None` for float32 weights; `"float16"` for weights stored in half precision; `"dynamic"` for weights
            stored in 8 bits, where they have more than 1,024 elements, and computation in floats; `"int8"` for
            computation in integers of 8 bits, which needs `representative_data`.
        representative_data: Inputs as the model will meet them, for the comparison and, with `"int8"`, the calibration:
            an array, a list, tuple or dict of arrays, a dataset, a generator or a function that returns one. The first
            128 samples are used.
        verify: `"auto"`, or `"strict"`: compare on all runtimes with sparse kernels that are installed, whatever is
            known about the file, and raise if there is none.
        inference_type: With `"int8"`, the type of inputs and outputs that are floats in the model: `None` (float32),
            `"int8"` or `"uint8"`; what a stored integer means is in the file.
        batch_size: The size of the batches that the file takes; `None`: any, if the model takes any. Networks with
            squeeze-and-excite branches run sparse only in files of a fixed size.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: If the model cannot be converted or the file's outputs differ from the model's. It is a
            `ValueError`; no file is left.
        RuntimeMissing: If `verify="strict"` and no runtime has sparse kernels; an `OSError`.
        ValueError: If an argument is wrong.
        TypeError: If `model` is no Keras 3 model, or `sparse` no bool.
        OSError: If the file cannot be written.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(3)])
    >>> _ = ks.prune(model, 0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = ks.tflite.export(model, os.path.join(folder, "model.tflite"))
    >>> report.encoding, report.bytes_file < report.bytes_dense / 3
    ('sparse', True)
    """
    if not isinstance(sparse, bool):
        raise TypeError(f"`sparse` must be True or False. Received: sparse={sparse!r}")
    _check_quantize(quantize, representative_data, inference_type)
    runtimes = sparse_runtimes(verify)
    path = _check_path(path)
    model = accepted(model)
    called = _with_batch(signature(model), batch_size)
    samples = representative_batches(representative_data, called) if representative_data is not None else []
    if samples and not called.typed:
        called = called.with_dtypes([array.dtype for array in samples[0]])
    if quantize == "int8":
        samples = _calibration(samples, called)
    conversion = convert(model, called, quantize, samples, inference_type)
    if quantize == "int8" and not _holds_integers(conversion.content):
        raise ExportError(
            f"The converter found nothing in the model {model.name!r} that it can compute in integers of 8 bits: use "
            "quantize='float16'. Received: quantize='int8'"
        )
    # int8 clips what is beyond the calibrated range: random inputs would be.
    batches = samples[:_SAMPLES]
    if quantize != "int8":
        batches = random_batches(model, called, like=samples[0] if samples else None) + samples
    reference = Reference(model, called, in_batches_of(1, batches) if conversion.fixed_batch else batches)
    tolerance = max(TOLERANCE[name] for name in (_precision(model), quantize or "float32"))

    notes = []
    whole = kept_whole(conversion.content) if quantize == "float16" else []
    if whole:
        notes.append(f"In float32, because half precision loses numbers of this size: {', '.join(whole)}.")
    if conversion.fixed_batch:
        notes.append(
            "The file takes one sample at a time: TFLite's built-in operators cannot run a recurrent layer, or another "
            "part of this model, with an open batch size."
        )
    if not called.typed and representative_data is None and any(w.name == "embeddings" for w in model.weights):
        notes.append(
            "The file takes float32 inputs: a subclassed model does not record the types of its inputs. Pass integers "
            "as `representative_data` for a file that takes integers."
        )
    alike = reference.alike(min(tolerance, _ALIKE))
    if alike:
        notes.append(
            f"The comparison says little of {', '.join(alike)}: between the inputs that were tried it differs by less "
            f"than {min(tolerance, _ALIKE):.1%} of its magnitude, and may do so in a wrong file. Pass inputs as the "
            "model will meet them, and several, as `representative_data`."
        )
    check = Verification(conversion.content, reference, tolerance, quantize in _INTEGERS, runtimes, verify == "strict")
    content, encoding, parity, size = _choose(conversion.content, check, sparse, notes)
    if content is None:
        raise ExportError(
            f"The .tflite file of model {model.name!r} does not compute what the model computes, so it was not kept. "
            + (
                "Eight bits are too few for it, or the representative data do not cover what it meets: try "
                "quantize='float16'. "
                if quantize in _INTEGERS
                else "Report this model to keras_sparse if it has no random layer that is active in inference. "
            )
            + f"Received: output {parity.worst!r} differs by {parity.absolute:.3g}, {parity.relative:.3g} of its "
            f"magnitude (allowed: {tolerance:.0e})"
        )
    if verify == "strict" and len(check.verified_on) == 1:
        raise ExportError(
            "verify='strict' needs a runtime on which sparse kernels are on and the file is right. Received: "
            f"{' '.join(check.notes) or 'none that answered in time'}"
        )
    notes += check.notes
    if quantize == "dynamic" and _restores_integers(content):
        notes.append(
            "Slower than with dense weights: 8-bit weights that are stored without zeros are restored as floats when "
            "the model loads, where dense ones are multiplied as integers (2 to 5 times the time on x86, up to 3 times "
            "the memory). If time matters, use sparse=False, or quantize='float16'."
        )
    report = _report(model, path, conversion.content, content, encoding, size, parity, check.verified_on, notes)
    _write(path, content)
    return report


def _check_quantize(quantize, representative_data, inference_type):
    if quantize not in QUANTIZE or isinstance(quantize, bool):
        names = ", ".join(map(repr, QUANTIZE))
        raise ValueError(f"`quantize` must be one of {names}. Received: {quantize!r}")
    if quantize == "int8" and representative_data is None:
        raise ValueError(
            "quantize='int8' needs `representative_data`, inputs as the model will meet them, to find the range of "
            "each activation: pass some of the training data. Received: representative_data=None"
        )
    if inference_type is not None and (inference_type not in INFERENCE_TYPES or quantize != "int8"):
        raise ValueError(
            "`inference_type` must be None, or 'int8' or 'uint8' with quantize='int8'. "
            f"Received: inference_type={inference_type!r}, quantize={quantize!r}"
        )


def _with_batch(called, size):
    if size is None:
        return called
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"`batch_size` must be None or a positive integer. Received: batch_size={size!r}")
    fixed = {leaf.shape[0] for leaf in called.inputs} - {None}
    if fixed - {size}:
        raise ValueError(
            f"The model takes batches of {fixed.pop()} samples: leave `batch_size` out. Received: batch_size={size}"
        )
    return called.with_batch(size)


def _calibration(samples, called):
    """One sample at a time, where the batch size is open."""
    if all(np.ptp(np.concatenate(arrays, axis=None).astype("float64")) == 0 for arrays in zip(*samples, strict=True)):
        raise ValueError(
            "`representative_data` must be inputs as the model will meet them, for the range of each activation: pass "
            f"some of the training data. Received: nothing but {float(samples[0][0].flat[0]):g}"
        )
    samples = in_batches_of(called.inputs[0].shape[0] or 1, samples)
    return [[a.astype(leaf.dtype) for a, leaf in zip(batch, called.inputs, strict=True)] for batch in samples]


def _holds_integers(content):
    return any(tensor.dtype == "int8" for graph in read(content).subgraphs for tensor in graph.tensors)


def _restores_integers(content):
    tensors = [tensor for graph in read(content).subgraphs for tensor in graph.tensors]
    return any(tensor.dtype == "int8" and tensor.levels is not None for tensor in tensors)


def _check_path(path):
    path = os.fspath(path)
    if not path.endswith(".tflite"):
        raise ValueError(f"`path` must end in '.tflite'. Received: path={path!r}")
    folder = os.path.dirname(os.path.realpath(path))  # a link is written through
    if os.path.isdir(path):
        raise ValueError(f"`path` must be a file, and there is a folder of that name. Received: path={path!r}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The folder {folder!r} does not exist; create it first. Received: path={path!r}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"The folder {folder!r} is not writable. Received: path={path!r}")
    return path


def _precision(layer):
    """The coarsest number format that a model computes in."""
    names = [_precision(inner) for inner in getattr(layer, "layers", ())]
    names.append(layer.compute_dtype if layer.compute_dtype in TOLERANCE else "float32")
    return max(names, key=TOLERANCE.get)


def _choose(dense, check, sparse, notes):
    """The smallest encoding that computes right numbers.

    Returns:
        `(content or None, encoding, parity, bytes of the sparse encoding or None)`.
    """
    size, faults = None, []
    for engage in (True, False) if sparse else ():
        encoded = encode(dense, engage)
        if not engage and not encoded.moved:
            break
        size = len(encoded.content)
        if size >= len(dense):
            if not encoded.kept:
                notes.append(
                    "Stored dense: the sparse encoding is not smaller. It pays for weights of more than some hundred "
                    "bytes with more than about 50 % zeros."
                )
            notes += _kept(encoded)
            break
        fault, parity = check.fault(encoded.content)
        if fault is None:
            if faults:
                notes.append(
                    "Stored without zeros, but convolutions run dense: the file stays out of XNNPACK's sparse kernels. "
                    f"With them, {faults[0]}."
                )
            notes += _kept(encoded)
            return encoded.content, "sparse", parity, size
        faults.append(fault)
    if faults:
        notes.append(f"Stored dense, because the sparse-encoded file would not be safe to run: {faults[-1]}.")
    right, parity = check.dense()
    return (dense if right else None), "dense", parity, size


def _kept(encoded):
    """Notes on weights that stay dense, by reason, or run dense."""
    reasons = {}
    for name, reason in encoded.kept.items():
        reasons.setdefault(reason, []).append(name)
    notes = [f"Stored dense: {', '.join(map(brief_name, names))}. {reason}." for reason, names in reasons.items()]
    if encoded.outweighed:
        names = ", ".join(map(brief_name, encoded.outweighed))
        notes.append(
            f"Multiplied dense, although the zeros come in blocks: {names}. {OUTWEIGHED}: prune those in blocks, too."
        )
    return notes


def _report(model, path, dense, content, encoding, bytes_sparse, parity, verified_on, notes):
    written = read(content)
    how = {id(use.tensor): use for use in uses(written)}
    weights = _match(model, written)
    holder = {id(weight.variable): tensor for tensor, weight in weights if weight is not None}
    zeros = []
    for weight in selection.weights(model):
        if weight.kernel:
            tensor = holder.get(id(weight.variable))
            count = {"model": int(np.sum(weight.numpy() == 0)), "file": None if tensor is None else tensor.zeros}
            zeros.append({"weight": weight.path} | count)
    rows = []
    for tensor, weight in weights:
        use = how.get(id(tensor))
        rows.append(
            {
                "tensor": tensor.name,
                "weight": weight.path if weight else "",
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "encoding": tensor.encoding,
                "block": "x".join(map(str, tensor.block)) if tensor.encoding == "sparse-block-csr" else "",
                "zeros": tensor.zeros,
                "sparsity": tensor.zeros / tensor.size,
                "bytes": tensor.bytes,
                "runs": use.where if use else "dense",
            }
        )
    found = [count for count in zeros if count["file"] is not None]
    lost = [count["weight"] for count in found if count["file"] < count["model"]]
    if lost:
        notes.append(f"Zeros were lost in the conversion of: {', '.join(lost)}.")
    totals = {
        "encoding": encoding,
        "bytes_file": written.bytes,
        "bytes_gzip": written.bytes_gzip,
        "bytes_dense": len(dense),
        "bytes_gzip_dense": gzip_size(dense),
        "bytes_sparse": bytes_sparse,
        "parity": parity.absolute,
        "parity_relative": parity.relative,
        "zeros_model": sum(count["model"] for count in found),
        "zeros_kept": sum(min(count["file"], count["model"]) for count in found),
        "verified_on": list(verified_on),
    }
    runs = [{"tensor": u.tensor.name, "operator": u.operator, "where": u.where} for u in how.values() if u.sparse]
    return ExportReport(path, rows, totals, notes, zeros, runs)


def _match(model, written):
    """Pair each weight tensor of the file with the model's weight that it holds, or `None`.

    The converter renames, transposes and rescales (it folds batch normalization into kernels); size and zeros remain.
    """
    left = [(w, int(np.sum(w.numpy() == 0))) for w in selection.weights(model) if len(w.variable.shape) >= 2]
    pairs = []
    for graph in written.subgraphs:
        for tensor in graph.tensors:
            if tensor.stored is None or len(tensor.shape) < 2 or tensor.dtype not in _WEIGHTS:
                continue
            fits = [(w, n) for w, n in left if w.size == tensor.size]
            # Same number of zeros first; then the layer's name in the tensor's; then the model's order.
            fits.sort(key=lambda fit: (fit[1] != tensor.zeros, fit[0].path.split("/")[-2:][0] not in tensor.name))
            chosen = next((fit for fit in fits if fit[1] <= tensor.zeros), None)
            if chosen is not None:
                left.remove(chosen)
            pairs.append((tensor, chosen[0] if chosen else None))
    return pairs


def _write(path, content):
    """Write a file whole or not at all."""
    with files.replacing(os.path.realpath(path)) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a full disk shows itself here at the latest
