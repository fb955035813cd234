"""A mask callback holds masks in the optimizer of a model while `model.fit` trains it."""

import warnings

import keras
import numpy as np

from keras_sparse import clock, optimizers, selection
from keras_sparse.registry import Configurable

__all__ = ["MaskCallback", "ScheduledMasks", "count_zeros", "plain_filters"]


class MaskCallback(keras.callbacks.Callback, Configurable):
    """Base of the callbacks that hold masks in the model's optimizer. Subclasses say which, in `_plan`.

    Several may train one model: they register with one `SparseOptimizer`, and the last to leave takes it off.

    Example:

    >>> import keras_sparse as ks
    >>> isinstance(ks.callbacks.Pruning(0.9), ks.callbacks.masks.MaskCallback)
    True
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
        self._position = len(others)
        self.running = False
        self._goals = None
        if model.built and model.weights:
            self._attach()

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
        sparse.start_clock()
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
        elif sparse.built and sparse.stop_clock():
            optimizers.drop_functions(self._model)

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
            if sparse.users == [self]:  # Others may still have to say what their masks are.
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
            zeros, size = count_zeros(sparse)
            logs["sparsity"] = zeros / size

    def _start_epoch(self, epoch):
        """What is to do at the start of each epoch, once there are masks."""


class ScheduledMasks(MaskCallback):
    """Base of the callbacks that act on masks at the due steps of a clock. Subclasses say how, in `_update`.

    Args:
        begin: When the first update is due, as in `ks.clock.Clock`.
        end: When the last one is due.
        frequency: Optimizer steps between updates.
        filters: Which weights, as in `ks.selection.select`.
        verbose: 1 prints a line at each update.
        name: What a user calls `begin`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range.

    Example:

    >>> import keras_sparse as ks
    >>> isinstance(ks.callbacks.Pruning(0.9), ks.callbacks.masks.ScheduledMasks)
    True
    """

    def __init__(self, begin, end, frequency, filters, verbose, name="begin"):
        super().__init__()
        self._clock = clock.Clock(begin, end, frequency, name)
        selection.check_filters(filters)
        if verbose not in (0, 1, 2):
            raise ValueError(f"`verbose` must be 0 or 1. Received: verbose={verbose!r}")
        self.filters = filters
        self.verbose = verbose

    def _prepare(self, sparse, now):
        """What is to do at the start of each epoch, at step `now`, before an update that may be due."""

    def _update(self, sparse, now, progress):
        """Act at step `now`, at `progress` in [0, 1] between the clock's begin and end."""
        raise TypeError(f"`{type(self).__name__}` must implement `_update`.")

    # Batch hooks bound the step from above in Python, because touching `self.model` makes JAX copy its whole state.

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._clock.restart()

    def _attach(self):
        super()._attach()
        optimizers.find(self._model).last_update(self._position)

    def _start_epoch(self, epoch):
        sparse = optimizers.find(self.model)
        counter = sparse.last_update(self._position)
        try:
            now = self._clock.start_epoch(sparse, counter, epoch, self.params["epochs"], self.params.get("steps"))
            self._prepare(sparse, now)
            self._update_if_due(sparse, now)
        except Exception:
            self._abandon()
            raise

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if self._goals is None:
            optimizers.before_first_step(self._model, self._join)

    def _join(self):
        self._attach()
        self._start_epoch(self._epochs_done)

    def on_train_batch_end(self, batch, logs=None):
        if not self._finished() and self._clock.may_be_due(batch):
            sparse = optimizers.find(self.model)
            self._update_if_due(sparse, self._clock.read(sparse, batch))

    def _finished(self):
        """Whether there is nothing left to do, whatever the clock says."""
        return False

    def _update_if_due(self, sparse, now):
        progress = None if self._finished() else self._clock.progress(now)
        if progress is not None:
            self._update(sparse, now, progress)
            self._clock.mark(now)

    def _say(self, sparse, now):
        zeros, size = count_zeros(sparse)
        print(f"\nStep {self._clock.elapsed(now)}: sparsity {zeros / size:.4f}")


def count_zeros(sparse):
    """Return how many weights that have masks are zero, and how many there are; biases and the like do not count.

    Example:

    >>> import keras_sparse as ks
    >>> ks.callbacks.masks.count_zeros(ks.optimizers.SparseOptimizer("adam"))
    (0, 0)
    """
    values = [selection.as_array(variable) for variable, _ in sparse.masks if variable.name not in selection.NO_KERNELS]
    size = sum(value.size for value in values)
    return size - sum(int(np.count_nonzero(value)) for value in values), size


def plain_filters(filters):
    """Return `filters` for a config, or raise if they are a function.

    Example:

    >>> import keras_sparse as ks
    >>> ks.callbacks.masks.plain_filters(["kernel"])
    ['kernel']
    """
    if callable(filters):
        raise ValueError(f"`filters` that are a function have no config: use regexes. Received: {filters!r}")
    return filters


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
