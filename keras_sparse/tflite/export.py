"""An export is a verified .tflite file: converted, stored the smaller way, compared with its model, accounted for."""

import math
import os

import numpy as np

from keras_sparse import files, selection
from keras_sparse.registry import did_you_mean
from keras_sparse.reports import Report
from keras_sparse.tflite import signatures
from keras_sparse.tflite.acceptance import accepted
from keras_sparse.tflite.calibration import calibrating, doubts
from keras_sparse.tflite.choice import smallest_right
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.flatmodel import gzip_size, read
from keras_sparse.tflite.halves import kept_whole
from keras_sparse.tflite.inspect import brief_name, limits
from keras_sparse.tflite.job import CALIBRATED, QUANTIZE, Job
from keras_sparse.tflite.matching import match, readers
from keras_sparse.tflite.samples import representative_batches
from keras_sparse.tflite.targets import NOT_SPARSE, chosen
from keras_sparse.tflite.verification import VERIFY, Verification, sparse_runtimes
from keras_sparse.tflite.xnnpack import uses

__all__ = ["ExportError", "ExportReport", "export"]

INFERENCE_TYPES = {"int8": "int8", "uint8": "int8", "int16": "int16x8"}  # and the `quantize` that it goes with
_MOST = 2**31 - 1  # bytes of a tensor: TFLite counts them, and flatbuffers their places, in 32 bits with a sign
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
        bytes_limit: What the file would take if the zeros of each tensor took no more than their entropy, with values
            of the same types: how far the format is from what any could reach.
        parity: Largest absolute difference between the file's outputs and the model's.
        parity_relative: The same, relative to the largest magnitude of the output.
        zeros: List of `{"weight", "model", "file"}`: zeros of each kernel in the model and in the file; `"file"` is
            `None` where the converter split or merged the weight.
        runs_sparse: List of `{"tensor", "operator", "where"}`: multiplications that skip zeros, and on which runtime.
        verified_on: List of the runtimes that the file was compared on.
        not_verified: List of sentences: for which of the targets it was not, and why.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = ks.tflite.export(model, os.path.join(folder, "model.tflite"))
    >>> report.encoding, report.parity < 1e-5
    ('dense', True)
    """

    def __init__(self, path, rows, totals, notes, zeros, runs_sparse):
        sizes = ("bytes_file", "bytes_gzip", "bytes_dense", "bytes_gzip_dense", "bytes_sparse", "bytes_limit")
        formats = dict.fromkeys((*sizes, "bytes", "zeros", "zeros_model"), ",d")
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
        for name in ("encoding", *sizes, "parity", "parity_relative", "verified_on", "not_verified"):
            setattr(self, name, totals[name])

    @classmethod
    def of(cls, path, job, conversion, choice, targets=()):
        """The report on what was chosen of a job's conversion, for some targets."""
        written = read(choice.content)
        how = {id(use.tensor): use for use in uses(written)}
        held = _held(job.model, written)
        rows = [_row(tensor, weight, how.get(id(tensor))) for tensor, weight in held]
        zeros = _zeros(job.model, held)
        found = [count for count in zeros if count["file"] is not None]
        lost = [count["weight"] for count in found if count["file"] < count["model"]]
        notes = _notes_on_conversion(job, conversion) + choice.notes + _notes_on_use(written, choice, targets)
        if job.quantize == "dynamic" and _restores_integers(written):
            notes.append(
                "Slower than with dense weights: 8-bit weights that are stored without zeros are restored as floats "
                "when the model loads, where dense ones are multiplied as integers (2 to 5 times the time on x86, up "
                "to 3 times the memory). If time matters, use sparse=False, or quantize='float16'."
            )
        if lost:
            notes.append(f"Zeros were lost in the conversion of: {', '.join(lost)}.")
        totals = {
            "encoding": choice.encoding,
            "bytes_file": written.bytes,
            "bytes_gzip": written.bytes_gzip,
            "bytes_dense": len(conversion.content),
            "bytes_gzip_dense": (
                written.bytes_gzip if choice.content == conversion.content else gzip_size(conversion.content)
            ),
            "bytes_sparse": choice.bytes_sparse,
            "bytes_limit": written.bytes_limit,
            "parity": choice.parity.absolute,
            "parity_relative": choice.parity.relative,
            "zeros_model": sum(count["model"] for count in found),
            "zeros_kept": sum(min(count["file"], count["model"]) for count in found),
            "verified_on": choice.verified_on,
            "not_verified": choice.not_verified,
        }
        runs = [{"tensor": u.tensor.name, "operator": u.operator, "where": u.where} for u in how.values() if u.sparse]
        return cls(path, rows, totals, notes, zeros, runs)


