"""A model's compiled train function holds the optimizer's step as it was traced: when it must go, and when it may stay.

A fit with masks needs another function than a fit without. Both are kept, so that fits in a loop compile once.
"""

import weakref

import keras

__all__ = ["KEPT", "Kept", "before_first_step", "drop", "refresh"]

# What each model keeps of its last fit.
KEPT = weakref.WeakKeyDictionary()


def drop(model, in_fit=False):
    """Forget the compiled train function, which was traced with something else than there is now.

    Args:
        model: The model.
        in_fit: Whether a `fit` is on, which needs another function at once.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> _ = model.make_train_function()
    >>> ks.optimizers.functions.drop(model)
    >>> model.train_function is None
    True
    """
    model.train_function = None
    if keras.backend.backend() == "jax" and model in KEPT:
        # JAX knows a compiled function by the method that it was made from, as long as any function made from it
        # lives: a new one would be the old one again.
        KEPT[model].forget_plain()
    if in_fit:
        model.make_train_function()


def refresh(model, parts, in_fit=False):
    """Forget compiled steps if the parts have changed since they were compiled.

    Args:
        model: The model.
        parts: The `ks.optimizers.Parts`.
        in_fit: Whether a `fit` is on, which needs another train function at once.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    >>> ks.optimizers.functions.refresh(model, model.optimizer.sparse_parts)
    """
    if not parts.changed:
        return
    parts.changed = False
    parts.compiled.clear()
    drop(model, in_fit)


class Kept:
    """What is kept between fits of one model: its parts and the train function that was traced with them.

    Args:
        model: The model, whose fit with parts begins.
        parts: The `ks.optimizers.Parts`.
        function: The train function that was traced with them, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> optimizer = keras.optimizers.SGD()
    >>> model.compile(optimizer, "mse")
    >>> kept = ks.optimizers.functions.Kept(model, parts=None, function=None)
    >>> kept.leave(model)
    >>> kept.fits(model, optimizer)
    True
    >>> model.compile("adam", "mse")
    >>> kept.fits(model, optimizer)
    False
    """

    def __init__(self, model, parts, function):
        self.parts, self.function = parts, function
        self._optimizer = innermost_of(model)
        self._trained = [id(variable) for variable in model.trainable_variables]
        self._plain = model.train_function
        self.left = None
        model.train_function = function

    def leave(self, model):
        """Take the function with parts off the model, and put the plain one back."""
        self.function = model.train_function
        # A placeholder for a plain function that was never made: `compile` is known by what it puts in this place.
        self.left = self._plain if callable(self._plain) else _Placeholder(model)
        model.train_function = self.left

    def forget_plain(self):
        """Let the plain function be made anew after the fit."""
        self._plain = None

    def fits(self, model, optimizer):
        """Whether nothing was compiled anew since, so that the function may be used again."""
        return (
            self.left is not None
            and model.train_function is self.left
            and self._optimizer is optimizer
            and self._trained == [id(variable) for variable in model.trainable_variables]
        )


def innermost_of(model):
    """The optimizer that takes a model's steps."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


class _Placeholder:
    """A train function that makes the real one when it is called, which may be several fits later."""

    def __init__(self, model):
        self._model = model

    def __call__(self, *arguments):
        model = self._model
        model.train_function = None
        model.make_train_function()
        KEPT[model].left = model.train_function
        return model.train_function(*arguments)


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
    """A train function that traces the training step, acts, and goes on as the real one."""

    def __init__(self, model):
        self.model = model
        self.actions = []

    def __call__(self, *arguments):
        self.model.train_function = None
        if keras.backend.backend() == "tensorflow":
            self._trace(arguments[0])
        for action in self.actions:
            action()
        self.model.make_train_function()
        return self.model.train_function(*arguments)

    def _trace(self, iterator):
        import tensorflow as tf

        if not hasattr(iterator, "element_spec"):
            return
        data = tf.nest.map_structure(
            lambda spec: None if isinstance(spec, tf.OptionalSpec) else spec, iterator.element_spec
        )
        try:
            tf.function(self.model.train_step, autograph=False).get_concrete_function(data)
        except Exception as error:
            error.add_note("This came up while `fit` built the model for its callbacks: build it before, if it can.")
            raise
