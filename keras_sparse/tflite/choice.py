"""A choice is the smallest encoding of a file that computes what its model computes."""

from dataclasses import dataclass, field

from keras_sparse.tflite.encoding import OUTWEIGHED, encode
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.inspect import brief_name
from keras_sparse.tflite.parity import Parity

__all__ = ["Choice", "smallest_right"]


@dataclass
class Choice:
    """An encoding that was chosen, and why.

    Attributes:
        content: The file's bytes.
        encoding: `"sparse"` or `"dense"`.
        parity: The `Parity` of the file on this machine.
        bytes_sparse: Size of the sparse encoding; `None` if none was asked for.
        verified_on: Where it was compared with the model, in words.
        not_verified: For which targets it was not, in sentences.
        notes: List of sentences: what was weighed.

    Example:

    >>> Choice(b"", "dense", Parity(0.0, 0.0, "output_0")).notes
    []
    """

    content: bytes
    encoding: str
    parity: Parity
    bytes_sparse: int | None = None
    verified_on: list = field(default_factory=list)
    not_verified: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def smallest_right(dense, verification, sparse=True):
    """Choose the smallest encoding of a file that computes right numbers.

    Args:
        dense: Bytes of the file with dense weights.
        verification: The `Verification` of its encodings.
        sparse: Whether a sparse encoding may be chosen.

    Returns:
        A `Choice`.

    Raises:
        ExportError: If no encoding is right, the dense one included, or none could be compared where it must be.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.tflite.choice import smallest_right
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.verification import Verification
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> _ = ks.prune(model, 0.9)
    >>> job = Job(model)
    >>> conversion = convert(job)
    >>> choice = smallest_right(conversion.content, Verification.of(job, conversion))
    >>> choice.encoding, len(choice.content) < len(conversion.content) / 3
    ('sparse', True)
    """
    choice = _smallest(dense, verification, sparse)
    verification.check_strict()
    choice.not_verified = list(verification.not_verified)
    choice.verified_on, choice.notes = list(verification.verified_on), choice.notes + verification.notes
    return choice


def _smallest(dense, verification, sparse):
    size, faults, notes = None, [], []
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
        fault, parity = verification.fault(encoded.content)
        if fault is None:
            if faults:
                notes.append(
                    "Stored without zeros, but convolutions run dense: the file stays out of XNNPACK's sparse kernels. "
                    f"With them, {faults[0]}."
                )
            return Choice(encoded.content, "sparse", parity, size, notes=notes + _kept(encoded))
        faults.append(fault)
    if faults:
        notes.append(f"Stored dense, because the sparse-encoded file would not be safe to run: {faults[-1]}.")
    right, parity = verification.dense()
    if not right:
        raise ExportError(verification.why_wrong(parity))
    return Choice(dense, "dense", parity, size, notes=notes)


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