def export(
    model,
    path,
    target=None,
    sparse=True,
    quantize=None,
    representative_data=None,
    verify="auto",
    inference_type=None,
    batch_size=None,
):
    """Write a model as a .tflite file that is proven to compute what the model computes.

    The model is converted, and the file is run and every output compared with the Keras model's before anything is left
    at `path`: with ai-edge-litert on this machine, and on the runtimes that prove it for its targets, where these are
    installed (`ks.tflite.runtimes`; the report says which were not).

    For CPUs, weights with many zeros are encoded without them: weight by weight, where the encoding is smaller and
    known to be read right. If XNNPACK's sparse kernels could touch the file, it is compared on those runtimes, too,
    that are installed here and have these kernels on (x86 CPUs with AVX have not): `"x86-no-avx"` and `"wasm"`. An
    encoding with which those kernels would compute wrong numbers gives way to one that they do not touch, or to the
    dense one, with a note. All other targets get dense weights, because their runtimes refuse others or compute wrong
    numbers from them.

    Args:
        model: A built Keras model on any backend, or the path of a .keras file.
        path: Where to write; must end in `.tflite`. An existing file is replaced.
        target: What the file is meant for: a name of `ks.tflite.targets()`, or several, such as
            `["xnnpack", "gpu"]`; it is right on all of them. `None`: dense weights, which are right on all
            accelerators, since nobody knows where a file of unknown use will run: LiteRT's GPU accelerator, which
            most apps ask for, computes wrong numbers from weights that are stored without zeros, and raises no error.
        sparse: Whether a sparse encoding may be used if all targets read it. `False`: dense encoding.
        quantize: `None` for float32 weights; `"float16"` for weights stored in half precision; `"dynamic"` for weights
            stored in 8 bits, where they have more than 1,024 elements, and computation in floats; `"int8"` for
            computation in integers of 8 bits; `"int16x8"` for weights of 8 bits and all else in 16, for audio and
            images as outputs, which is slow. These two need `representative_data`.
        representative_data: Inputs as the model will meet them, for the comparison and, with integers, the calibration:
            an array, a list, tuple or dict of arrays, a dataset, a generator or a function that returns one. The first
            128 samples are used. Of fewer, a calibration keeps some back in a second conversion, and the report says
            if these show that more are needed.
        verify: `"auto"`, or `"strict"`: compare on all runtimes with sparse kernels that are installed, whatever is
            known about the file, and raise if there is none, or if a target is left unproven.
        inference_type: The type of inputs and outputs that are floats in the model: `None` (float32), with `"int8"`
            also `"int8"` or `"uint8"`, with `"int16x8"` also `"int16"`; what a stored integer means is in the file.
        batch_size: The size of the batches that the file takes; `None`: any, if the model takes any, but 1 for
            targets that want a fixed size: browsers, GPUs, NPUs, microcontrollers. Networks with squeeze-and-excite
            branches run sparse only in files of a fixed size.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: If the model cannot be converted or the file's outputs differ from the model's, here or on a
            target. It is a `ValueError`; no file is left.
        RuntimeMissing: If `verify="strict"` and no runtime has sparse kernels, or one for a target is missing; an
            `OSError`.
        ValueError: If an argument is wrong.
        TypeError: If `model` is no Keras 3 model, or `sparse` no bool.
        OSError: If the file cannot be written.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(3)])
    >>> _ = ks.prune(model, 0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     anywhere = ks.tflite.export(model, path)
    ...     report = ks.tflite.export(model, path, target="xnnpack")
    >>> anywhere.encoding, report.encoding, report.bytes_file < anywhere.bytes_file / 3
    ('dense', 'sparse', True)
    """
    targets = chosen(target)
    if not isinstance(sparse, bool):
        raise TypeError(f"`sparse` must be True or False. Received: sparse={sparse!r}")
    _check_quantize(quantize, representative_data, inference_type)
    _check_targets(targets, quantize)
    readable = bool(targets) and all(each.takes_sparse for each in targets)
    dense_only = targets and not readable  # then sparse kernels are not asked, but `verify` is checked
    runtimes = sparse_runtimes(VERIFY[0] if dense_only and verify in VERIFY else verify)
    path = _check_path(path)
    model = accepted(model)
    if batch_size is None and any(each.fixed_batch for each in targets):
        batch_size = 1 if signatures.signature(model).inputs[0].shape[0] is None else None
    job = _job(model, quantize, representative_data, inference_type, batch_size)
    conversion = convert(job)
    verification = Verification.of(job, conversion, runtimes, strict=verify == "strict", targets=targets)
    choice = smallest_right(conversion.content, verification, sparse and readable)
    choice.notes += doubts(job) + verification.doubts(choice.parity, quantize)
    if sparse and not readable:
        choice.bytes_sparse = min(len(encode(conversion.content).content), len(conversion.content))
    report = ExportReport.of(path, job, conversion, choice, targets)
    _write(path, choice.content)
    return report


