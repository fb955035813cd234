"""A part is one piece of state that a sparse optimizer keeps beside its own: masks, statistics, a clock, and so on."""

import contextlib
import json
import threading

import keras
import numpy as np
from keras import ops

__all__ = ["Ledger", "Part", "Parts", "SparseState", "variable_like"]


class Part:
    """One piece of state: its variables, and what it does around the optimizer's step.

    State is kept under keys (the index of a weight, the position of a callback). Variables outlive a `fit`, so that a
    compiled step can be used again: each fit claims the keys that it needs, and the first claim in a fit gives a
    variable its initial value.

    Attributes:
        parts: The `Parts` that it belongs to.
        variables: Dict from a key to its `keras.Variable`.
        claimed: The keys that are claimed in this fit.

    Example:

    >>> import keras_sparse as ks
    >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
    >>> [type(part).__name__ for part in optimizer.sparse_parts]
    ['FitClock', 'Statistics', 'Proximal', 'RewindPoint', 'Masks']
    """

    name = None
    permanent = False  # Whether it stays in an optimizer that was made sparse for good when a fit ends.
    ahead = False  # Whether it acts ahead of the compiled step: it compiles what it does by itself.

    def __init__(self, parts):
        self.parts = parts
        self.variables = {}
        self.claimed = set()

    def claim(self, key, create):
        """Return the variable of a key, and whether this is its first claim in this fit.

        Args:
            key: A string, a number, or a tuple of them; those of one part must be sortable.
            create: Makes the variable, unless an earlier fit did.
        """
        first = key not in self.claimed
        self.claimed.add(key)
        if key not in self.variables:
            with self.parts.scope():
                self.variables[key] = create()
            self.parts.changed = True
        return self.variables[key], first

    def release(self):
        """End the fit: what is claimed from now on starts anew."""
        self.claimed.clear()

    def drop_unclaimed(self):
        """Forget the state that no one has claimed in this fit."""
        for key in set(self.variables) - self.claimed:
            del self.variables[key]
            self.parts.changed = True

    @property
    def active(self):
        """Whether there is anything to do in a step."""
        return bool(self.claimed)

    def before(self, gradients):
        """Act before the optimizer's step, in graph.

        Args:
            gradients: Dict from the index of a trainable variable to its gradient; those without one are missing.

        Returns:
            The gradients to go on with.
        """
        return gradients

    def after(self):
        """Act after the optimizer's step, in graph."""

    def contents(self):
        """What `restore` needs to make the same variables, as plain data; `None` if there are none."""
        return [list(key) if isinstance(key, tuple) else key for key in sorted(self.claimed)] or None

    def restore(self, config):
        """Claim what `contents` told of."""
        raise TypeError(f"`{type(self).__name__}` must implement `restore(self, config)`.")

    def saved_variables(self):
        """The claimed variables in the order of files."""
        return [self.variables[key] for key in sorted(self.claimed)]


class Ledger(Part):
    """A part in which a callback writes down numbers and arrays between steps; in a step it does nothing.

    Attributes:
        names: The names of the numbers, a tuple.

    Example:

    >>> import keras_sparse as ks
    >>> from keras_sparse.optimizers.parts import Ledger
    >>> class Best(Ledger):
    ...     name, names = "best", ("epoch", "loss")
    >>> ledger = ks.optimizers.SparseOptimizer("sgd").sparse_parts.of(Best)
    >>> ledger.claim_numbers(loss=float("inf"))
    >>> ledger.put(epoch=3)
    >>> ledger.get("epoch"), ledger.get("loss")
    (3.0, inf)
    """

    names = ()

    def claim_numbers(self, **initial):
        """Make room for the numbers, which are 0 when a fit begins, or what `initial` says."""
        self.claim_array((0, 0), np.array([initial.get(name, 0) for name in self.names]))

    def claim_array(self, key, value):
        """Make room for an array, under a key other than `(0, 0)`, with its value when a fit begins."""
        variable, first = self.claim(key, lambda: keras.Variable(value, trainable=False, dtype="float32"))
        if first:
            variable.assign(value)

    @property
    def active(self):
        return False

    def get(self, name):
        """The number of a name, a float."""
        return float(self._values()[self.names.index(name)])

    def put(self, **numbers):
        """Write down numbers by name."""
        values = self._values()
        for name, value in numbers.items():
            values[self.names.index(name)] = value
        self.variables[0, 0].assign(values)

    def _values(self):
        return np.array(ops.convert_to_numpy(ops.convert_to_tensor(self.variables[0, 0])))

    def restore(self, config):
        """The callback has claimed everything when a file is taken over."""


