"""A fit, as the sparse callbacks that take part in it see it: one call of `model.fit`, or a loop of one's own.

State of a fit ends with the fit, however it ends. A fit that ends normally says so; one that is interrupted is known by
the list of its callbacks, an object that lives as long as the call.
"""

import contextlib
import inspect
import json
import sys
import threading
import warnings
import weakref

import keras
import numpy as np

from keras_sparse import optimizers, selection, zeros
from keras_sparse.identity import IdentityDict

__all__ = ["Fit", "Run"]

# Callbacks that `fit` adds by itself.
_HARMLESS = (keras.callbacks.History, keras.callbacks.ProgbarLogger)


class Run:
    """What one callback knows of the fit that it takes part in.

    Attributes:
        fit: The `Fit`.
        position: Which of its callbacks this is.
        attached: Whether the callback has claimed its state.
        plan: The callback's `Plan`, if it has one.
        epoch: Index of the running epoch.
        epochs_done: How many epochs are over, counted from 0 in a resumed fit, too.
        batches: How many batches of the running epoch are over.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> run = ks.callbacks.fit.Fit.of(model).join(ks.callbacks.KeepSparsity())
    >>> run.position, run.optimizer is model.optimizer
    (0, True)
    """

    def __init__(self, fit, position):
        self.fit, self.position = fit, position
        self.attached = False
        self.plan = None
        self.epoch = self.epochs_done = self.batches = 0

    @property
    def model(self):
        """The model."""
        return self.fit.model

    @property
    def optimizer(self):
        """The optimizer that takes its steps."""
        return self.fit.optimizer

    @property
    def parts(self):
        """The optimizer's `Parts`."""
        return self.fit.parts

    def untrained(self):
        """List of the trainable variables that steps leave alone, as far as that is known."""
        parts = self.parts
        touched = parts.touched
        return [
            variable
            for variable in self.model.trainable_variables
            if parts.index(variable) is None or (touched and id(variable) not in touched)
        ]