def _check_quantize(quantize, representative_data, inference_type):
    if quantize not in QUANTIZE or isinstance(quantize, bool):
        names = ", ".join(map(repr, QUANTIZE))
        hint = did_you_mean(quantize, filter(None, QUANTIZE))
        raise ValueError(f"`quantize` must be one of {names}. Received: {quantize!r}{hint}")
    if quantize in CALIBRATED and representative_data is None:
        raise ValueError(
            f"quantize={quantize!r} needs `representative_data`, inputs as the model will meet them, to find the range "
            "of each activation: pass some of the training data. Received: representative_data=None"
        )
    allowed = tuple(name for name, mode in INFERENCE_TYPES.items() if mode == quantize)
    if inference_type is not None and inference_type not in allowed:
        raise ValueError(
            "`inference_type` must be None, or 'int8' or 'uint8' with quantize='int8', or 'int16' with 'int16x8'. "
            f"Received: inference_type={inference_type!r}, quantize={quantize!r}"
        )


def _check_targets(targets, quantize):
    for target in targets:
        if target.quantize and quantize not in target.quantize:
            taken = " or ".join(f"quantize={mode!r}" for mode in target.quantize)
            raise ValueError(
                f"The target {target.name!r} takes {taken}; integers need `representative_data`. Received: "
                f"quantize={quantize!r}"
            )


def _job(model, quantize, representative_data, inference_type, batch_size):
    """The conversion that was asked for, with the data as it needs them."""
    signature = _with_batch(signatures.signature(model), batch_size)
    samples = representative_batches(representative_data, signature) if representative_data is not None else []
    if samples and not signature.typed:
        signature = signature.with_dtypes([array.dtype for array in samples[0]])
    if quantize in CALIBRATED:
        samples = calibrating(samples, signature)
    return Job(model, signature, quantize, samples, inference_type)