class Parts:
    """All parts of a sparse optimizer, and how they get into files and out of them.

    Args:
        kinds: The classes of the parts, in the order in which they act.

    Attributes:
        optimizer: The optimizer that they belong to, or `None`.
        state: The `SparseState` by which Keras saves them, which outlives a fit as they do, or `None`.
        for_good: Whether the optimizer stays sparse when a `fit` ends.
        of_replica: What belongs to a step of one replica.
        trainable: The variables that it was built with.
        touched: The `id` of each variable that a step was given a gradient for.
        compiled: Compiled steps, by what they were compiled for.
        changed: Whether variables came or went: functions that were compiled before are outdated.
        owner: The fit that runs with them, or `None`.
        fit: What a file tells of that fit, plain data.
        loaded: What a file brought and no fit has taken over yet, a pair `(config, values)`, or `None`.
        resumed: Whether a file was loaded while a fit was on.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    >>> report = ks.update_masks(model, 0.5)
    >>> model.optimizer.sparse_parts.contents()
    {'masks': [0]}
    """

    def __init__(self, kinds=()):
        self.optimizer = None
        self.state = None
        self.for_good = False
        # Replicas of `tf.distribute` are threads that take turns within a step.
        self.of_replica = threading.local()
        self.trainable = []
        self.touched = set()
        self.compiled = {}
        self.changed = False
        self.owner = None
        self.fit = None
        self.loaded = None
        self.resumed = False
        self._hidden = False
        self._indices = {}
        self._parts = [kind(self) for kind in kinds]
        for part in self._parts:
            setattr(self, part.name, part)

    def __iter__(self):
        return iter(self._parts)

    def of(self, kind):
        """The part of a class, which is added if it is not among them: it acts just before the last, the masks.

        Args:
            kind: A subclass of `Part`.

        Example:

        >>> import keras_sparse as ks
        >>> class Counts(ks.optimizers.Part):
        ...     name = "counts"
        >>> parts = ks.optimizers.SparseOptimizer("sgd").sparse_parts
        >>> parts.of(Counts) is parts.of(Counts), [part.name for part in parts][-2:]
        (True, ['counts', 'masks'])
        """
        part = next((part for part in self._parts if type(part) is kind), None)
        if part is None:
            part = kind(self)
            self._parts.insert(-1, part)
        return part

    def build(self, variables):
        """Take note of the trainable variables."""
        self.trainable = list(variables)
        self._indices = {id(variable): index for index, variable in enumerate(self.trainable)}

    def index(self, variable):
        """The index of a trainable variable, or `None` if the optimizer was not built with it."""
        return self._indices.get(id(variable))

    def indices(self, variables):
        """The indices of trainable variables.

        Raises:
            ValueError: If the optimizer was not built with one of them.
        """
        if not self.trainable:
            raise ValueError(
                "The optimizer was built without any variables (as after loading an .h5 file), so it trains nothing. "
                "Compile the model again. Received: 0 trainable variables"
            )
        unknown = [v.path for v in variables if self.index(v) is None]
        if unknown:
            raise ValueError(
                "Only variables that the optimizer was built with can be masked; it was built with "
                f"{len(self.trainable)} trainable variables. Received: {unknown}"
            )
        return [self.index(variable) for variable in variables]

    def note_step(self, variables, gradients):
        """Take note of which variables a step changes."""
        self.touched.update(id(v) for v, gradient in zip(variables, gradients, strict=False) if gradient is not None)

    def pass_through(self, parts, gradients, indices):
        """Let some of the parts act on a list of gradients before a step; `None` stays `None`."""
        found = {i: gradient for i, gradient in zip(indices, gradients, strict=True) if gradient is not None}
        for part in parts:
            found = part.before(found)
        return [found.get(index) for index in indices]

    @property
    def stepping(self):
        """Whether the optimizer is in a step, in this replica."""
        return getattr(self.of_replica, "stepping", False)

    @property
    def hidden(self):
        """Whether the optimizer's own state is being saved or loaded, or its config made."""
        return self._hidden

    @contextlib.contextmanager
    def files(self):
        """Hide the parts, so that the optimizer is saved and loaded as a plain one."""
        before, self._hidden = self._hidden, True
        try:
            yield
        finally:
            self._hidden = before

    @contextlib.contextmanager
    def scope(self):
        """Where variables are made: in the distribution strategy of the weights, on TensorFlow."""
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            if not tf.distribute.has_strategy() and self.optimizer is not None:
                with self.optimizer.distribution_scope():
                    yield
                return
        yield

    @property
    def variables(self):
        """List of all variables that are claimed, in the order of files."""
        return [variable for part in self._parts for variable in part.saved_variables()]

    def end_fit(self):
        """Release what belongs to a fit, and forget what a file brought for it."""
        for part in self._parts:
            if not (part.permanent and self.for_good):
                part.release()
        self.owner, self.fit, self.loaded, self.resumed = None, None, None, False

    def drop_unclaimed(self):
        """Forget what no one has claimed in this fit."""
        for part in self._parts:
            part.drop_unclaimed()

    def contents(self):
        """The parts that hold something, as plain data."""
        configs = {part.name: part.contents() for part in self._parts}
        return {name: config for name, config in configs.items() if config is not None}

    def take_over(self, permanent=False):
        """Go on with what a file brought.

        Args:
            permanent: Whether only what outlasts a fit is taken, and the rest is left for a fit to come.

        Raises:
            ValueError: If there is other state here than in the file.
        """
        config, values = self.loaded
        lasting = {part.name for part in self._parts if part.permanent}
        wanted = {name: c for name, c in config["parts"].items() if name in lasting or not permanent}
        present = self.contents()
        if present and wanted != present:
            raise ValueError(
                "The saved state does not fit this training: the masks belong to another selection of weights, or to "
                "another criterion. Train with the same `filters`, `target_sparsity` and `criterion` as the run that "
                "saved it, or start from a fresh backup folder. "
                f"Received: {_short(wanted)}; expected: {_short(present)}"
            )
        for part in self._parts:
            if part.name in wanted:
                part.restore(wanted[part.name])
                for variable, value in zip(part.saved_variables(), values[part.name], strict=True):
                    variable.assign(value)
        if not permanent:
            self.loaded = None

    def adopt(self, others):
        """Take over masks, rewind point and clock of another optimizer, which trained the same weights till now."""
        for variable, mask in others.masks.pairs:
            if self.index(variable) is not None:
                self.masks.add([variable])
                self.masks.of(variable).assign(as_numpy(mask))
        if others.rewind_point.claimed:
            self.rewind_point.adopt(others.rewind_point)
        self.clock.adopt(others.clock)
        self.fit = others.fit


