"""Wrapping puts a `SparseOptimizer` around the optimizer of a compiled model, and takes it off again."""

import contextlib
import types

import keras

from keras_sparse.optimizers.sparse import SparseOptimizer

__all__ = ["find", "unwrap", "wrap"]


def find(model):
    """Return the `SparseOptimizer` of a model, inside a `LossScaleOptimizer` too, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> ks.optimizers.find(model) is None
    True
    """
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, SparseOptimizer) else None


def wrap(model):
    """Put a `SparseOptimizer` around a compiled model's optimizer, unless there is one, and return it.

    While it is there, the model's compile config holds it, so that a file saved in the middle of `fit` goes on exactly
    when it is loaded.

    Raises:
        ValueError: If the model is not compiled, or trains with several optimizers.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> type(ks.optimizers.wrap(model)).__name__, type(ks.optimizers.unwrap(model)).__name__
    ('SparseOptimizer', 'Adam')
    """
    _check_optimizers(model)
    sparse = find(model)
    if sparse is None:
        outer = model.optimizer
        scaled = isinstance(outer, keras.optimizers.LossScaleOptimizer)
        with _scope(model):
            sparse = SparseOptimizer(outer.inner_optimizer if scaled else outer, temporary=True)
            if model.built and model.trainable_variables:
                sparse.build(model.trainable_variables)
        sparse.compiled = False
        if scaled:
            outer.inner_optimizer = sparse
        else:
            model.optimizer = sparse
        drop_functions(model)
    _shadow_compile_config(model)
    return sparse


def unwrap(model):
    """Take the `SparseOptimizer` off a model's optimizer, if there is one, and return the plain optimizer.

    The weights stay as they are. The inner optimizer keeps its state and serves further training as before.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer("sgd"), "mse")
    >>> type(ks.optimizers.unwrap(model)).__name__
    'SGD'
    """
    sparse = find(model)
    if sparse is not None:
        if model.optimizer is sparse:
            model.optimizer = sparse.inner_optimizer
        else:
            model.optimizer.inner_optimizer = sparse.inner_optimizer
        drop_functions(model)
        # A model that was compiled with the wrapper (or loaded so) must not save it any more: there the shadow stays.
        if sparse.compiled:
            _shadow_compile_config(model)
        else:
            del model.get_compile_config
    return getattr(model, "optimizer", None)


def drop_functions(model):
    """Forget the compiled train and test functions, which hold the optimizer they were traced with."""
    model.train_function = None
    model.test_function = None


def _shadow_compile_config(model):
    """Let a saved model have the optimizer that it holds now: Keras saves the one that `compile` saw."""
    model.get_compile_config = types.MethodType(_compile_config, model)


def _compile_config(model):
    config = type(model).get_compile_config(model)
    if "optimizer" in config:
        config["optimizer"] = keras.saving.serialize_keras_object(model.optimizer)
    return config


def _check_optimizers(model):
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"The model {model.name!r} has no optimizer: call `model.compile(optimizer, loss)` before training. "
            f"Received: {type(model).__name__}"
        )
    known = set()
    while optimizer is not None:
        known.add(id(optimizer))
        optimizer = getattr(optimizer, "inner_optimizer", None)
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


def _scope(model):
    """The distribution strategy's scope in which the model's variables live."""
    strategy = getattr(model, "distribute_strategy", None) if keras.backend.backend() == "tensorflow" else None
    return strategy.scope() if strategy is not None else contextlib.nullcontext()
