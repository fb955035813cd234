"""A sparse optimizer wraps a Keras optimizer and keeps masked weights at exactly zero after every step.

The masks are variables of the optimizer, so they are checkpointed, sharded and compiled like any other state
(`keras.optimizers.LossScaleOptimizer` is built the same way). So are the statistics of gradients that criteria ask for.
"""

import contextlib

import keras
from keras import ops

from keras_sparse.optimizers.assignment import assign_in_step, mask_off, masked_value
from keras_sparse.optimizers.origin import Origin
from keras_sparse.optimizers.proximal import next_pace
from keras_sparse.optimizers.slots import restart, slots
from keras_sparse.optimizers.statistics import Statistic, dense_gradients
from keras_sparse.registry import serializable

__all__ = ["SparseOptimizer"]


@serializable
class SparseOptimizer(keras.optimizers.Optimizer):
    """Applies another optimizer's step, then zeroes the masked weights, in graph.

    `ks.callbacks.Pruning` wraps and unwraps `model.optimizer` by itself. Use the class directly for training loops of
    your own: `ks.update_masks` computes the masks.

    In mixed precision it goes inside the `LossScaleOptimizer`. Masked weights are replaced by 0.0 rather than
    multiplied (a product keeps NaN and makes -0.0); moving averages of the weights (`use_ema`) are masked with them.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` to wrap, or its name.
        name: Optional name.
        masked: Indices into the variables that `build` receives: those with a mask. Masks are added by `add_masks`
            otherwise; this is how a saved optimizer finds them again.
        statistics: Dict from a kind of gradient statistic to such indices, likewise; see `add_statistics`.
        origin: Whether it holds a copy of the weights to go back to, an `Origin`.
        clocks: How many callbacks have a last update in it; see `last_update`.
        temporary: Whether the last callback that uses the wrapper takes it off.
        shrinkage: A `Shrinkage`, or `None`: what is shrunk after each step, by `strength`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    >>> x, y = np.ones((16, 8)), np.ones((16, 4))
    >>> for step in range(4):
    ...     report = ks.update_masks(model, sparsity=0.25 * step)
    ...     loss = model.train_on_batch(x, y)
    >>> int((model.layers[0].kernel.numpy() == 0).sum())
    24
    """

    def __init__(
        self,
        inner_optimizer,
        name=None,
        masked=(),
        statistics=None,
        origin=False,
        clocks=0,
        temporary=False,
        shrinkage=None,
    ):
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, (SparseOptimizer, keras.optimizers.LossScaleOptimizer)):
            raise ValueError(
                "`SparseOptimizer` wraps a plain optimizer; in mixed precision write "
                "`LossScaleOptimizer(SparseOptimizer(inner))`. "
                f"Received: inner_optimizer={type(inner_optimizer).__name__}"
            )
        # The learning rate is the inner optimizer's; a function keeps the base class from making a variable for it.
        super().__init__(learning_rate=lambda: inner_optimizer.learning_rate, name=name)
        self.inner_optimizer = inner_optimizer
        self.temporary = temporary
        self.shrinkage = keras.saving.deserialize_keras_object(shrinkage) if isinstance(shrinkage, dict) else shrinkage
        # Whether `compile` saw this object; `wrap` says otherwise.
        self.compiled = True
        self.users = []
        self._updated = [None] * clocks
        self._masked = list(masked)
        self._masks = []
        self._statistics = {kind: list(indices) for kind, indices in (statistics or {}).items()}
        self.origin = origin

    # State

    def build(self, variables):
        """Create the inner optimizer's variables, the clock, and a mask for each index in `masked`.

        Args:
            variables: The model's trainable variables.
        """
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        # Not `super().build`: it would add moving averages and gradient accumulators, which the inner optimizer has.
        # And not by assignment, which would make the model's variables the optimizer's own.
        vars(self)["_trainable_variables"] = list(variables)
        self._trainable_variables_indices = {self._var_key(v): i for i, v in enumerate(variables)}
        self.built = True
        # Optimizer steps: when clocks started, how many a schedule counts as 1.0 (0: not known), those taken back.
        self.start, self.length, self.rewound = (self._add_counter(name) for name in ("start", "length", "rewound"))
        # The price of a weight's magnitude, and how fast a constant gradient moves weights: for a `shrinkage` only.
        self.strength, self.pace = (
            self.add_variable((), "zeros", "float32", aggregation="only_first_replica", name=name)
            for name in ("strength", "pace")
        )
        clocks, self._updated = len(self._updated), []
        masked, self._masked = self._masked, []
        statistics, self._statistics = dict(self._statistics), {}
        origin, self.origin = self.origin, None
        for name, indices in {"masked": masked, **statistics}.items():
            if any(not 0 <= index < len(variables) for index in indices):
                raise ValueError(
                    f"`{name}` must hold indices into the {len(variables)} trainable variables. "
                    f"Received: {name}={indices}"
                )
        if clocks:
            self.last_update(clocks - 1)
        for index in masked:
            self._add_mask(index)
        for kind, indices in statistics.items():
            self.add_statistics(kind, [variables[index] for index in indices])
        if origin:
            self.add_origin()

    def add_variable(self, *args, **kwargs):
        # In the strategy's scope even if a callback adds it later: each replica updates its own copy.
        with self._scope():
            return super().add_variable(*args, **kwargs)

    def _scope(self):
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            if not tf.distribute.has_strategy():
                return self._distribution_strategy.scope()
        return contextlib.nullcontext()

    def _add_counter(self, name, value=0):
        return self.add_variable(
            (), keras.initializers.Constant(value), "int", aggregation="only_first_replica", name=name
        )

    def _add_mask(self, index):
        variable = self._trainable_variables[index]
        mask = self.add_variable(variable.shape, "ones", "bool", name=f"{variable.path.replace('/', '_')}_mask")
        self._masked.append(index)
        self._masks.append(mask)

    def add_masks(self, variables):
        """Give each of `variables` a mask that keeps everything, unless it has one.

        Args:
            variables: Trainable variables of the model, which the optimizer was built with.

        Returns:
            Whether any mask was created. Compiled train functions must be made anew then.

        Example:

        >>> import keras, keras_sparse as ks
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
        >>> optimizer.build(model.trainable_variables)
        >>> optimizer.add_masks([model.layers[0].kernel])
        True
        """
        new = [index for index in self._indices(variables) if index not in self._masked]
        for index in new:
            self._add_mask(index)
        return bool(new)

    def add_statistics(self, kind, variables):
        """Keep a statistic of the gradients of each of `variables` from now on, unless that is done already.

        Args:
            kind: `"gradient"`, `"taylor"`, `"movement"` or `"last_gradient"`: what a criterion's `statistic` says. See
                `ks.optimizers.statistics.Statistic`.
            variables: As in `add_masks`.

        Returns:
            Whether any statistic was created. Compiled train functions must be made anew then.

        Example:

        >>> import keras, numpy as np, keras_sparse as ks
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.5))
        >>> optimizer.build(model.trainable_variables)
        >>> kernel = model.layers[0].kernel
        >>> optimizer.add_statistics("movement", [kernel])
        True
        >>> optimizer.apply([keras.ops.convert_to_tensor([[3.0], [-1.0]]), keras.ops.zeros((1,))])
        >>> keras.ops.convert_to_numpy(optimizer.statistic_of(kernel, "movement").value).tolist()
        [[-3.0], [1.0]]
        """
        statistic = self._statistics.get(kind) or Statistic(kind, self.add_variable)
        new = [index for index in self._indices(variables) if index not in statistic.indices]
        for index in new:
            statistic.add(index, self._trainable_variables[index])
        self._statistics[kind] = statistic
        return bool(new)

    def add_origin(self):
        """Make room for a copy of the trainable variables, unless there is. Returns as `add_masks` does."""
        if self.origin:
            return False
        with self._scope():
            self.origin = Origin(self._trainable_variables, self.add_variable_from_reference)
        return True

    def rewind(self):
        """Take variables back to the origin, masked ones at zero, and the inner optimizer to the start of the fit."""
        self.origin.put_back()
        self.apply_masks()
        start = _int(self.start)
        self.rewound.assign(_int(self.rewound) + _int(self.iterations) - start)
        with self._scope():
            restart(self.inner_optimizer, self._trainable_variables, start)

    def _indices(self, variables):
        indices = {id(v): i for i, v in enumerate(self._trainable_variables)}
        unknown = [v.path for v in variables if id(v) not in indices]
        if unknown:
            raise ValueError(
                "Only variables that the optimizer was built with can be masked; it was built with "
                f"{len(self._trainable_variables)} trainable variables. Received: {unknown}"
            )
        return [indices[id(v)] for v in variables]

    def start_clock(self):
        """Let the clock start at the present step, unless it is running: in an interrupted or resumed fit."""
        if _int(self.length) == 0:
            self.start.assign(_int(self.iterations))

    def last_update(self, position):
        """The variable with the step of the last update, -1 before that, of the callback at `position` in a `fit`."""
        while len(self._updated) <= position:
            self._updated.append(self._add_counter(f"updated_{len(self._updated)}", -1))
        return self._updated[position]

    def stop_clock(self):
        """Make the next `start_clock` start anew; keep no statistics, no origin. Returns whether there were any."""
        self.length.assign(0)
        self.rewound.assign(0)
        dropped = [variable for statistic in self._statistics.values() for variable in statistic.variables]
        dropped += self.origin.variables if self.origin else []
        for variable in [*dropped, *self._updated]:
            self._untrack_variable(variable)
        self._statistics, self.origin, self._updated = {}, None, []
        return bool(dropped)

    @property
    def masks(self):
        """List of pairs `(variable, mask)`; a mask is a boolean variable, `True` where the weight lives."""
        return [(self._trainable_variables[i], mask) for i, mask in zip(self._masked, self._masks, strict=True)]

    def mask_of(self, variable):
        """The mask of `variable`, or `None`."""
        return next((mask for masked, mask in self.masks if masked is variable), None)

    def statistic_of(self, variable, kind):
        """The statistic of `variable` as a variable of its shape, or `None`; see `add_statistics`."""
        statistic = self._statistics.get(kind)
        pairs = zip(statistic.indices, statistic.values, strict=True) if statistic else ()
        return next((value for index, value in pairs if self._trainable_variables[index] is variable), None)

    def count_of(self, kind):
        """How many micro-steps the statistic has seen, as an integer variable."""
        return self._statistics[kind].count

    @property
    def variables(self):
        return self._own_variables() + self.inner_optimizer.variables

    def _own_variables(self):
        # A saved optimizer makes last updates, masks and statistics in this order, whenever they came to this one.
        later = [*self._updated, *self._masks]
        later += [v for _, statistic in sorted(self._statistics.items()) for v in statistic.variables]
        known = {id(v) for v in later}
        return [v for v in self._variables if id(v) not in known] + later

    def save_own_variables(self, store):
        # Not `self.variables`: Keras saves the inner optimizer, a child, by itself.
        for index, variable in enumerate(self._own_variables()):
            store[str(index)] = ops.convert_to_numpy(ops.convert_to_tensor(variable))

    def load_own_variables(self, store):
        own = self._own_variables()
        if len(store.keys()) != len(own):
            raise ValueError(
                f"The saved state of {self.name!r} has {len(store.keys())} variables, but {len(own)} are expected: "
                "the masks belong to another selection of weights, or to another criterion. Train with the same "
                "`filters`, `target_sparsity` and `criterion` as the run that saved it, or start from a fresh backup "
                "folder."
            )
        for index, variable in enumerate(own):
            variable.assign(store[str(index)])

    # The step

    def apply(self, grads, trainable_variables=None):
        """Apply the inner optimizer's step, then set masked weights to zero.

        Args:
            grads: List of gradients.
            trainable_variables: The variables they belong to; optional once the optimizer is built.
        """
        if not self.built:
            if trainable_variables is None:
                raise ValueError(
                    "The optimizer is not built: call `optimizer.build(model.trainable_variables)` first, or pass "
                    "`trainable_variables`."
                )
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        if self._statistics:
            self._update_statistics(grads, trainable_variables)
        shrinkage = self.shrinkage
        if shrinkage is not None:
            # Of the step to be taken: a schedule moves on with it.
            rate = ops.cast(self.learning_rate, "float32")
            before = ops.copy(ops.convert_to_tensor(self.iterations))
        self.inner_optimizer.apply(grads, trainable_variables)
        if shrinkage is not None:
            # A step that only accumulates gradients does not count as an iteration.
            moved = ops.cast(ops.convert_to_tensor(self.iterations) - before, "float32")
            states = slots(self.inner_optimizer, self._trainable_variables)
            optimizer, variables = self.inner_optimizer, self._trainable_variables
            assign_in_step([(self.pace, lambda *values: next_pace(optimizer, *values), [rate, moved])])
            assign_in_step(shrinkage.changes(optimizer, rate, self.pace, moved, self.strength, variables, states))
        assign_in_step([(variable, mask_off, [mask]) for variable, mask in self._masked_state()])

    def _update_statistics(self, grads, trainable_variables):
        wanted = {index for statistic in self._statistics.values() for index in statistic.indices}
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        # `grads` goes on as it is: the inner optimizer unscales and reduces by itself.
        found = {
            index: gradient
            for index, gradient in zip(map(self._get_variable_index, variables), grads, strict=True)
            if index in wanted
        }
        found = dense_gradients(found, self.loss_scale_factor)
        for statistic in self._statistics.values():
            statistic.update(found, self._trainable_variables, self.iterations, bool(self.gradient_accumulation_steps))

    def finalize_variable_values(self, var_list):
        shrunk = [] if self.shrinkage is None else [self._trainable_variables[i] for i in self.shrinkage.indices]
        alive = [ops.not_equal(variable, 0) for variable in shrunk]
        self.inner_optimizer.finalize_variable_values(var_list)
        if self.use_ema:  # The weights are their moving averages now: what was zero at last is zero in them, too.
            for variable, mask in zip(shrunk, alive, strict=True):
                variable.assign(masked_value(variable, mask))
            self.apply_masks()

    def apply_masks(self):
        """Set masked weights, and their moving averages, to zero now. To be called outside of compiled functions.

        Example:

        >>> import keras, numpy as np, keras_sparse as ks
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
        >>> optimizer.build(model.trainable_variables)
        >>> kernel = model.layers[0].kernel
        >>> _ = optimizer.add_masks([kernel])
        >>> _ = optimizer.mask_of(kernel).assign(np.zeros((8, 4), bool))
        >>> optimizer.apply_masks()
        >>> float(abs(kernel.numpy()).sum())
        0.0
        """
        for variable, mask in self._masked_state():
            variable.assign(masked_value(variable, mask))

    def _masked_state(self):
        pairs = self.masks
        if self.use_ema and pairs:
            states = slots(self.inner_optimizer, self._trainable_variables)
            averages = {index: state for index, kind, state in states if kind == "average"}
            pairs += [(averages[index], mask) for index, mask in zip(self._masked, self._masks, strict=True)]
        return pairs

    # What Keras and its callbacks ask an optimizer for is the inner optimizer's.

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def optimizers(self):
        # An AttributeError where the inner optimizer has none: `LearningRateScheduler` asks `hasattr`.
        return self.inner_optimizer.optimizers

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def get_config(self):
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "name": self.name,
            "masked": list(self._masked),
            "statistics": {
                kind: list(statistic.indices if self.built else statistic)
                for kind, statistic in sorted(self._statistics.items())
            },
            "origin": bool(self.origin),
            "clocks": len(self._updated),
            "temporary": self.temporary,
            "shrinkage": self.shrinkage and keras.saving.serialize_keras_object(self.shrinkage),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        return cls(inner, **config)


def _int(variable):
    return int(ops.convert_to_numpy(ops.convert_to_tensor(variable)))


def _passed_through(name):
    """A property of `SparseOptimizer` that is the inner optimizer's (the base class assigns it before there is one)."""

    def setter(self, value):
        if "inner_optimizer" in vars(self):
            setattr(self.inner_optimizer, name, value)

    return property(lambda self: getattr(self.inner_optimizer, name), setter)


# `_model_variables_moving_average` is what `SwapEMAWeights` reads from an optimizer inside a `LossScaleOptimizer`.
for _name in ("loss_scale_factor", "gradient_accumulation_steps", "use_ema", "_model_variables_moving_average"):
    setattr(SparseOptimizer, _name, _passed_through(_name))
