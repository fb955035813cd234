"""An export is a verified .tflite file: converted, stored the smaller way, compared with its model, accounted for."""

import contextlib
import os
import platform

import keras
import numpy as np

from keras_sparse import selection
from keras_sparse.layers import gated_layers
from keras_sparse.reports import Report
from keras_sparse.tflite.convert import ExportError, convert
from keras_sparse.tflite.flatmodel import gzip_size, read
from keras_sparse.tflite.parity import Reference, one_by_one, random_batches, representative_batches
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.xnnpack import hazard, uses

__all__ = ["ExportError", "ExportReport", "export"]

# How far an output may be from the model's, relative to that output's largest magnitude.
# float32: two correct programs differ by the order of their sums and by the polynomials they use for exp and tanh: 1e-7
# to 1e-6 in shallow models, below 1e-5 in the deepest of keras.applications. A wrong layout or weight costs 1e-1 and
# more. Half precision rounds each weight or product to 2**-11 (float16) or 2**-8 (bfloat16), and layers add that up.
_TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
_NOT_YET = ("dynamic", "int8")


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
        bytes_sparse: Size of the sparse encoding; `None` if it was not asked for or could not be made.
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
        super().__init__(f"Export to {path}", rows, totals, notes, formats)
        self.path = path
        self.zeros = zeros
        self.runs_sparse = runs_sparse
        for name in ("encoding", *sizes[:5], "parity", "parity_relative", "verified_on"):
            setattr(self, name, totals[name])


