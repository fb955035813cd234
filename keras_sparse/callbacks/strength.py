"""The strength of regularizers as a function of the epoch."""

import keras

from keras_sparse import schedules
from keras_sparse.registry import Configurable, is_real, serializable
from keras_sparse.regularizers import MovableStrength

__all__ = ["StrengthSchedule"]


@serializable
class StrengthSchedule(keras.callbacks.Callback, Configurable):
    """Raises the strength of each `ks.regularizers.L1` and `GroupLasso` of the model from 0 to its own value.

    The strength changes at the start of epochs and depends on the epoch's number alone, so that a resumed fit goes on
    where it was. After training it is at its full value. On the JAX backend the training step is compiled anew
    whenever the strength changes. The log `strength` is there if all regularizers have the same.

    Args:
        schedule: The way from 0 to the full strength: a name or a `ks.schedules.Schedule`.
        begin: Until when the strength is 0. A float is a fraction of the fit's `epochs`, an int counts epochs.
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
        for name, value in (("begin", begin), ("end", end)):
            if not is_real(value):
                raise TypeError(f"`{name}` must be a number. Received: {name}={value!r} of type {type(value).__name__}")
            if not value >= 0 or (isinstance(value, float) and value > 1):
                raise ValueError(
                    f"`{name}` must be a fraction in [0.0, 1.0] or a whole number of epochs. Received: {name}={value!r}"
                )
        if isinstance(begin, float) == isinstance(end, float) and end <= begin:
            raise ValueError(f"`end` must be greater than `begin`. Received: begin={begin!r}, end={end!r}")
        self.begin, self.end = begin, end

    def on_train_begin(self, logs=None):
        found = (variable.regularizer for variable in self.model.trainable_variables)
        self._movable = list({id(r): r for r in found if isinstance(r, MovableStrength)}.values())
        if not self._movable:
            raise ValueError(
                "There is no strength to move: put a regularizer on the model with `ks.regularize(model, "
                f"ks.regularizers.L1(1e-4))`. Received: model {self.model.name!r}"
            )
        begin, end = self._span()
        if end <= begin:
            raise ValueError(f"`end` must be after `begin` in this fit. Received: epochs {begin} to {end}")
        if self.fraction(self.params["epochs"] - 1) == 0:
            raise ValueError(
                "The strength would be 0 in every epoch of this fit: lower `begin`, or train for more epochs. "
                f"Received: begin={self.begin!r}, end={self.end!r}, epochs={self.params['epochs']}"
            )
        self._fraction = None

    def on_epoch_begin(self, epoch, logs=None):
        self._move(self.fraction(epoch))

    def on_epoch_end(self, epoch, logs=None):
        strengths = {regularizer.strength for regularizer in self._movable}
        if logs is not None and len(strengths) == 1:
            logs["strength"] = strengths.pop() * self._fraction

    def on_train_end(self, logs=None):
        self._move(1.0)

    def fraction(self, epoch):
        """The share of the full strength in an epoch of the current fit, counted from 0."""
        begin, end = self._span()
        return 0.0 if epoch < begin else self.schedule((epoch - begin) / (end - begin))

    def _span(self):
        epochs = self.params["epochs"]
        return tuple(n * epochs if isinstance(n, float) else n for n in (self.begin, self.end))

    def _move(self, fraction):
        if fraction == self._fraction:
            return
        self._fraction = fraction
        outdated = [regularizer.move(fraction) for regularizer in self._movable]
        if any(outdated):
            self.model.make_train_function(force=True)
            self.model.test_function = None

    def get_config(self):
        """The constructor's arguments as plain data."""
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "begin": self.begin,
            "end": self.end,
        }
