"""Callbacks that make a model sparse, or keep it so, while `model.fit` trains it."""

import warnings

import keras
import numpy as np

from keras_sparse import clock, criteria, optimizers, patterns, pruning, reports, schedules, selection
from keras_sparse.registry import Configurable, serializable

__all__ = ["AtTargetSparsity", "KeepSparsity", "Pruning"]


class _MaskCallback(keras.callbacks.Callback, Configurable):
    """Base of the callbacks that hold masks in the model's optimizer. Subclasses say which, in `_plan`.

    Several may train one model: they register with one `SparseOptimizer`, and the last to leave takes it off.
    """

    def __init__(self):
        super().__init__()
        self.running = False
        self.history = None
        self._goals = None

    def _plan(self, model):
        """Return the `Plan` for a built model, or `None` if there is nothing to mask."""
        raise TypeError(f"`{type(self).__name__}` must implement `_plan`.")

    @property
    def reached(self):
        """Whether the model is as sparse as this callback wants it to be."""
        return True

    # Joining and leaving. `set_model` runs for `fit`, `evaluate` and `predict`; only `fit` goes on to `on_train_begin`.

    def set_model(self, model):
        super().set_model(model)
        if not isinstance(model, keras.Model):
            selection.check_model(model)
        sparse = optimizers.wrap(model)
        # Each `fit` makes a `History`: callbacks that came with another one were left behind by a fit that broke off.
        self.history = getattr(model, "history", None)
        others = [user for user in sparse.users if user.history is self.history and user is not self]
        sparse.users[:] = [*others, self]
        self.running = False
        self._goals = None
        if model.built and model.weights:
            self._attach()
            sparse.start_clock()

    def _attach(self):
        """Create the masks, in a built model."""
        sparse = optimizers.find(self._model)
        try:
            if not sparse.built:
                sparse.build(self._model.trainable_variables)
            self._goals = self._plan(self._model)
            created = self._goals is not None and self._goals.attach(sparse)
        except Exception:
            self._abandon()
            raise
        sparse.apply_masks()
        if created:
            optimizers.drop_functions(self._model)

    def _leave(self):
        self.running = False
        sparse = optimizers.find(self._model)
        if sparse is None:
            return
        sparse.users[:] = [user for user in sparse.users if user is not self]
        if sparse.users:
            return
        if sparse.temporary:
            optimizers.unwrap(self._model)
        elif sparse.built:
            sparse.stop_clock()

    def _abandon(self):
        """Leave, and the others with it: this fit will not start."""
        sparse = optimizers.find(self._model)
        if sparse is not None:
            sparse.users.clear()
        self._leave()

    def on_test_end(self, logs=None):
        if not self.running:
            self._leave()

    def on_predict_end(self, logs=None):
        if not self.running:
            self._leave()

    def on_train_begin(self, logs=None):
        self.running = True
        # `EarlyStopping` restores weights in its own `on_train_end`, which may come after ours. Keras puts `History`
        # behind all of a user's callbacks, so the last act hangs on it.
        self._epochs_before = getattr(self.history, "epoch", None)
        if self.history is not None:
            previous = self.history.on_train_end

            def on_train_end(logs=None):
                previous(logs)
                self._finish()
                vars(self.history).pop("on_train_end", None)

            self.history.on_train_end = on_train_end

    def on_train_end(self, logs=None):
        if self.history is None or self.history.epoch is self._epochs_before:
            self._finish()  # There is no History in this fit, or it came before us.

    def _finish(self):
        if not self.running:
            return
        sparse = optimizers.find(self.model)
        if sparse is not None and sparse.built:
            self._complete(sparse)
            if self._goals is not None:
                _warn_of_revived(sparse)
                sparse.apply_masks()
        self._leave()

    def _complete(self, sparse):
        """What is left to do when training ended."""

    def on_epoch_begin(self, epoch, logs=None):
        self._epochs_done = epoch
        if self._goals is not None:
            self._start_epoch(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._epochs_done = epoch + 1
        sparse = optimizers.find(self.model)
        if logs is not None and sparse is not None and sparse.masks:
            zeros, size = _count_zeros(sparse)
            logs["sparsity"] = zeros / size

    def _start_epoch(self, epoch):
        """What is to do at the start of each epoch, once there are masks."""


@serializable
class Pruning(_MaskCallback):
    """Prunes the model gradually while it trains.

    Add it to `model.fit` and get the same model with zeros: same layers, same names, same file format. Pruned weights
    are exactly zero after every optimizer step, and stay so: `Pruning` never revives a weight. The share of zeros over
    the selected weights goes into the logs as `sparsity`.

    Args:
        target_sparsity: The share of weights to be zero at `end`: a float in [0, 1), or a dict `{regex: sparsity}` or
            `{regex: (sparsity, pattern)}` searched in `variable.path` (first match wins, weights that no key matches
            stay dense).
        criterion: Which weights matter: `"magnitude"`, `"random"` or a `ks.criteria.Criterion`.
        pattern: Where zeros may stand: `None`, `"unstructured"` or a `ks.patterns.Pattern`.
        schedule: The way from 0 to the target: `"polynomial"` (Zhu & Gupta 2017), `"linear"`, `"cosine"`,
            `"exponential"`, `"one_shot"` (all at `begin`) or a `ks.schedules.Schedule`.
        allocation: `"uniform"`: each weight gets the target; `"global"`: the smallest of all weights go first.
        begin: When pruning starts. A float is a fraction of this `fit` (epochs x steps), an int counts optimizer steps
            from the start of this `fit`.
        end: When the target is reached, like `begin`. The last update lands exactly on the target.
        frequency: Optimizer steps between updates. Defaults to a fiftieth of the span from `begin` to `end`.
        filters: Which weights: a regex, a list of them, or a callable on the variable; see `ks.selection.select`.
        verbose: 1 prints a line at each update.

    Raises:
        ValueError: If a number is out of range, a string names nothing, `end <= begin`, the schedule can never fire in
            this `fit`, or a filter or key matches nothing.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((64, 20)), np.ones((64, 10))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.9)])
    >>> history.history["sparsity"][-1]
    0.9
    """

    def __init__(
        self,
        target_sparsity=None,
        criterion="magnitude",
        pattern=None,
        schedule="polynomial",
        allocation="uniform",
        begin=0.0,
        end=0.75,
        frequency=None,
        filters=None,
        verbose=0,
    ):
        super().__init__()
        if target_sparsity is None:
            raise ValueError(
                "`target_sparsity` is missing: the share of weights to set to zero, such as 0.9, or a dict "
                "{regex: sparsity}. Received: target_sparsity=None"
            )
        pruning.check_target(target_sparsity, allocation)
        self.target_sparsity = target_sparsity
        self.criterion = criteria.get(criterion)
        self.pattern = patterns.get(pattern)
        self.schedule = schedules.get(schedule)
        self.allocation = allocation
        self._clock = clock.Clock(begin, end, frequency)
        self.begin, self.end, self.frequency = begin, end, frequency
        self.filters = filters
        self.verbose = verbose
        self._reached = False

    def get_config(self):
        """The constructor's arguments as plain data."""
        target = self.target_sparsity
        if isinstance(target, dict):
            target = {
                regex: [value[0], keras.saving.serialize_keras_object(patterns.get(value[1]))]
                if isinstance(value, (tuple, list))
                else value
                for regex, value in target.items()
            }
        if callable(self.filters):
            raise ValueError(f"`filters` that are a function have no config: use regexes. Received: {self.filters!r}")
        return {
            "target_sparsity": target,
            "criterion": keras.saving.serialize_keras_object(self.criterion),
            "pattern": keras.saving.serialize_keras_object(self.pattern),
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "allocation": self.allocation,
            "begin": self.begin,
            "end": self.end,
            "frequency": self.frequency,
            "filters": self.filters,
            "verbose": self.verbose,
        }

    @property
    def reached(self):
        """Whether the model is at its target sparsity."""
        return self._reached

    def _plan(self, model):
        plan = pruning.Plan(model, self.target_sparsity, self.criterion, self.pattern, self.allocation, self.filters)
        reports.remember(model, plan.skipped)
        return plan

    # Batch hooks bound the step from above in Python, because touching `self.model` makes JAX copy its whole state.

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._clock.restart()
        self._reached = False

    def _start_epoch(self, epoch, late=False):
        sparse = optimizers.find(self.model)
        try:
            now = self._clock.start_epoch(sparse, epoch, self.params["epochs"], self.params.get("steps"), late)
        except ValueError:
            self._abandon()
            raise
        if not self._reached:  # A backup or a file that is resumed may be there already.
            masks = [selection.as_array(sparse.mask_of(goal.weight.variable)) for goal in self._goals.goals]
            self._reached = self._goals.reached(masks)
        self._update_if_due(sparse, now)

    def on_train_batch_end(self, batch, logs=None):
        if self._goals is None:
            # The first batch built the model: on TensorFlow, `fit` builds it inside of the compiled step.
            self._attach()
            self._start_epoch(self._epochs_done, late=True)
            self._model.make_train_function(force=True)
        elif not self._reached and self._clock.may_be_due(batch):
            sparse = optimizers.find(self.model)
            self._update_if_due(sparse, self._clock.read(sparse, batch))

    def _update_if_due(self, sparse, now):
        progress = None if self._reached else self._clock.progress(now)
        if progress is not None:
            self._update(sparse, now, self.schedule(progress))

    def _update(self, sparse, now, fraction):
        self._reached = self._goals.reached(self._goals.update(sparse, fraction))
        self._clock.mark(sparse, now)
        if self.verbose:
            zeros, size = _count_zeros(sparse)
            print(f"\nStep {self._clock.elapsed(now)}: sparsity {zeros / size:.4f}")

    def _complete(self, sparse):
        if self._reached or self._goals is None:
            return
        zeros, size = _count_zeros(sparse)
        if self._epochs_done < self.params["epochs"]:
            warnings.warn(
                f"Training stopped before the target sparsity: the selected weights are at {zeros / size:.1%}. "
                "Wrap `EarlyStopping` in `ks.callbacks.AtTargetSparsity` to let it stop only after that.",
                stacklevel=2,
            )
            return
        now = clock.number(sparse.iterations)
        self._update(sparse, now, 1.0)
        warnings.warn(
            f"This fit ended before the schedule did, at a sparsity of {zeros / size:.1%}; the target was reached with "
            "a last update that no training followed. Lower `end`, or train for longer. "
            f"Received: begin={self.begin!r}, end={self.end!r}, steps={self._clock.elapsed(now)}",
            stacklevel=2,
        )


@serializable
class KeepSparsity(_MaskCallback):
    """Fine-tunes a sparse model: weights that are zero stay zero.

    Every kernel with zeros is masked, depthwise kernels and embeddings too. A kernel that is all zeros counts as
    zero-initialised and is trained.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> report = ks.prune(model, 0.5)
    >>> x, y = np.ones((64, 20)), np.ones((64, 10))
    >>> history = model.fit(x, y, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    >>> history.history["sparsity"]
    [0.5]
    """

    def _plan(self, model):
        sparse = [w for w in selection.weights(model) if w.kernel and w.trainable and not _is_dense(w)]
        if not sparse:
            warnings.warn(
                f"KeepSparsity found no zeros to keep in {model.name!r}. Prune the model first, for example with "
                "`ks.prune(model, 0.5)`.",
                stacklevel=2,
            )
            return None
        chosen = {id(w.variable) for w in sparse}
        return pruning.Plan(model, 0.0, filters=lambda variable: id(variable) in chosen)


@serializable
class AtTargetSparsity(keras.callbacks.Callback):
    """Holds another callback back until the model has reached its target sparsity.

    `ModelCheckpoint(save_best_only=True)` and `EarlyStopping` prefer the early, denser epochs. Wrapped in this callback
    they see only epochs and batches at the target. The beginning and the end of training reach them always.

    Args:
        callback: The callback to hold back.

    Raises:
        TypeError: If `callback` is not a Keras callback.
        ValueError: If no `Pruning` (or `KeepSparsity`) takes part in the same `fit`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> stop = ks.callbacks.AtTargetSparsity(keras.callbacks.EarlyStopping("val_loss", patience=3))
    >>> callbacks = [ks.callbacks.Pruning(0.9), stop]
    """

    def __init__(self, callback):
        super().__init__()
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(
                "`callback` must be a Keras callback, such as `keras.callbacks.EarlyStopping()`. "
                f"Received: {callback!r} of type {type(callback).__name__}"
            )
        self.callback = callback

    def get_config(self):
        """The constructor's arguments as plain data; the wrapped callback must be serializable."""
        return {"callback": keras.saving.serialize_keras_object(self.callback)}

    @classmethod
    def from_config(cls, config):
        """The inverse of `get_config`."""
        return cls(keras.saving.deserialize_keras_object(config["callback"]))

    def set_model(self, model):
        super().set_model(model)
        self.callback.set_model(model)

    def set_params(self, params):
        super().set_params(params)
        self.callback.set_params(params)

    def on_train_begin(self, logs=None):
        sparse = optimizers.find(self._model)
        if sparse is None or not any(isinstance(user, _MaskCallback) for user in sparse.users):
            raise ValueError(
                "`AtTargetSparsity` waits for a `ks.callbacks.Pruning` in the same `fit`, and there is none. Add "
                "one to `callbacks`, or use the wrapped callback as it is. "
                f"Received: callback={type(self.callback).__name__}"
            )
        self.callback.on_train_begin(logs)

    def on_train_end(self, logs=None):
        self.callback.on_train_end(logs)

    def on_epoch_begin(self, epoch, logs=None):
        if self._at_target():
            self.callback.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._at_target():
            self.callback.on_epoch_end(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        if self._at_target():
            self.callback.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        if self._at_target():
            self.callback.on_train_batch_end(batch, logs)

    def _at_target(self):
        sparse = optimizers.find(self._model)
        return sparse is not None and all(user.reached for user in sparse.users)


def _count_zeros(sparse):
    """Zeros and size of the variables that have masks."""
    values = [selection.as_array(variable) for variable, _ in sparse.masks]
    size = sum(value.size for value in values)
    return size - sum(int(np.count_nonzero(value)) for value in values), size


def _is_dense(weight):
    value = weight.numpy()
    return (value != 0).all() or (value == 0).all()


def _warn_of_revived(sparse):
    revived = sum(
        int(np.count_nonzero(selection.as_array(variable)[~selection.as_array(mask)]))
        for variable, mask in sparse.masks
    )
    if revived:
        warnings.warn(
            f"{revived} pruned weights were not zero when training ended, because another callback (EarlyStopping with "
            "restore_best_weights?) put back the weights of an earlier, denser epoch. The masks were applied again, "
            "and the accuracy may be lower than the one that callback saw. Wrap it in `ks.callbacks.AtTargetSparsity`.",
            stacklevel=2,
        )
