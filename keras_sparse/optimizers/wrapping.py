"""Wrapping makes the optimizer of a compiled model sparse for the time of a fit, and plain again."""

import contextlib

import keras

from keras_sparse.optimizers import functions, mid_fit
from keras_sparse.optimizers.sparse import SparseOptimizer, make_plain, make_sparse

__all__ = ["find", "unwrap", "wrap"]


def innermost(model):
    """The optimizer that takes a model's steps, inside a `LossScaleOptimizer` too, or `None`."""
    optimizer = getattr(model, "optimizer", None)
    return optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer


def find(model):
    """Return the `SparseOptimizer` of a model, inside a `LossScaleOptimizer` too, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> ks.optimizers.find(model) is None
    True
    """
    optimizer = innermost(model)
    return optimizer if isinstance(optimizer, SparseOptimizer) else None


def wrap(model):
    """Make a compiled model's optimizer sparse, unless it is, and return it.

    While it is, a file that the model is saved to holds the parts, so that training goes on exactly when it is loaded.

    Raises:
        ValueError: If the model is not compiled, trains with several optimizers, or on several machines by a strategy
            that Keras 3 does not support.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> optimizer = keras.optimizers.Adam()
    >>> model.compile(optimizer, "mse")
    >>> ks.optimizers.wrap(model) is optimizer is model.optimizer, ks.optimizers.find(model) is optimizer
    (True, True)
    >>> ks.optimizers.unwrap(model) is optimizer, ks.optimizers.find(model) is None
    (True, True)
    """
    check_optimizers(model)
    _check_strategy(model)
    sparse = find(model)
    if sparse is not None:
        return sparse
    optimizer = innermost(model)
    kept = functions.KEPT.pop(model, None)
    reuse = kept is not None and kept.fits(model, optimizer)
    with scope(model):
        sparse = make_sparse(optimizer, kept.parts if reuse else None)
        if model.built and model.trainable_variables and not sparse.built:
            sparse.build(model.trainable_variables)
    mid_fit.shadow_compile_config(model)
    if model.optimizer is not sparse:
        mid_fit.hide_in_files(model.optimizer, sparse.sparse_parts)
    kept = functions.Kept(model, sparse.sparse_parts, kept.function if reuse else None)
    functions.KEPT[model] = kept
    return sparse


def unwrap(model):
    """Make a model's optimizer plain, if it is sparse, and return it.

    The weights stay as they are, and so does the optimizer's own state.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer("sgd"), "mse")
    >>> type(ks.optimizers.unwrap(model)) is keras.optimizers.SGD
    True
    """
    sparse = find(model)
    if sparse is not None:
        for_good = sparse.sparse_parts.for_good
        sparse.sparse_parts.end_fit()
        sparse.sparse_parts.rewind_point.drop_unclaimed()  # It is as large as the model.
        make_plain(sparse)
        vars(model).pop("get_compile_config", None)
        if model.optimizer is not sparse:
            mid_fit.show_in_files(model.optimizer)
        if for_good or model not in functions.KEPT:
            functions.drop(model)
        else:
            functions.KEPT[model].leave(model)
    return getattr(model, "optimizer", None)


def check_optimizers(model):
    """Raise unless one optimizer trains the model, and it is compiled."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"The model {model.name!r} has no optimizer: call `model.compile(optimizer, loss)` before training. "
            f"Received: {type(model).__name__}"
        )
    known = {id(optimizer), id(innermost(model))}
    others = set()
    for name, value in vars(model).items():
        if name.startswith("_self_"):
            continue  # TensorFlow's list of the attributes that it tracks: the same objects again.
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(item, keras.optimizers.Optimizer) and id(item) not in known for item in items):
            others.add(name)
    if others:
        raise ValueError(
            "Callbacks can prune only what `model.optimizer` trains, and this model holds further optimizers: "
            f"{sorted(others)}. For a `train_step` that drives several optimizers, wrap each one in "
            "`ks.optimizers.SparseOptimizer(...)` and call `ks.update_masks(model, sparsity, optimizer=...)` yourself. "
            f"Received: {type(model).__name__} {model.name!r}"
        )


def _check_strategy(model):
    """Raise under a strategy for several machines that Keras 3 does not support."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    name = "ParameterServerStrategy" if isinstance(strategy, tf.distribute.ParameterServerStrategy) else None
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        cluster = strategy.cluster_resolver.cluster_spec().as_dict() if strategy.cluster_resolver else {}
        # Alone, as without a `TF_CONFIG`, it is a `MirroredStrategy`.
        name = "MultiWorkerMirroredStrategy" if sum(len(tasks) for tasks in cluster.values()) > 1 else None
    if name is not None:
        raise ValueError(
            "Keras 3 does not train on several machines with TensorFlow's parameter servers or "
            "`MultiWorkerMirroredStrategy`. On several devices of one machine use `tf.distribute.MirroredStrategy`; on "
            "several machines the JAX backend, `keras.distribution.initialize(...)` and `keras.distribution."
            "DataParallel()`, or the torch backend and its `DistributedDataParallel` in a loop of your own with "
            f"`ks.optimizers.SparseOptimizer` and `ks.update_masks`. Received: {name}"
        )


def scope(model):
    """The distribution strategy's scope in which the model's variables live."""
    strategy = getattr(model, "distribute_strategy", None) if keras.backend.backend() == "tensorflow" else None
    return strategy.scope() if strategy is not None else contextlib.nullcontext()
