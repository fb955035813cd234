"""A file that others wrote is encoded anew: its zeros take no room, where the targets read that right."""

import os

from keras_sparse import files
from keras_sparse.reports import Report
from keras_sparse.tflite.choice import smallest_right
from keras_sparse.tflite.flatmodel import gzip_size, read
from keras_sparse.tflite.targets import NOT_SPARSE, chosen
from keras_sparse.tflite.verification import Verification, sparse_runtimes
from keras_sparse.tflite.verify import coarsest, reference_of_file

__all__ = ["encode"]

# Of the file's own outputs. Leaving out zeros changes nothing but the order of sums; only that 8-bit weights are
# restored as floats and multiplied so, where the dense file first rounds each input of the layer to 8 bits.
_TOLERANCE = 2e-3
_OF_INTEGERS = 2e-2


def encode(path, out, target="xnnpack"):
    """Store the zeros of any .tflite file sparsely, such as one that LiteRT's quantizer made of a pruned model.

    The new file is compared with the old one before anything is left at `out`, as `ks.tflite.export` compares it with a
    model: on this machine, on installed runtimes with sparse kernels if these could touch it, and on those of the
    targets.

    Args:
        path: A file with dense weights; it is run: use files that you trust.
        out: Where to write; must end in `.tflite`. May be `path`.
        target: As in `ks.tflite.export`; targets that read weights without their zeros.

    Returns:
        A `Report`. Totals: `encoding` (`"dense"` if a sparse one is not smaller, or not right), `bytes_file`,
        `bytes_gzip`, `bytes_dense`, `parity_relative`, `verified_on`, `not_verified`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no .tflite file, or cannot be run; if a target does not read such files.

    Example:

    >>> import os, tempfile, keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> _ = ks.prune(model, 0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.tflite")
    ...     _ = model.export(path, format="litert", verbose=False)
    ...     report = ks.tflite.encode(path, path)
    >>> report.totals["encoding"], report.totals["bytes_file"] < report.totals["bytes_dense"] / 3
    ('sparse', True)
    """
    targets = chosen(target)
    for each in targets:
        if not each.takes_sparse:
            raise ValueError(
                f"{each.title} must get the file as it is: {each.otherwise.text}. Received: target={each.name!r}"
            )
    if not targets or not os.fspath(out).endswith(".tflite"):
        raise ValueError(f"`encode` needs a `target`, and `out` must end in '.tflite'. Received: {target!r}, {out!r}")
    flat = read(path)
    dense = flat.content
    if flat.is_sparse:
        raise ValueError(f"The file must hold dense weights. Received: {os.fspath(path)!r}, which is encoded already")
    reference = reference_of_file(dense, dense)
    tolerance = _OF_INTEGERS if coarsest(flat) == "int8" else _TOLERANCE
    verification = Verification(dense, reference, tolerance, True, sparse_runtimes(), targets=targets)
    choice = smallest_right(dense, verification)
    with files.replacing(os.path.realpath(out)) as temporary, open(temporary, "wb") as file:
        file.write(choice.content)
    notes = choice.notes + [f"{NOT_SPARSE}."] * (choice.encoding != "dense")
    totals = {
        "encoding": choice.encoding,
        "bytes_file": len(choice.content),
        "bytes_gzip": gzip_size(choice.content),
        "bytes_dense": len(dense),
        "parity_relative": choice.parity.relative,
        "verified_on": choice.verified_on,
        "not_verified": choice.not_verified,
    }
    formats = dict.fromkeys(("bytes_file", "bytes_gzip", "bytes_dense"), ",d") | {"parity_relative": ".1e"}
    return Report(f"Encoding of {os.path.basename(path)}", [], totals, notes, formats)
