"""A wrapper of tfmot stands around a layer in the file: which layer it is, and what its variables do to the weights."""

import re

import numpy as np

__all__ = ["PRUNED", "inner", "merge", "split"]

# The variables that each wrapper adds to those of its layer.
_ADDED = {
    "PruneLowMagnitude": r"mask(_\d+)?|threshold(_\d+)?|pruning_step",
    "ClusterWeights": r"cluster_centroids_.+|pulling_indices_.+",
    "QuantizeAnnotate": r"optimizer_step",
    "QuantizeWrapper": r"optimizer_step|.+_(min|max)",
    "QuantizeWrapperV2": r"optimizer_step|.+_(min|max)",
    "QuantizeLayer": r"optimizer_step|.+_(min|max)",
}
# What tfmot prunes in a layer, in the order of its masks; other layers are its users' own.
PRUNED = ("pointwise_kernel", "kernel", "embeddings", "recurrent_kernel")


def inner(config):
    """Return the configuration of a layer without the wrapper of tfmot around it.

    Args:
        config: The configuration of a layer, `{"class_name": ..., "config": ...}`.

    Returns:
        The configuration of the layer and a list of the wrappers around it, `(class name, configuration)` from the
        outermost on. `None` in place of the configuration if the wrapper stands alone (`QuantizeLayer`).

    Example:

    >>> from keras_sparse.compat import wrappers
    >>> dense = {"class_name": "Dense", "config": {"name": "dense", "units": 3}}
    >>> pruned = {"class_name": "PruneLowMagnitude", "config": {"name": "prune_low_magnitude_dense", "layer": dense}}
    >>> layer, around = wrappers.inner(pruned)
    >>> layer["config"]["name"], around[0][0]
    ('dense', 'PruneLowMagnitude')
    """
    around = []
    while isinstance(config, dict) and config.get("class_name", "").split(">")[-1] in _ADDED:
        name, outer = config["class_name"].split(">")[-1], config["config"]
        around.append((name, outer))
        if name == "QuantizeLayer":
            return None, around
        config = dict(outer["layer"])
        if "batch_input_shape" in outer:  # The first layer of a Sequential.
            config["config"] = {"batch_input_shape": outer["batch_input_shape"], **config["config"]}
    own = config.get("config") if isinstance(config, dict) else None
    held = own.get("layer") if isinstance(own, dict) else None
    if isinstance(held, dict) and held.get("class_name", "").split(">")[-1] in _ADDED:  # in a `TimeDistributed`
        layer, inside = inner(held)
        # The variables of what is inside bear the name of the layer that holds it.
        around += [(name, {**outer, "name": own.get("name")}) for name, outer in inside]
        config = {**config, "config": {**own, "layer": layer}}
    return config, around


def split(arrays, around):
    """Take the variables of wrappers out of a list of arrays.

    Args:
        arrays: List of pairs of a name and an array.
        around: The wrappers, as `inner` lists them.

    Returns:
        The other arrays, and a dict of the wrappers' variables, lists of arrays by name.

    Example:

    >>> from keras_sparse.compat import wrappers
    >>> arrays = [("dense/kernel", 1), ("prune_dense/mask", 2), ("prune_dense/pruning_step", 3)]
    >>> wrappers.split(arrays, [("PruneLowMagnitude", {"name": "prune_dense"})])
    ([('dense/kernel', 1)], {'mask': 2, 'pruning_step': 3})
    """
    patterns = {config["name"]: _ADDED[name] for name, config in around}
    left, added = [], {}
    for path, array in arrays:
        *_, owner, name = ["", *path.split("/")]
        if owner in patterns and re.fullmatch(patterns[owner], name):
            added[name] = array
        else:
            left.append((path, array))
    return left, added


def merge(values, around, added):
    """Return what a layer computes with: its weights under masks, or as centroids of clusters.

    Args:
        values: List of pairs of the name of a weight and its array.
        around: The wrappers, as `inner` lists them.
        added: Their variables, as `split` returns them.

    Returns:
        List of arrays.

    Raises:
        ValueError: If a mask or a list of clusters fits no weight.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.compat import wrappers
    >>> values = [("kernel", np.array([3.0, -2.0])), ("bias", np.array([1.0]))]
    >>> around = [("PruneLowMagnitude", {"name": "prune_dense"})]
    >>> wrappers.merge(values, around, {"mask": np.array([1.0, 0.0])})
    [array([3., 0.]), array([1.])]
    """
    names, arrays = [name for name, _ in values], [array for _, array in values]
    free = sorted(range(len(names)), key=lambda i: PRUNED.index(names[i]) if names[i] in PRUNED else len(PRUNED))
    for name, mask in added.items():
        if name.startswith("mask"):
            chosen = next((i for i in free if arrays[i].shape == mask.shape), None)
            if chosen is None:
                raise ValueError(f"A mask of shape {mask.shape} fits no weight of the layer.")
            free.remove(chosen)
            arrays[chosen] = np.where(mask == 0, np.zeros_like(arrays[chosen]), arrays[chosen])
    clusters = [config for name, config in around if name == "ClusterWeights"]
    for name, centroids in added.items():
        if name.startswith("cluster_centroids_"):
            weight = name.removeprefix("cluster_centroids_")
            if weight not in names:
                raise ValueError(f"Centroids are named for the weight {weight!r}, and the layer has {names}.")
            arrays[names.index(weight)] = _clustered(arrays[names.index(weight)], centroids, clusters[0])
    return arrays


def _clustered(weight, centroids, config):
    """The centroid that is nearest to each weight; tfmot looks it up anew in each call."""
    if centroids.ndim not in (1, 2) or not centroids.size:
        raise ValueError(f"Centroids of shape {centroids.shape} are no lists of numbers.")
    per_channel = centroids.ndim == 2
    if per_channel and (not weight.ndim or len(centroids) != weight.shape[-1]):
        raise ValueError(f"{len(centroids)} lists of centroids do not fit a weight of shape {weight.shape}.")
    clustered = np.empty_like(weight)
    for channel in range(len(centroids) if per_channel else 1):
        where, own = ((..., channel), centroids[channel]) if per_channel else (..., centroids)
        best = np.zeros(weight[where].shape, int)
        distance = np.abs(weight[where] - own[0])
        for i, centroid in enumerate(own[1:], 1):
            nearer = np.abs(weight[where] - centroid) < distance
            best[nearer], distance[nearer] = i, np.abs(weight[where] - centroid)[nearer]
        clustered[where] = own[best]
    if config.get("preserve_sparsity"):
        clustered[weight == 0] = 0
    return clustered