class Fit:
    """One fit of a model, and the sparse callbacks that take part in it.

    Args:
        model: The model, compiled.
        callback_list: The `keras.callbacks.CallbackList` of the fit, or `None` in a loop that calls hooks by hand.
        in_call: Whether it is one call of a method of the model, so that no fit goes on when the caller is left.

    Attributes:
        callbacks: The sparse callbacks that have joined, in order.
        callback_list: Function that returns the list of the callbacks, as long as it lives.
        by_hand: Whether there is no list of callbacks, so that callbacks must end the fit themselves.
        in_call: Whether it is one call of a method of the model, and no loop of the user's.
        resumed: Whether it goes on with a fit that was broken off.
        begun: Whether training has begun.
        ended: Whether it is over.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> fit = ks.callbacks.fit.Fit.of(model)
    >>> ks.optimizers.find(model) is model.optimizer
    True
    >>> fit.end()
    >>> ks.optimizers.find(model) is None
    True
    """

    def __init__(self, model, callback_list, in_call=False):
        self.model = model
        self.callbacks, self._runs = [], []
        self.by_hand, self.in_call = callback_list is None, in_call
        self.callback_list = (lambda: None) if self.by_hand else weakref.ref(callback_list)
        self.begun = self._settled = self.ended = False
        self.resumed = False
        self.optimizer = optimizers.wrap(model)
        self.parts.owner, self.parts.fit = self, {}
        self._checkpoints = {}
        if callback_list is not None:
            # An interrupt leaves no hook: what goes with the call is its list of callbacks.
            finalizer = weakref.finalize(callback_list, self._break_off)
            finalizer.atexit = False
            if in_call:
                _call_after_cell(finalizer)

    @classmethod
    def of(cls, model):
        """The fit that is about to begin, for which a callback's `set_model` is being called."""
        callers = _callers()
        lists = [caller for caller in callers if isinstance(caller, keras.callbacks.CallbackList)]
        sparse = optimizers.find(model)
        before = None if sparse is None else sparse.sparse_parts.owner
        if before is not None:
            if before.by_hand if not lists else not before.by_hand and before.callback_list() in lists:
                # Another callback of the same fit, or a callback that evaluates in the middle of it.
                if not (before.by_hand and before.begun):
                    return before
            before.end()  # It was broken off.
        return cls(model, lists[0] if lists else None, any(isinstance(caller, keras.Model) for caller in callers))

    @property
    def parts(self):
        """The optimizer's `Parts`."""
        return self.optimizer.sparse_parts

    def join(self, callback):
        """Let a callback take part; return its `Run`, `None` for one that comes while the fit is on."""
        if self.begun:
            return next((run for c, run in zip(self.callbacks, self._runs, strict=True) if c is callback), None)
        self.callbacks.append(callback)
        self._runs.append(Run(self, len(self._runs)))
        return self._runs[-1]

    def begin(self):
        """Begin training, at the first callback's `on_train_begin`."""
        if self.begun:
            return
        self.begun = True
        callback_list = self.callback_list()
        if callback_list is not None:
            # `EarlyStopping` restores weights in its own `on_train_end`, which may come after ours.
            callback_list.callbacks.append(_Ending(self))
            self._checkpoints = {
                callback: None
                for callback in callback_list.callbacks
                if isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_best_only
            }
        if any(run.attached for run in self._runs):
            self.parts.drop_unclaimed()
            optimizers.refresh(self.model, self.parts, in_fit=True)

    @property
    def must_be_traced(self):
        """Whether a step must be traced to see which weights it changes: a `train_step` of the user's own."""
        return (
            keras.backend.backend() == "tensorflow"
            and not self._settled
            and not self.parts.touched
            and not self.steps_are_keras_own
            and not self.model.run_eagerly
        )

    @property
    def steps_are_keras_own(self):
        """Whether the model's class has no `train_step` of its own."""
        return type(self.model).train_step is keras.Model.train_step

    def settle(self, epochs, epoch):
        """Find out, before the first step, whether this fit resumes another, and go on with its state if so.

        Args:
            epochs: Index at which the fit ends.
            epoch: Index of the epoch that starts.
        """
        at_target = all(callback.reached for callback in self.callbacks)
        for callback in self._checkpoints:
            if not at_target:
                self._checkpoints[callback] = callback.best
        if self._settled:
            self.parts.fit["epoch"] = epoch
            return
        self._settled = True
        parts, about = self.parts, {"callbacks": [_config(c) for c in self.callbacks], "epochs": epochs, "epoch": epoch}
        if parts.loaded is not None and not parts.resumed:
            before = parts.loaded[0]["fit"] or {}
            if before.get("callbacks") == about["callbacks"] and _goes_on(before, epochs, epoch):
                parts.take_over()
                parts.resumed = True
        parts.loaded = None
        self.resumed, parts.resumed = parts.resumed, False
        parts.fit = about
        if self.resumed:
            parts.masks.apply()

    def note_epoch(self, epoch):
        """Take note that epochs are over, for files that are written now."""
        if self.parts.fit:
            self.parts.fit["epoch"] = epoch

    def look_after_optimizer(self):
        """Go on with another optimizer if the model was compiled anew in the middle of the fit."""
        if self.optimizer is optimizers.innermost(self.model):
            return
        if self.ended:
            return
        old, parts = self.optimizer, self.parts
        self.optimizer = optimizers.wrap(self.model)
        if not self.optimizer.built:
            self.optimizer.build(self.model.trainable_variables)
        self.parts.owner = self
        self.parts.adopt(parts)
        statistics = parts.statistics.snapshot()
        parts.owner = None
        optimizers.make_plain(old)
        for callback, run in zip(self.callbacks, self._runs, strict=True):
            if run.attached:
                callback.attach(run)
            if callback.clock is not None:
                callback.clock.move(self.parts.clock)
        self.parts.statistics.put(statistics)
        self.parts.changed = True
        self.parts.masks.apply()
        optimizers.refresh(self.model, self.parts, in_fit=True)

    def finish(self):
        """End a fit that has come to its end: what callbacks have left to do, then `end`."""
        callback_list = self.callback_list()
        if callback_list is not None:
            callback_list.callbacks[:] = [c for c in callback_list.callbacks if not isinstance(c, _Ending)]
        try:
            runs = [(c, run) for c, run in zip(self.callbacks, self._runs, strict=True) if c.running]
            for callback, run in runs:
                callback.running = False
                if run.attached and self._settled:
                    callback.leave_out_untrained(run)
                    callback.finish(run)
            if self._settled:
                self._mask_revived()
                self._warn_of_checkpoints()
        finally:
            self.end()

    def end(self):
        """Leave the model with its plain optimizer, unless another fit has begun."""
        self.ended = True
        if not self._has_optimizer:
            return
        for variable, mask in self.parts.masks.pairs:
            if variable.name not in selection.NO_KERNELS:
                zeros.remember(variable, selection.as_array(mask))
        for callback, run in zip(self.callbacks, self._runs, strict=True):
            if self._settled and run.attached:
                callback.leave(run)
            callback.running = False
        for_good = self.parts.for_good
        if optimizers.innermost(self.model) is not self.optimizer:
            self.parts.end_fit()
            optimizers.make_plain(self.optimizer)
        elif not for_good:
            optimizers.unwrap(self.model)
        else:
            self.parts.end_fit()
            self.parts.drop_unclaimed()
            optimizers.refresh(self.model, self.parts)

    @property
    def _has_optimizer(self):
        """Whether the optimizer is sparse, and no other fit's."""
        return (
            self.optimizer is not None
            and vars(self.optimizer).get("sparse_state") is not None
            and self.parts.owner is self
        )

    def _break_off(self):
        """End a fit that nobody has ended, and say so."""
        zero, size = self.count_zeros() if self._settled and self._has_optimizer else (0, 0)
        self.end()
        if not zero:
            return
        with contextlib.suppress(UserWarning):  # Nobody could catch what is raised here.
            warnings.warn(
                f"A fit with sparse callbacks was broken off at sparsity {zero / size:.3f}. The model has its own "
                "optimizer again and keeps the zeros that it has; a next fit trains them, too, unless it has "
                "`ks.callbacks.KeepSparsity()` or another sparse callback.",
                stacklevel=2,
            )

    def count_zeros(self):
        """How many of the weights that this fit makes sparse are zero in inference, and how many there are.

        These are the weights that have masks, and those of gates; biases and the like do not count.
        """
        found = IdentityDict(
            (variable, selection.as_array(variable) == 0)
            for variable, _ in self.parts.masks.pairs
            if variable.name not in selection.NO_KERNELS
        )
        for callback in self.callbacks:
            for variable, zero in callback.zeros():
                found[variable] = found.get(variable, False) | zero
        return sum(int(zero.sum()) for zero in found.values()), sum(zero.size for zero in found.values())

    def _mask_revived(self):
        """Apply the masks again if another callback has put back weights that have none of the zeros."""
        callback_list = self.callback_list()
        if callback_list is not None and self.steps_are_keras_own:
            others = [callback for callback in callback_list.callbacks if callback not in self.callbacks]
            if all(type(callback) in _HARMLESS for callback in others):
                return  # After the last step, which masks, nobody can have done it.
        pairs = [(selection.as_array(variable), selection.as_array(mask)) for variable, mask in self.parts.masks.pairs]
        revived = sum(int(np.count_nonzero(value[~mask])) for value, mask in pairs)
        if not revived:
            return
        self.parts.masks.apply()
        warnings.warn(
            f"{revived} pruned weights were not zero when training ended, because another callback (EarlyStopping with "
            "restore_best_weights?) put back the weights of an earlier, denser epoch. The masks were applied again, "
            "and the accuracy may be lower than the one that callback saw. Wrap it in `ks.callbacks.AtTargetSparsity`.",
            stacklevel=2,
        )

    def _warn_of_checkpoints(self):
        if not all(callback.reached for callback in self.callbacks):
            return
        for callback, best in self._checkpoints.items():
            if best is not None and best == callback.best and np.isfinite(best):
                warnings.warn(
                    f"`{type(callback).__name__}(save_best_only=True)` has kept a file of an epoch before the target "
                    "sparsity was reached, since no later epoch was better. Wrap it: "
                    "`ks.callbacks.AtTargetSparsity(ModelCheckpoint(...))`.",
                    stacklevel=2,
                )