def variable_like(weight, name, dtype=None, initializer="zeros", **options):
    """Make a variable of a weight's shape that lies on devices as the weight does.

    Args:
        weight: A `keras.Variable`.
        name: What comes behind the weight's path in its name.
        dtype: That of the weight if it is `None`.
        initializer: As in `keras.Variable`.
        **options: As in `keras.Variable`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layer = keras.layers.Dense(3, name="head")
    >>> layer.build((None, 2))
    >>> mask = ks.optimizers.parts.variable_like(layer.kernel, "mask", "bool", "ones")
    >>> mask.name, tuple(mask.shape)
    ('head_kernel_mask', (2, 3))
    """
    distribution = keras.distribution.distribution()
    if distribution is not None:  # Its rules go by names, and would not know this one.
        options["layout"] = distribution.get_variable_layout(weight)
    name = f"{weight.path}_{name}".replace("/", "_")
    dtype, shape = dtype or weight.dtype, tuple(weight.shape)
    return keras.Variable(initializer, shape, dtype, trainable=False, name=name, **options)


def as_numpy(variable):
    """The value of a variable as an array."""
    return ops.convert_to_numpy(ops.convert_to_tensor(variable))


def _short(config):
    text = json.dumps(config)
    return text if len(text) < 300 else f"{text[:300]}..."


class SparseState(keras.layers.Layer):
    """What Keras saves of the parts of an optimizer.

    It is a layer because Keras saves what an optimizer holds only if it is an object of Keras's own kinds. It has a
    place of its own in a file, so that without keras_sparse the optimizer's own state loads as it always does.

    Args:
        parts: The `Parts`.

    Example:

    >>> import keras_sparse as ks
    >>> store = {}
    >>> ks.optimizers.SparseOptimizer("sgd").sparse_state.save_own_variables(store)
    >>> store
    {}
    """

    def __init__(self, parts):
        super().__init__(trainable=False, name="sparse_state")
        self.built = True
        self.parts = parts

    def save_own_variables(self, store):
        """Write the parts, and the config that tells them apart."""
        parts = self.parts
        if parts.optimizer is None:
            config, values = parts.loaded or (None, {})
        else:
            config = {"parts": parts.contents(), "fit": parts.fit}
            values = {part.name: [as_numpy(variable) for variable in part.saved_variables()] for part in parts}
        if config is None or not config["parts"]:
            return
        store["config"] = np.frombuffer(json.dumps(config).encode(), "uint8")
        for name, group in values.items():
            for index, value in enumerate(group):
                store[f"{name}_{index:06d}"] = value

    def load_own_variables(self, store):
        """Read what `save_own_variables` wrote: into the parts while they run, else for a fit to come."""
        if "config" not in store.keys():
            return
        config = json.loads(bytes(np.asarray(store["config"])))
        values = {
            name: [np.asarray(store[key]) for key in sorted(store.keys()) if key.rpartition("_")[0] == name]
            for name in config["parts"]
        }
        parts = self.parts
        parts.loaded = config, values
        if parts.optimizer is not None and parts.trainable:
            # What a fit had, a loop of one's own has no use for.
            parts.take_over(permanent=parts.owner is None and config["fit"] is not None)
            parts.resumed = parts.owner is not None
