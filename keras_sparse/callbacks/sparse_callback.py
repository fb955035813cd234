"""A sparse callback acts on the state that a model's optimizer keeps while `model.fit` trains it."""

import keras

from keras_sparse import optimizers, selection
from keras_sparse.callbacks.fit import Fit
from keras_sparse.registry import Configurable

__all__ = ["SparseCallback"]


class SparseCallback(keras.callbacks.Callback, Configurable):
    """Base of the callbacks that make a model sparse, with the one life cycle that they share.

    This class alone makes the optimizer sparse, joins the other callbacks of a fit, keeps time and leaves. An algorithm
    is a subclass that implements some of the methods below, and none of the hooks (`on_...`):

    * `attach(run)`: claim the state that it needs (`run.parts`), once the model is built;
    * `start(run)`: act at the start of each epoch, before an update that may be due;
    * `leave_out_untrained(run)`: forget weights that turned out to be trained by no one;
    * `update(run, progress)`: act at a due step of its `clock`, at `progress` in [0, 1] between begin and end;
    * `finish(run)`: act when training has ended;
    * `leave(run)`: act when the fit ends, also if it is interrupted;
    * `end_epoch(run)`: act after an epoch's last step, before the model is validated or saved; it may be called twice;
    * `watch(run, logs)`: look at the logs of an epoch that has ended;
    * `log(run)`: return what goes into the logs at the end of each epoch beside `"sparsity"`, as a dict;
    * `zeros()`: return which weights it makes zero without a mask;
    * `reached`: whether the model is as sparse as it is to be;
    * `finished`: whether there is nothing left to do, whatever the clock says.

    Attributes:
        clock: A `Clock`, or `None` for an algorithm that has no due steps.
        alone: Whether a fit takes one callback of the class.

    Example:

    >>> import keras_sparse as ks
    >>> isinstance(ks.callbacks.Pruning(0.9), ks.callbacks.sparse_callback.SparseCallback)
    True
    """

    clock = None
    alone = False
    finished = False
    reached = True

    @property
    def async_safe(self):
        """Whether Keras need not wait for each batch's logs: without due steps nothing happens when a batch ends."""
        return self.clock is None

    def __init__(self):
        super().__init__()
        self.running = False
        self._run = None

    def attach(self, run):
        """Claim the state that the algorithm needs."""

    def leave_out_untrained(self, run):
        """Forget weights that no step of the optimizer changes."""

    def start(self, run):
        """Act at the start of each epoch."""

    def update(self, run, progress):
        """Act at a due step."""

    def finish(self, run):
        """Act when training has ended."""

    def leave(self, run):
        """Act when the fit ends, however it ends."""

    def end_epoch(self, run):
        """Act after the last step of an epoch, before the model is validated or saved."""

    def watch(self, run, logs):
        """Look at the logs of an epoch that has ended."""

    def log(self, run):
        """Return what goes into the logs at the end of an epoch, beside the sparsity."""
        return {}

    def zeros(self):
        """Return pairs of a weight and the array of booleans that says where it is zero in inference, mask or not."""
        return []

    # The life cycle. `set_model` runs for `fit`, `evaluate` and `predict`; only `fit` goes on to `on_train_begin`.

    def set_model(self, model):
        super().set_model(model)
        if not isinstance(model, keras.Model):
            selection.check_model(model)
        fit = Fit.of(model)
        if fit.begun:  # It is evaluated in the middle of a fit.
            self._run = fit.join(self)
            return
        self.running = False
        self._run = fit.join(self)
        if model.built and model.weights:
            self._attach()

    def _attach(self):
        run = self._run
        try:
            if self.alone and any(isinstance(one, type(self)) and one is not self for one in run.fit.callbacks):
                name = type(self).__name__
                hint = ": name all weights in its `filters`" if hasattr(self, "filters") else ""
                raise ValueError(f"One `fit` takes one `{name}`{hint}. Received: two")
            if not run.optimizer.built:
                run.optimizer.build(self._model.trainable_variables)
            run.parts.clock.begin()
            run.parts.clock.updated(run.position)
            self.attach(run)
        except Exception:
            run.fit.end()
            raise
        run.attached = True
        optimizers.refresh(self._model, run.parts, in_fit=True)

    def on_train_begin(self, logs=None):
        if self._run is not None and self._run.fit.ended:  # A list of callbacks that is used again.
            self.set_model(self._model)
        if self._run is None:
            raise ValueError(
                f"`{type(self).__name__}` does not know its model: in a loop of your own call `set_model(model)` and "
                "`set_params({'epochs': ..., 'steps': ...})` first, or hand the callbacks to "
                "`keras.callbacks.CallbackList(callbacks, model=model, epochs=..., steps=...)`. Received: no model"
            )
        self.running = True
        self._run.fit.begin()
        if self.clock is not None:
            self.clock.restart(self._run.parts.clock, self._run.position)

    def on_epoch_begin(self, epoch, logs=None):
        run = self._run
        run.epoch, run.epochs_done, run.batches = epoch, epoch, 0
        run.fit.look_after_optimizer()
        if run.attached and not run.fit.must_be_traced:
            self._start_epoch()
        else:
            optimizers.before_first_step(self._model, self._start_late)

    def _start_late(self):
        if not self._run.attached:
            self._attach()
        self._start_epoch()

    def _start_epoch(self):
        run, params = self._run, self.params or {}
        if "epochs" not in params:
            raise ValueError(
                f"`{type(self).__name__}` does not know how long this training is: call `set_params({{'epochs': ..., "
                f"'steps': ...}})` before `on_train_begin`. Received: params={params!r}"
            )
        try:
            run.fit.settle(params["epochs"], run.epoch)
            now = None
            if self.clock is not None:
                accumulation = run.optimizer.gradient_accumulation_steps
                now = self.clock.start_epoch(run.epoch, params["epochs"], params.get("steps"), accumulation)
            self.leave_out_untrained(run)
            self.start(run)
            if now is not None:
                self._update_if_due(now)
        except Exception:
            run.fit.end()
            raise

    def on_train_batch_begin(self, batch, logs=None):
        self._run.fit.look_after_optimizer()

    # Batch hooks bound the step from above in Python, because touching `self.model` makes JAX copy its whole state.

    def on_train_batch_end(self, batch, logs=None):
        # The last of several steps in one execution may be behind the epoch's end.
        self._run.batches = min(batch + 1, (self.params or {}).get("steps") or batch + 1)
        if self.clock is not None and self._run.attached and not self.finished and self.clock.may_be_due(batch):
            self.model  # noqa: B018 - JAX puts the state of its step into the variables.
            self._update_if_due(self.clock.read(batch))
        if self.clock is not None and self._run.attached and batch + 1 == self.params.get("steps"):
            self.model  # noqa: B018 - as above
            self.end_epoch(self._run)

    def _update_if_due(self, now):
        progress = None if self.finished else self.clock.progress(now)
        if progress is not None:
            self.leave_out_untrained(self._run)
            self.update(self._run, progress)
            self.clock.mark(now)

    def on_epoch_end(self, epoch, logs=None):
        run = self._run
        run.epochs_done = epoch + 1
        run.fit.note_epoch(epoch + 1)
        if logs is not None and run.attached:
            self.model  # noqa: B018 - JAX puts the state of its step into the variables.
            try:
                self.end_epoch(run)
                self.watch(run, logs)
            except Exception:
                run.fit.end()
                raise
            zeros, size = run.fit.count_zeros()
            logs.update(self.log(run) | ({"sparsity": zeros / size} if size else {}))

    def on_test_begin(self, logs=None):
        if self.running and self._run is not None and self._run.attached:
            self.end_epoch(self._run)

    def on_test_end(self, logs=None):
        if self._run is not None and not self._run.fit.begun:
            self._run.fit.end()

    def on_predict_end(self, logs=None):
        self.on_test_end(logs)

    def on_train_end(self, logs=None):
        if self._run is not None and self._run.fit.by_hand:
            self._run.fit.finish()
