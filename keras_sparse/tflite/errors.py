"""An error of an export says what a user can act on, where converters and interpreters raise walls of text."""

import errno
import re
import tempfile

__all__ = ["ExportError", "first_line", "raise_if_disk_full", "reason", "refusal"]


_ADVICE = {  # by what is missing
    # which it has, but for tensors of unknown channels
    r"\bConv[23]D|\bDepthwiseConv2d": "or give `keras.Input` the sizes that it leaves open: TFLite's convolutions need "
    "known channels",
    # by which Keras (3.15) finds out the sign of zeros
    r"\bBitwiseAnd": "such as `keras.ops.argmax` of floats: `keras.ops.top_k(x, 1)[1][..., 0]` is the same (of argmin, "
    "with -x)",
    r"\bLookupTable": "such as an `IntegerLookup`: export the part of the model behind it, and let the app look up",
}


class ExportError(ValueError):
    """A model was not exported: it cannot be converted, or the file does not compute what the model computes.

    Example:

    >>> import keras_sparse as ks
    >>> issubclass(ks.tflite.ExportError, ValueError)
    True
    """


def refusal(name, error):
    """The `ExportError` of a model that TensorFlow's converter did not convert.

    Args:
        name: Of the model.
        error: What was raised. An `ExportError` is returned as it is.

    Example:

    >>> from keras_sparse.tflite.errors import refusal
    >>> error = refusal("net", RuntimeError("a wall of text" + chr(10) + "TF Select ops: Erfinv, Roll"))
    >>> print(str(error).split(". ")[1])
    TFLite has no built-in operator for: Erfinv, Roll
    """
    if isinstance(error, ExportError):
        return error
    missing = re.findall(r"^(?:TF Select|Custom) ops: *(.+)$", str(error), re.MULTILINE)
    if missing:
        operators = ", ".join(sorted({name.strip() for line in missing for name in line.split(",")}))
        reason = f"TFLite has no built-in operator for: {operators}. Replace the layer that uses it"
        reason += "".join(f", {advice}" for missing, advice in _ADVICE.items() if re.search(missing, operators))
    else:
        reason = f"TensorFlow's converter gave up: {first_line(error)}"
    return ExportError(f"The model {name!r} cannot be converted to .tflite. {reason}.")


def raise_if_disk_full(error):
    """Raise an `OSError` if an error, of whatever type, says that there is no room on the disk.

    Example:

    >>> from keras_sparse.tflite.errors import raise_if_disk_full
    >>> raise_if_disk_full(ValueError("no such layer"))
    """
    if isinstance(error, OSError):
        raise error
    if re.search(r"No space left on device|File too large|Disk quota exceeded", str(error)):
        raise OSError(errno.ENOSPC, f"No space left for temporary files in {tempfile.gettempdir()!r}") from error


def reason(error):
    """Why a runtime cannot run a file: what the error of a `Worker` ends with in parentheses, or its first line.

    Example:

    >>> from keras_sparse.tflite.errors import reason
    >>> reason(ValueError("The file cannot be run on the runtime 'micro'. Received: m.tflite (no operator TILE (v1))"))
    'no operator TILE (v1)'
    """
    text = str(error).strip()
    return text.partition(" (")[2].removesuffix(")") or text.splitlines()[0]


def first_line(error):
    """Type and essence of an error whose message is a wall of text.

    Example:

    >>> from keras_sparse.tflite.errors import first_line
    >>> first_line(ValueError("no room" + chr(10) + "at the inn"))
    'ValueError: no room'
    """
    text = re.sub(r"loc\(.*?\)+: ?|<unknown>:0: |error: |\x1b\[\d*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    # Keras puts the layer first and what went wrong after it.
    text = " ".join(lines[:2]) if lines[0].startswith("Exception encountered") else lines[0]
    return f"{type(error).__name__}: {text[:300].rstrip('.')}"