class _Ending(keras.callbacks.Callback):
    """The last callback of a fit."""

    def __init__(self, fit):
        super().__init__()
        self._fit = fit

    def on_train_end(self, logs=None):
        self._fit.finish()


def _callers():
    """The objects on whose behalf a callback's `set_model` is being called, the innermost first.

    They are the `self` of its callers. Each `CallbackList` among them is there only once; there are several of them if
    a callback evaluates a model in the middle of a fit.
    """
    # Not this frame: its locals would hold themselves, and the lists with them.
    frame, found = inspect.currentframe().f_back, {}
    while frame is not None:
        caller = frame.f_locals.get("self")
        found[id(caller)] = caller
        frame = frame.f_back
    return list(found.values())


def _call_after_cell(finalizer):
    """Call a finalizer when the running cell of a notebook is over: the notebook keeps what an interrupt left."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or threading.current_thread() is not threading.main_thread():
        return

    def after_cell(result=None):
        shell.events.unregister("post_run_cell", after_cell)
        finalizer()

    shell.events.register("post_run_cell", after_cell)


def _config(callback):
    """What tells one callback from another, as plain data."""
    try:
        config = callback.get_config()
    except (TypeError, ValueError):  # Its filters are a function.
        config = None
    return json.loads(json.dumps([type(callback).__name__, config], default=str))


def _goes_on(before, epochs, epoch):
    """Whether a fit from `epoch` to `epochs` goes on with one that was saved in the middle.

    It begins where that one was, or has as many epochs as that one had left. A file that was written in the middle of
    an epoch, or before our callback heard of its end, counts the epoch before.
    """
    done, left = before["epoch"], before["epochs"] - before["epoch"]
    return left > 0 and ((epoch > 0 and epoch in (done, done + 1)) or epochs - epoch in (left, left - 1))
