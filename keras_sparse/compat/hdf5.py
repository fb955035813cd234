"""A Keras 2 file is a configuration and arrays in HDF5, read without trusting it: no links, no code, no huge sizes."""

import json
import os

import numpy as np

__all__ = ["in_a_line", "read"]

# Filters of HDF5 compress zeros by about this much at best; a larger ratio is a trap.
_MOST_COMPRESSED = 1100


def read(path):
    """Return the configuration and the weights of a model that Keras 2 saved as `.h5`.

    Args:
        path: Path of the file.

    Returns:
        The model's configuration, a dict, and a dict that gives for each layer at the top a list of pairs of a name
        and an array, in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no HDF5 file, damaged, or holds no model of Keras 2.

    Example:

    >>> from keras_sparse.compat import hdf5
    >>> hdf5.read("model.keras")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no such file. Received: 'model.keras'
    """
    import h5py

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no such file. Received: {path!r}")
    if not h5py.is_hdf5(path):
        raise ValueError(
            "Expected an `.h5` file that Keras 2 (`tf_keras`) saved; a `.keras` file of Keras 3 is read by "
            f"`keras.saving.load_model`. Received: {path!r}, which is no HDF5 file"
        )
    try:
        with h5py.File(path, "r") as file:
            config = _config(file)
            return config, _weights(_child(file, "model_weights", h5py.Group), os.path.getsize(path))
    except (OSError, KeyError, TypeError, RuntimeError, AttributeError, UnicodeError, RecursionError, OverflowError,
            MemoryError, SystemError) as error:  # fmt: skip
        raise ValueError(
            f"The file is damaged ({type(error).__name__}: {in_a_line(error)}). Received: {path!r}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{in_a_line(error)} Received: {path!r}") from error


def in_a_line(error, limit=400):
    r"""What an error says, in a line of at most so many characters.

    Example:

    >>> from keras_sparse.compat import hdf5
    >>> hdf5.in_a_line(ValueError("one\n  two"), limit=5)
    'one t...'
    """
    text = " ".join(str(error).split())
    return text if len(text) < limit else f"{text[:limit]}..."


def _text(value):
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _config(file):
    version = _text(file.attrs.get("keras_version", "2"))
    if "model_config" not in file.attrs:
        raise ValueError(
            "The file holds weights and no model: it was written by `save_weights`, or by a model that Keras 2 could "
            "not describe. Save the whole model with `model.save('model.h5')`."
        )
    if not version.startswith(("1", "2")):
        raise ValueError(
            f"The file was written by Keras {version}, not by Keras 2: `keras.saving.load_model` reads it."
        )
    config = json.loads(_text(file.attrs["model_config"]))
    if not isinstance(config, dict) or not isinstance(config.get("config"), (dict, list)):
        raise ValueError("The file's `model_config` describes no model.")
    return config


def _names(group, attribute):
    """A list of names that may be spread over several attributes, since one holds 64 kB at most."""
    if attribute in group.attrs:
        return [_text(name) for name in group.attrs[attribute]]
    names, part = [], 0
    while f"{attribute}{part}" in group.attrs:
        names += [_text(name) for name in group.attrs[f"{attribute}{part}"]]
        part += 1
    return names


def _child(group, name, kind):
    """What is stored under a name, if it is in this file and of the right kind."""
    import h5py

    for part in name.strip("/").split("/"):
        if part not in group or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"The file is damaged: {name!r} is missing, or a link to somewhere else.")
        group = group[part]
    if not isinstance(group, kind):
        raise ValueError(f"The file is damaged: {name!r} is no {kind.__name__.lower()}.")
    return group


def _weights(group, file_size):
    import h5py

    weights, left = {}, file_size * _MOST_COMPRESSED
    for layer in [*_names(group, "layer_names"), "top_level_model_weights"]:
        if layer == "top_level_model_weights" and layer not in group:
            continue
        inner = _child(group, layer, h5py.Group)
        arrays = []
        for name in _names(inner, "weight_names"):
            dataset = _child(inner, name, h5py.Dataset)
            left -= _checked(dataset, name)
            if left < 0:
                raise ValueError("The file is damaged: it refers to more data than it can hold.")
            arrays.append((name.removesuffix(":0"), np.asarray(dataset[()])))
        weights[layer] = arrays
    return weights


def _checked(dataset, name):
    """The number of bytes of a dataset that is stored in this file, as numbers."""
    size = int(dataset.dtype.itemsize * np.prod([float(n) for n in dataset.shape or ()]))
    stored = dataset.id.get_storage_size()
    if dataset.dtype.kind not in "fiub" or dataset.is_virtual or dataset.external or dataset.shape is None:
        raise ValueError(f"The file is damaged: {name!r} holds no numbers of its own.")
    if size > stored * (_MOST_COMPRESSED if dataset.chunks else 1):
        raise ValueError(f"The file is damaged: {name!r} should have {size} bytes, and {stored} are stored.")
    return size