def export(model, path, sparse=True, quantize=None, representative_data=None):
    """Write a model as a .tflite file that is proven to compute what the model computes.

    The model is converted with dense and with sparse-encoded weights, and the smaller file is kept. The file is run
    with ai-edge-litert and every output is compared with the Keras model's, on random and on representative inputs,
    before anything is left at `path`. A sparse encoding that could compute wrong numbers on some CPU gives way to the
    dense one, with a note.

    Args:
        model: A built Keras model on any backend, or the path of a .keras file.
        path: Where to write; must end in `.tflite`. An existing file is replaced.
        sparse: Whether a sparse encoding may be used. `False`: dense encoding.
        quantize: `None` for float32 weights, `"float16"` for weights stored in half precision.
        representative_data: Inputs as the model will meet them, for the comparison: an array, a list, tuple or dict of
            arrays, a dataset, a generator or a function that returns one.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: If the model cannot be converted or the file's outputs differ from the model's. It is a
            `ValueError`; no file is left.
        ValueError: If an argument is wrong.
        TypeError: If `model` is no Keras 3 model.
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
    _check_quantize(quantize)
    path = _check_path(path)
    model = _model(model)
    called = signature(model)
    batches = representative_batches(representative_data, called) if representative_data is not None else []
    if batches and not called.typed:
        called = called.with_dtypes([array.dtype for array in batches[0]])
    conversion = convert(model, called, ["dense", "sparse"] if sparse else ["dense"], quantize)
    batches = random_batches(model, called) + batches
    reference = Reference(model, called, one_by_one(batches) if conversion.fixed_batch else batches)
    tolerance = max(_TOLERANCE[name] for name in (_precision(model), quantize or "float32"))

    notes = []
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
    encoding, parity, verified_on = _choose(conversion.files, reference, tolerance, sparse, notes)
    if encoding is None:
        raise ExportError(
            f"The .tflite file of model {model.name!r} does not compute what the model computes, so it was not kept. "
            "Report this model to keras_sparse if it has no random layer that is active in inference. "
            f"Received: output {parity.worst!r} differs by {parity.absolute:.3g}, {parity.relative:.3g} of its "
            f"magnitude (allowed: {tolerance:.0e})"
        )
    report = _report(model, path, conversion.files, encoding, parity, verified_on, notes)
    _write(path, conversion.files[encoding])
    return report


def _check_quantize(quantize):
    if quantize in _NOT_YET:
        raise ValueError(
            f"quantize={quantize!r} is not supported yet in this version. Use None or 'float16'. Received: {quantize!r}"
        )
    if quantize not in (None, "float16"):
        raise ValueError(f"`quantize` must be None or 'float16'. Received: {quantize!r}")


def _check_path(path):
    path = os.fspath(path)
    if not path.endswith(".tflite"):
        raise ValueError(f"`path` must end in '.tflite'. Received: path={path!r}")
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ValueError(f"`path` must be a file, and there is a folder of that name. Received: path={path!r}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The folder {folder!r} does not exist; create it first. Received: path={path!r}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"The folder {folder!r} is not writable. Received: path={path!r}")
    return path


def _model(model):
    if isinstance(model, (str, os.PathLike)):
        file = os.fspath(model)
        if not file.endswith(".keras"):
            raise ValueError(f"`model` must be a Keras model or the path of a .keras file. Received: model={file!r}")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"There is no such file. Received: model={file!r}")
        try:
            model = keras.saving.load_model(file, compile=False)
        except Exception as error:
            raise ValueError(
                "The .keras file cannot be loaded. If the model has custom classes, import the module that registers "
                f"them, load it yourself and pass the model. Received: model={file!r} "
                f"({type(error).__name__}: {str(error).strip()[:300]})"
            ) from error
    selection.check_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`: put the layer into a `keras.Sequential`. "
            f"Received: {type(model).__name__}"
        )
    gated = [layer.name for layer in gated_layers(model)]
    if gated:
        raise ValueError(f"Fold the gates in first: `export(ks.bake(model), ...)`. Received: `ks.layers.L0` {gated}")
    return model


def _precision(layer):
    """The coarsest number format that a model computes in."""
    names = [_precision(inner) for inner in getattr(layer, "layers", ())]
    names.append(layer.compute_dtype if layer.compute_dtype in _TOLERANCE else "float32")
    return max(names, key=_TOLERANCE.get)


def _choose(files, reference, tolerance, sparse, notes):
    """The smallest encoding that computes right numbers: `(encoding or None, parity, runtimes it was run on)`."""
    here = f"ai-edge-litert on this {platform.machine()} CPU"
    if sparse and "sparse" not in files:
        notes.append("Stored dense: TensorFlow's converter cannot sparse-encode this model.")
    elif sparse and len(files["sparse"]) >= len(files["dense"]):
        notes.append("Stored dense: the sparse encoding is not smaller. It pays above about 50 % zeros in a layer.")
    elif sparse:
        verified_on = [here]
        fault, parity = _fault(files, reference, tolerance, verified_on)
        if fault is None:
            return "sparse", parity, verified_on
        notes.append(f"Stored dense, because the sparse-encoded file would not be safe to run: {fault}.")
    parity = reference.compare(files["dense"])
    return ("dense" if parity.relative <= tolerance else None), parity, [here]


def _fault(files, reference, tolerance, verified_on):
    """Why the sparse-encoded file must not be handed out, or `None`; and its parity on this machine."""
    model = read(files["sparse"])
    fault = hazard(model)
    if fault is not None:
        return fault, None
    if not _same_weights(model, read(files["dense"])):
        return "a decoded weight is not the dense file's", None
    try:
        parity = reference.compare(files["sparse"])
    except RuntimeError as error:  # what the interpreter raises when it cannot load or run a file
        return f"ai-edge-litert cannot run it ({str(error).strip().splitlines()[0][:200]})", None
    if not parity.relative <= tolerance:
        return f"output {parity.worst!r} differs from the model's by {parity.relative:.3g} of its magnitude", None
    if any(use.sparse for use in uses(model)):
        try:
            emulated = reference.compare_without_avx(files["sparse"])
        except ValueError as error:
            return f"a CPU without AVX cannot run it ({str(error).strip().splitlines()[0][-200:]})", None
        if emulated is not None:
            if not emulated.relative <= tolerance:
                return f"on a CPU without AVX, output {emulated.worst!r} differs by {emulated.relative:.3g}", None
            verified_on.append("ai-edge-litert on an emulated x86_64 CPU without AVX")
    return None, parity


def _same_weights(sparse, dense):
    """Whether each sparse-encoded tensor decodes to a tensor of the dense file (names and order differ)."""

    def key(tensor):
        return tensor.shape, tensor.dtype, (tensor.values() + 0).tobytes()  # + 0: a sparse encoding keeps no -0.0

    encoded = [t for graph in sparse.subgraphs for t in graph.tensors if t.levels is not None]
    shapes = {t.shape for t in encoded}
    known = {key(t) for graph in dense.subgraphs for t in graph.tensors if t.stored is not None and t.shape in shapes}
    return all(key(tensor) in known for tensor in encoded)


def _report(model, path, files, encoding, parity, verified_on, notes):
    written, dense = read(files[encoding]), files["dense"]
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
        "bytes_sparse": len(files["sparse"]) if "sparse" in files else None,
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
            if tensor.stored is None or len(tensor.shape) < 2 or not tensor.dtype.startswith(("float", "bfloat")):
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
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk shows itself here at the latest
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
