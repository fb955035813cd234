"""Files are read with errors that say what was expected, and written whole or not at all."""

import contextlib
import os
import tempfile

import numpy as np

__all__ = ["inputs", "load_arrays", "replacing", "with_targets_if_any"]


def inputs(arrays):
    """The inputs of a model among arrays: what is not `y`, by name, or `x` if it is the only one.

    Args:
        arrays: An open .npz file, or a dict of arrays.

    Example:

    >>> from keras_sparse import files
    >>> files.inputs({"x": [1.0], "y": [2.0]}), files.inputs({"words": [1], "age": [2], "y": [0]})
    ([1.0], {'words': [1], 'age': [2]})
    """
    found = {name: arrays[name] for name in arrays if name != "y"}
    return found["x"] if list(found) == ["x"] else found


def with_targets_if_any(arrays):
    """Inputs and targets `y` among arrays, a tuple, or the inputs alone if there are no targets.

    Args:
        arrays: As in `inputs`.

    Example:

    >>> from keras_sparse import files
    >>> files.with_targets_if_any({"x": [1.0], "y": [2.0]}), files.with_targets_if_any({"x": [1.0]})
    (([1.0], [2.0]), [1.0])
    """
    return _with_targets(arrays) if "y" in arrays else inputs(arrays)


def _with_targets(arrays):
    return inputs(arrays), arrays["y"]


def load_arrays(path, what="inputs, by name or as `x`, and targets as `y`", read=_with_targets):
    """Return what `read` takes from an .npz file.

    Args:
        path: Path of the file.
        what: What it should hold, for the error message.
        read: Function from the open file, a dict of arrays, to the result.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no .npz file, is damaged, or lacks an array.

    Example:

    >>> from keras_sparse import files
    >>> files.load_arrays("no_such_file.npz")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no such file. Received: 'no_such_file.npz'
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no such file. Received: {path!r}")
    try:
        with open(path, "rb") as opened:  # NumPy leaves damaged files open
            file = np.load(opened)
            if isinstance(file, np.ndarray):
                raise ValueError("it is an .npy file, with one array")
            with file:
                return read(file)
    except Exception as error:  # whatever zip and NumPy readers raise on a damaged file
        raise ValueError(
            f"Expected an .npz file with arrays: {what}, as `numpy.savez(path, x=x, ...)` writes it. "
            f"Received: {path!r} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


@contextlib.contextmanager
def replacing(path, suffix=""):
    """Yield the path of a temporary file that becomes `path` if the block succeeds, and else leaves nothing.

    Args:
        path: Path to write to.
        suffix: What its name must end in.

    Raises:
        ValueError: If it ends in something else.
        IsADirectoryError: If there is a folder of that name.
        FileNotFoundError: If the folder that it should be in does not exist.

    Example:

    >>> import os, tempfile
    >>> from keras_sparse import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "note.txt")
    ...     with files.replacing(path) as temporary, open(temporary, "w") as file:
    ...         _ = file.write("whole")
    ...     os.listdir(folder)
    ['note.txt']
    """
    folder, name = os.path.split(os.path.abspath(path))
    if not name.endswith(suffix):
        raise ValueError(f"The output must end in '{suffix}'. Received: {path!r}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"The output must be a file, and there is a folder of that name. Received: {path!r}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The folder {folder!r} does not exist; create it first. Received: {path!r}")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
        yield os.path.join(temporary, name)
        os.replace(os.path.join(temporary, name), path)
