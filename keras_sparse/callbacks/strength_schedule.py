"""The strength of regularizers, raised while the model trains."""

from keras_sparse import optimizers, schedules
from keras_sparse.callbacks.clock import Clock
from keras_sparse.callbacks.sparse_callback import SparseCallback
from keras_sparse.registry import serializable
from keras_sparse.regularizers import MovableStrength

__all__ = ["StrengthSchedule"]


@serializable
class StrengthSchedule(SparseCallback):
    """Raises the strength of each `ks.regularizers.L1` and `GroupLasso` of the model from 0 to its own value.

    The strength changes at the start of epochs. After training it is at its full value. On the JAX backend the training
    step is compiled anew whenever the strength changes. The log `strength` is there if all regularizers have the same.

    Args:
        schedule: The way from 0 to the full strength: a name or a `ks.schedules.Schedule`.
        begin: Until when the strength is 0. A float is a fraction of this `fit` (epochs x steps), an int counts
            optimizer steps from the start of this `fit`.
        end: From when the strength is full, like `begin`.

    Raises:
        ValueError: If `begin` or `end` is out of range or `end <= begin`; in `fit`, if the model has none of these
            regularizers or the strength would be 0 in every epoch.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer=ks.regularizers.L1(0.5))])
    >>> model.compile("sgd", "mse")
    >>> callback = ks.callbacks.StrengthSchedule(end=0.5)
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), epochs=4, verbose=0, callbacks=[callback])
    >>> history.history["strength"]
    [0.0, 0.25, 0.5, 0.5]
    """

    def __init__(self, schedule="linear", begin=0.0, end=0.5):
        super().__init__()
        self.schedule = schedules.get(schedule)
        self.clock = Clock(begin, end)
        self.begin, self.end = begin, end

    @property
    def finished(self):
        """Always: nothing is due between the starts of epochs."""
        return True

    def attach(self, run):
        found = (variable.regularizer for variable in run.model.trainable_variables)
        self._movable = list({id(r): r for r in found if isinstance(r, MovableStrength)}.values())
        if not self._movable:
            raise ValueError(
                "There is no strength to move: put a regularizer on the model with `ks.regularize(model, "
                f"ks.regularizers.L1(1e-4))`. Received: model {run.model.name!r}"
            )
        self._fraction = None

    def start(self, run):
        clock = self.clock
        if clock.length and self._fraction is None:
            last_epoch = clock.length - clock.length // max(1, self.params["epochs"] - run.epoch)
            if clock.first >= last_epoch:
                raise ValueError(
                    "The strength would be 0 in every epoch of this fit: lower `begin`, or train for more epochs. "
                    f"Received: begin={self.begin!r}, end={self.end!r}, epochs={self.params['epochs']}"
                )
        self._move(run, self.schedule(clock.fraction(clock.now)))

    def log(self, run):
        strengths = {regularizer.strength for regularizer in self._movable}
        return {"strength": strengths.pop() * self._fraction} if len(strengths) == 1 else {}

    def finish(self, run):
        self._move(run, 1.0)

    def _move(self, run, fraction):
        if fraction == self._fraction:
            return
        self._fraction = fraction
        outdated = [regularizer.move(fraction) for regularizer in self._movable]
        if any(outdated):
            optimizers.drop(run.model, in_fit=True)
            run.model.test_function = None
