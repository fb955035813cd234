"""An inspection lists what a .tflite file stores: its tensors, how they are encoded, how sparse they are."""

import math
import os

from keras_sparse import patterns
from keras_sparse.graph import operator_axes
from keras_sparse.reports import Report
from keras_sparse.tflite.faults import FAULTS
from keras_sparse.tflite.flatmodel import UNPACK, damaged, read
from keras_sparse.tflite.targets import NOT_SPARSE, OPEN_BATCH

__all__ = ["inspect", "limits"]

_COUNTING = ("int32", "int64", "uint32", "uint64", "bool")  # shapes, axes, indices; and the biases of int8 kernels
_KEEPS = "ASSIGN_VARIABLE"  # the operator that writes state
_FEW = 0.02  # single zeros up to this share are no pattern: quantisation to int8 rounds some weights to zero
_MOST = 1024  # elements for each stored byte: a hostile file may describe an array that fills the memory


def inspect(path):
    """List the stored tensors of any .tflite file: how each is encoded, how sparse it is, what it takes.

    Nothing is run: files of unknown origin are safe to inspect.

    Args:
        path: Path of a .tflite file.

    Returns:
        A `Report`. Columns: `tensor`, `subgraph`, `shape`, `dtype`, `encoding` (`"dense"`, `"sparse-csr"`,
        `"sparse-block-csr"`), `block` (such as `"1x4"`), `zeros`, `sparsity` (share of zeros), `pattern` (where the
        zeros of a kernel stand, as `ks.patterns.recognize` names it, however they are encoded; `""` for other tensors
        and for kernels with less than 2 % single zeros), `bytes`. Totals: of the file, and over all stored tensors;
        `bytes_gzip` is what the file takes inside an app's package; `bytes_limit` what it would take if the zeros of
        each tensor took no more than their entropy, with values of the same types; `kernel_sparsity` is the share of
        zeros over the kernels alone (`None` without any), `parameters` counts the elements of all but integers such
        as shapes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a valid .tflite file.

    Example:

    >>> import keras_sparse as ks
    >>> ks.tflite.inspect("missing.tflite")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no such file. Received: path='missing.tflite'
    """
    model = read(path)
    rows, parameters, kernel_size, kernel_zeros = [], 0, 0, 0
    with damaged(path):
        for number, subgraph in enumerate(model.subgraphs):
            kernels, added = _kernels(subgraph), _added(subgraph)
            for index, tensor in enumerate(subgraph.tensors):
                if tensor.stored is None:
                    continue
                rows.append(_row(tensor, number, kernels.get(index)))
                if tensor.zeros is not None and (index in added or tensor.dtype not in _COUNTING):
                    parameters += tensor.size
                if tensor.zeros is not None and index in kernels:
                    kernel_size, kernel_zeros = kernel_size + tensor.size, kernel_zeros + tensor.zeros
        unfit = limits(model)
    numbers = [row for row in rows if row["zeros"] is not None]
    size, zeros = sum(math.prod(row["shape"]) for row in numbers), sum(row["zeros"] for row in numbers)
    totals = {
        "bytes": model.bytes,
        "bytes_gzip": model.bytes_gzip,
        "bytes_limit": model.bytes_limit,
        "tensors": len(rows),
        "tensors_sparse": sum(row["encoding"] != "dense" for row in rows),
        "size": size,
        "zeros": zeros,
        "sparsity": zeros / size if size else 0.0,
        "kernel_sparsity": kernel_zeros / kernel_size if kernel_size else None,
        "parameters": parameters,
    }
    formats = dict.fromkeys(("bytes", "bytes_gzip", "bytes_limit", "size", "zeros", "parameters"), ",d")
    formats |= {
        "sparsity": ".2%",
        "kernel_sparsity": ".2%",
        "shape": lambda shape: "x".join(map(str, shape)) or "scalar",
    }
    columns = dict.fromkeys(("tensor", "shape", "dtype", "encoding", "block", "sparsity", "pattern", "bytes"))
    columns["tensor"] = lambda row: brief_name(row["tensor"])
    title = f"Tensors of {os.path.basename(path)}"
    notes = [f"{NOT_SPARSE}."] if totals["tensors_sparse"] else []
    return Report(title, rows, totals, notes + unfit, formats, columns, lambda row: len(row["shape"]) >= 2)


def limits(model):
    """Sentences on where a file does not run right as it is, however its weights are stored, and on what it keeps.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.inspect import limits
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((4,), batch_size=1), keras.layers.Dense(3)])
    >>> limits(read(convert(Job(model)).content))
    []
    """
    faults = [(where, fault(model)) for fault, where in FAULTS]
    found = [f"Not for {where}: {why}." for where, why in faults if why is not None]
    if any(operator.name == _KEEPS for graph in model.subgraphs for operator in graph.operators):
        found.append("It keeps state from one run to the next, as stateful layers do: load it anew to begin anew.")
    return [*found, f"{OPEN_BATCH}."] if model.has_open_batch else found


def brief_name(tensor):
    """What of a tensor's name, the converter's list of all that it has melted into one, tells the layer.

    Example:

    >>> from keras_sparse.tflite.inspect import brief_name
    >>> brief_name("net_1/bn_1/mul;net_1/conv_1/convolution;")
    'net_1/conv_1/convolution'
    """
    return next((part for part in reversed(tensor.split(";")) if part), tensor)


def _kernels(subgraph):
    """Which tensors hold kernels: `{number: axes that count output units}`."""
    packed = {o.outputs[0]: o.inputs[0] for o in subgraph.operators if o.name in UNPACK and o.inputs and o.outputs}
    found, axes = {}, operator_axes()
    for operator in subgraph.operators:
        for number in operator.inputs if operator.name in axes else ():
            for _ in UNPACK:  # float16 kernels that are sparse-encoded take both
                number = packed.get(number, number)
            if number >= 0 and len(subgraph.tensors[number].shape) >= 2:
                found.setdefault(number, axes[operator.name])
    return found


def _added(subgraph):
    """Numbers of the tensors that the kernels' operators take behind their first input: kernels, and biases."""
    known = operator_axes()
    return {n for operator in subgraph.operators if operator.name in known for n in operator.inputs[1:]}


def _pattern(tensor, zeros, output_axes):
    if output_axes is None or not zeros or tensor.size > _MOST * tensor.bytes:
        return ""
    name = patterns.recognize(patterns.to_matrix(tensor.values() != 0, output_axes))
    return "" if name == "unstructured" and zeros <= _FEW * tensor.size else name


def _row(tensor, subgraph, output_axes):
    block = "x".join(map(str, tensor.block)) if tensor.encoding == "sparse-block-csr" else ""
    zeros = tensor.zeros
    return {
        "tensor": tensor.name,
        "subgraph": subgraph,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "encoding": tensor.encoding,
        "block": block,
        "zeros": zeros,
        "sparsity": None if zeros is None or not tensor.size else zeros / tensor.size,
        "pattern": _pattern(tensor, zeros, output_axes),
        "bytes": tensor.bytes,
    }
