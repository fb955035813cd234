"""An inspection lists what a .tflite file stores: its tensors, how they are encoded, how sparse they are."""

import math
import os

from keras_sparse.reports import Report
from keras_sparse.tflite.flatmodel import damaged, read

__all__ = ["inspect"]


def inspect(path):
    """List the stored tensors of any .tflite file: how each is encoded, how sparse it is, what it takes.

    Nothing is run: files of unknown origin are safe to inspect.

    Args:
        path: Path of a .tflite file.

    Returns:
        A `Report`. Columns: `tensor`, `subgraph`, `shape`, `dtype`, `encoding` (`"dense"`, `"sparse-csr"`,
        `"sparse-block-csr"`), `block` (such as `"1x4"`), `zeros`, `sparsity` (share of zeros), `bytes`. Totals: of the
        file, and over all stored tensors; `bytes_gzip` is what the file takes inside an app's package.

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
    rows = []
    with damaged(path):
        for number, subgraph in enumerate(model.subgraphs):
            for tensor in subgraph.tensors:
                if tensor.stored is not None:
                    rows.append(_row(tensor, number))
    numbers = [row for row in rows if row["zeros"] is not None]
    size, zeros = sum(math.prod(row["shape"]) for row in numbers), sum(row["zeros"] for row in numbers)
    totals = {
        "bytes": model.bytes,
        "bytes_gzip": model.bytes_gzip,
        "tensors": len(rows),
        "tensors_sparse": sum(row["encoding"] != "dense" for row in rows),
        "size": size,
        "zeros": zeros,
        "sparsity": zeros / size if size else 0.0,
    }
    formats = dict.fromkeys(("bytes", "bytes_gzip", "size", "zeros"), ",d")
    formats |= {"sparsity": ".2%", "shape": lambda shape: "x".join(map(str, shape)) or "scalar"}
    return Report(f"Tensors of {os.path.basename(path)}", rows, totals, formats=formats)


def _row(tensor, subgraph):
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
        "bytes": tensor.bytes,
    }
