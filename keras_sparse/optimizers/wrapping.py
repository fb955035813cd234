"""Wrapping puts a `SparseOptimizer` around the optimizer of a compiled model, and takes it off again."""

import contextlib
import types

import keras
from keras import ops

from keras_sparse.optimizers.sparse import SparseOptimizer

__all__ = ["before_first_step", "find", "measuring", "unwrap", "wrap"]


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


@contextlib.contextmanager
def measuring(model):
    """Put an optimizer that moves nothing in the place of a compiled model's, for as long as the block lasts.

    What training changes all the same (normalization's averages, seeds, states, metrics) is put back at the end.

    Yields:
        A `SparseOptimizer`: `add_statistics` says what it measures.

    Raises:
        ValueError: As `wrap`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> before = model.get_weights()[0]
    >>> with ks.optimizers.measuring(model) as optimizer:
    ...     history = model.fit(np.ones((16, 8)), np.ones((16, 4)), verbose=0)
    >>> bool((model.get_weights()[0] == before).all()), type(model.optimizer).__name__
    (True, 'Adam')
    """
    _check_optimizers(model)
    previous, history = model.optimizer, getattr(model, "history", None)
    values = [(variable, ops.convert_to_numpy(ops.convert_to_tensor(variable))) for variable in model.variables]
    with _scope(model):
        sparse = SparseOptimizer(keras.optimizers.SGD(0.0))
        sparse.build(model.trainable_variables)
        scaled = isinstance(previous, keras.optimizers.LossScaleOptimizer)
        model.optimizer = (
            keras.optimizers.LossScaleOptimizer(sparse, initial_scale=previous.initial_scale) if scaled else sparse
        )
    drop_functions(model)
    try:
        yield sparse
    finally:
        model.optimizer, model.history = previous, history
        drop_functions(model)
        for variable, value in values:
            variable.assign(value)


def drop_functions(model):
    """Forget the compiled train and test functions, which hold the optimizer they were traced with."""
    model.train_function = None
    model.test_function = None


def before_first_step(model, action):
    """Call `action` in a `fit` on TensorFlow that builds the model, after that and before the first training step.

    TensorFlow alone builds a model inside of its first compiled step. Other backends have built it when `fit` begins.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.layers.Dense(4)])
    >>> model.compile("sgd", "mse")
    >>> class Tell(keras.callbacks.Callback):
    ...     def on_epoch_begin(self, epoch, logs=None):
    ...         if not self.model.built:
    ...             ks.optimizers.before_first_step(self.model, lambda: print(int(self.model.optimizer.iterations)))
    >>> history = model.fit(np.ones((16, 8)), np.ones((16, 4)), verbose=0, callbacks=[Tell()])
    0
    """
    if not isinstance(model.train_function, _FirstStep):
        model.train_function = _FirstStep(model)
    model.train_function.actions.append(action)


class _FirstStep:
    """A train function that traces the training step to build the model, acts, and goes on as the real one."""

    def __init__(self, model):
        self.model = model
        self.actions = []

    def __call__(self, iterator):
        import tensorflow as tf

        self.model.train_function = None
        data = tf.nest.map_structure(
            lambda spec: None if isinstance(spec, tf.OptionalSpec) else spec, iterator.element_spec
        )
        try:
            tf.function(self.model.train_step, autograph=False).get_concrete_function(data)
        except Exception as error:
            error.add_note("This came up while `fit` built the model for its callbacks: build it before, if it can.")
            raise
        for action in self.actions:
            action()
        self.model.make_train_function()
        return self.model.train_function(iterator)


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