def _with_batch(signature, size):
    if size is None:
        return signature
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"`batch_size` must be None or a positive integer. Received: batch_size={size!r}")
    size = int(size)
    for leaf in signature.inputs:
        large = math.prod(n or 1 for n in leaf.shape[1:]) * np.dtype(leaf.dtype).itemsize * size
        if large > _MOST:
            raise ValueError(
                f"`batch_size` samples of the input {leaf.name!r} must fit into {_MOST:,} bytes, the most that a "
                f"tensor holds: they take {large:,}. Received: batch_size={size}"
            )
    fixed = {leaf.shape[0] for leaf in signature.inputs} - {None}
    if fixed - {size}:
        raise ValueError(
            f"The model takes batches of {fixed.pop()} samples: leave `batch_size` out. Received: batch_size={size}"
        )
    return signature.with_batch(size)


def _notes_on_conversion(job, conversion):
    notes = []
    whole = kept_whole(conversion.content) if job.quantize == "float16" else []
    if whole:
        notes.append(f"In float32, because half precision loses numbers of this size: {', '.join(whole)}.")
    taken = job.signature.inputs[0].shape[:1]
    if taken not in ((), (None,), (1,)):
        notes.append(f"The file takes {taken[0]:,} samples at a time, no more and no fewer.")
    if conversion.fixed_batch:
        notes.append(
            "The file takes one sample at a time: TFLite's built-in operators cannot run a recurrent layer, or another "
            "part of this model, with an open batch size."
        )
    if not job.signature.typed and not job.samples and any(w.name == "embeddings" for w in job.model.weights):
        notes.append(
            "The file takes float32 inputs: a subclassed model does not record the types of its inputs. Pass integers "
            "as `representative_data` for a file that takes integers."
        )
    return notes


def _notes_on_use(written, choice, targets):
    """Where the file must not be used, and what a target makes of zeros."""
    notes = []
    if written.is_sparse:
        notes.append(f"{NOT_SPARSE}.")
    elif choice.bytes_sparse is not None and choice.bytes_sparse < 0.9 * written.bytes:
        notes += [f"For {target.name}: {target.otherwise.text}." for target in targets if not target.takes_sparse] or [
            "Stored dense, which is right on every accelerator. For CPUs alone target='xnnpack' leaves the zeros out: "
            f"{choice.bytes_sparse:,d} bytes."
        ]
    return notes + limits(written) + [f"Not verified for {reason}" for reason in choice.not_verified]


def _restores_integers(written):
    tensors = [tensor for graph in written.subgraphs for tensor in graph.tensors]
    return any(tensor.dtype == "int8" and tensor.levels is not None for tensor in tensors)


def _check_path(path):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` must be a string or a `pathlib.Path` that ends in '.tflite'. Received: path={path!r}")
    path = os.fsdecode(path)
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


def _held(model, written):
    """Pairs of each weight tensor of the file and the model's weight that it holds, or `None`."""
    tensors = []
    for graph in written.subgraphs:
        read_by = readers(graph)
        for number, tensor in enumerate(graph.tensors):
            if tensor.stored is not None and len(tensor.shape) >= 2 and tensor.dtype in _WEIGHTS:
                tensors.append((read_by.get(number, ("",))[0], tensor))
    weights = [weight for weight in selection.weights(model) if len(weight.variable.shape) >= 2]
    return [(tensor, weight) for (_, tensor), weight in zip(tensors, match(model, tensors, weights), strict=True)]


def _zeros(model, held):
    """Zeros of each kernel, in the model and in the file."""
    holder = {id(weight.variable): tensor for tensor, weight in held if weight is not None}
    found = []
    for weight in selection.weights(model):
        if weight.kernel:
            tensor = holder.get(id(weight.variable))
            count = {"model": int(np.sum(weight.numpy() == 0)), "file": None if tensor is None else tensor.zeros}
            found.append({"weight": weight.path} | count)
    return found


def _row(tensor, weight, use):
    return {
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


def _write(path, content):
    """Write a file whole or not at all."""
    with files.replacing(os.path.realpath(path)) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a full disk shows itself here at the latest
