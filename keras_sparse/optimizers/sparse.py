"""A sparse optimizer is a Keras optimizer that keeps pruned weights at exactly zero after every step.

It is the user's own object: its class is replaced by a subclass, made on the fly, whose step runs the parts before and
after the step of its class (`torch.nn.utils.parametrize` does the same to modules). So nothing has to be forwarded:
every attribute, method, override and `isinstance` is that of the optimizer, because it is the optimizer.
"""

import keras

from keras_sparse.optimizers.compiled import run_compiled, run_update
from keras_sparse.optimizers.masks import Masks
from keras_sparse.optimizers.parts import Parts, SparseState
from keras_sparse.optimizers.proximal import Proximal
from keras_sparse.optimizers.rewinding import RewindPoint
from keras_sparse.optimizers.statistics import Statistics
from keras_sparse.optimizers.timing import FitClock
from keras_sparse.registry import serializable

__all__ = ["SparseOptimizer", "make_plain", "make_sparse"]

# Statistics see gradients before the masks do, and weights are shrunk before they are masked.
_PARTS = (FitClock, Statistics, Proximal, RewindPoint, Masks)
_CLASSES = {}


@serializable
class SparseOptimizer(keras.optimizers.Optimizer):
    """Makes an optimizer keep masked weights at zero: after each of its steps they are zeroed, in graph.

    `ks.callbacks.Pruning` makes `model.optimizer` sparse for the time of a `fit` by itself. Use the class directly for
    training loops of your own: `ks.update_masks` computes the masks.

    `SparseOptimizer(optimizer)` returns `optimizer` itself, made sparse: it is an instance of its own class and of this
    one, and has the attributes of both. `ks.optimizers.unwrap(model)` makes it plain again.

    In mixed precision it goes inside the `LossScaleOptimizer`. Masked weights are replaced by 0.0 rather than
    multiplied (a product keeps NaN and makes -0.0); moving averages of the weights (`use_ema`) are masked with them.
    Gradients of masked weights do not reach the optimizer's own computations.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` to make sparse, or its name.

    Attributes:
        sparse_parts: Its `ks.optimizers.Parts`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    >>> isinstance(model.optimizer, keras.optimizers.Adam)
    True
    >>> x, y = np.ones((16, 8)), np.ones((16, 4))
    >>> for step in range(4):
    ...     report = ks.update_masks(model, sparsity=0.25 * step)
    ...     loss = model.train_on_batch(x, y)
    >>> int((model.layers[0].kernel.numpy() == 0).sum())
    24
    """

    def __new__(cls, inner_optimizer=None, *arguments, **options):
        if cls is not SparseOptimizer:  # What `type(optimizer)(...)` makes is a plain optimizer of the user's class.
            return cls.plain_class(*(() if inner_optimizer is None else (inner_optimizer, *arguments)), **options)
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, (SparseOptimizer, keras.optimizers.LossScaleOptimizer)):
            raise ValueError(
                "`SparseOptimizer` wraps a plain optimizer; in mixed precision write "
                "`LossScaleOptimizer(SparseOptimizer(inner))`. "
                f"Received: inner_optimizer={type(inner_optimizer).__name__}"
            )
        return make_sparse(inner_optimizer, for_good=True)

    def __init__(self, inner_optimizer):
        """All is done: the optimizer keeps the state that it has."""

    @property
    def sparse_parts(self):
        return vars(self)["sparse_state"].parts

    def distribution_scope(self):
        """The scope of the `tf.distribute` strategy in which the optimizer's variables live, on TensorFlow."""
        return self._distribution_strategy.scope()

    def trained_variables(self):
        """List of the variables that it was built with."""
        return list(self._trainable_variables)

    @property
    def masks(self):
        """List of pairs `(variable, mask)`; a mask is a boolean variable, `True` where the weight lives."""
        return self.sparse_parts.masks.pairs

    def mask_of(self, variable):
        """The mask of a variable, or `None`."""
        return self.sparse_parts.masks.of(variable)

    def add_masks(self, variables):
        """Give each of `variables` a mask that keeps everything, unless it has one.

        Args:
            variables: Trainable variables of the model, which the optimizer was built with.
        """
        self.sparse_parts.masks.add(variables)

    def apply_masks(self):
        """Set masked weights, and their moving averages, to zero now. To be called outside of compiled functions."""
        self.sparse_parts.masks.apply()

    def build(self, variables):
        super().build(variables)
        self.sparse_parts.build(variables)

    # The step

    def apply(self, grads, trainable_variables=None):
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        self._around(super().apply, grads, trainable_variables)

    def apply_gradients(self, grads_and_vars):
        if type(self).plain_class.apply_gradients is keras.optimizers.Optimizer.apply_gradients:
            return super().apply_gradients(grads_and_vars)
        # An override keeps its way, and may never come to `apply`.
        grads, variables = zip(*grads_and_vars, strict=True)
        if not self.built:
            self.build(list(variables))
        results = []

        def inner(grads, variables):
            results.append(super(SparseOptimizer, self).apply_gradients(list(zip(grads, variables, strict=True))))

        self._around(inner, grads, variables, whole=False)
        return results[0]

    def update_step(self, gradient, variable, learning_rate):
        if self._is_of_keras:
            run_update(self, super().update_step, gradient, variable, learning_rate)
        else:
            super().update_step(gradient, variable, learning_rate)

    @property
    def _is_of_keras(self):
        plain = type(self).plain_class
        return plain is getattr(keras.optimizers, plain.__name__, None)

    def _around(self, inner, grads, variables, whole=True):
        """Run the parts around `inner(grads, variables)`, and compile all of it if it is the `whole` step."""
        parts = self.sparse_parts
        active = [part for part in parts if part.active]
        grads, known = list(grads), parts.trainable if variables is None else list(variables)
        parts.note_step(known, grads)
        if parts.stepping or not active or not parts.trainable or len(grads) != len(known):
            # Inside of an overridden `apply_gradients`, which may have changed the gradients that the masks left.
            if parts.stepping and parts.masks.active:
                grads = parts.pass_through([parts.masks], grads, [self._position(v) for v in known])
            inner(grads, variables)
            return
        indices = [self._position(variable) for variable in known]
        grads = parts.pass_through([part for part in active if part.ahead], grads, indices)
        active = [part for part in active if not part.ahead]

        def step(grads):
            parts.of_replica.stepping = True
            try:
                inner(parts.pass_through(active, grads, indices), variables)
            finally:
                parts.of_replica.stepping = False
            for part in active:
                part.after()

        key = (*(part.name for part in active), *indices) if whole else None
        run_compiled(self, key, step, grads, self._is_of_keras and all(isinstance(part, _PARTS) for part in active))

    def _position(self, variable):
        index = self.sparse_parts.index(variable)
        return self._trainable_variables_indices.get(self._var_key(variable)) if index is None else index

    def finalize_variable_values(self, var_list):
        shrunk = self.sparse_parts.proximal.shrunk()
        alive = [keras.ops.not_equal(variable, 0) for variable in shrunk]
        super().finalize_variable_values(var_list)
        if self.use_ema:  # The weights are their moving averages now: what was zero at last is zero in them, too.
            for variable, mask in zip(shrunk, alive, strict=True):
                variable.assign(keras.ops.where(mask, keras.ops.convert_to_tensor(variable), 0.0))
            self.sparse_parts.masks.apply()

    # State and files

    @property
    def variables(self):
        # JAX hands the state from step to step; elsewhere the parts' variables are nobody else's business.
        stateless = keras.backend.backend() == "jax" and not self.sparse_parts.hidden
        return super().variables + (self.sparse_parts.variables if stateless else [])

    def save_own_variables(self, store):
        with self.sparse_parts.files():
            super().save_own_variables(store)

    def load_own_variables(self, store):
        with self.sparse_parts.files():
            super().load_own_variables(store)

    def get_config(self):
        if not self.sparse_parts.for_good or self.sparse_parts.hidden:
            return super().get_config()
        with self.sparse_parts.files():  # There it passes for a plain one.
            return {"inner_optimizer": keras.saving.serialize_keras_object(self)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if "inner_optimizer" not in config:
            return cls.plain_class.from_config(config)
        return SparseOptimizer(
            keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        )


def make_sparse(optimizer, parts=None, for_good=False):
    """Turn a plain optimizer into a sparse one, in place, and return it.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
        parts: The `Parts` that it had before `make_plain`, or `None` for new ones.
        for_good: Whether it stays sparse when a `fit` ends.

    Example:

    >>> import keras, keras_sparse as ks
    >>> optimizer = keras.optimizers.Adam(0.5)
    >>> ks.optimizers.sparse.make_sparse(optimizer) is optimizer, optimizer.__class__ is keras.optimizers.Adam
    (True, True)
    >>> isinstance(optimizer, ks.optimizers.SparseOptimizer)
    True
    """
    plain = type(optimizer)
    loaded = vars(optimizer).get("sparse_state")
    parts = Parts(_PARTS) if parts is None else parts
    parts.optimizer, parts.for_good = optimizer, for_good
    parts.loaded = None if loaded is None else loaded.parts.loaded
    if parts.state is None:
        parts.state = SparseState(parts)
    optimizer.sparse_state = parts.state
    if plain not in _CLASSES:
        # What it passes for: its own class, or `SparseOptimizer` if it was made sparse for good.
        passes_for = property(
            lambda self: SparseOptimizer if self.sparse_parts.for_good and not self.sparse_parts.hidden else plain
        )
        members = {
            "plain_class": plain,
            "__class__": passes_for,
            "__module__": plain.__module__,
            "__doc__": plain.__doc__,
        }
        _CLASSES[plain] = type(plain.__name__, (SparseOptimizer, plain), members)
    _set_class(optimizer, _CLASSES[plain])
    if optimizer.built:
        parts.build(optimizer.trained_variables())
    return optimizer


def make_plain(optimizer):
    """The inverse of `make_sparse`: return the optimizer with its own class, and without parts.

    Example:

    >>> import keras, keras_sparse as ks
    >>> optimizer = ks.optimizers.SparseOptimizer("adam")
    >>> type(ks.optimizers.sparse.make_plain(optimizer)) is keras.optimizers.Adam
    True
    """
    _set_class(optimizer, type(optimizer).plain_class)
    optimizer.sparse_state.parts.optimizer = None
    del optimizer.sparse_state
    return optimizer


def _set_class(optimizer, kind):
    vars(object)["__class__"].__set__(optimizer, kind)
