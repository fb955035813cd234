"""Holding another callback back until the model is as sparse as it is to be."""

import keras

from keras_sparse import optimizers
from keras_sparse.registry import Configurable, serializable

__all__ = ["AtTargetSparsity"]


@serializable
class AtTargetSparsity(keras.callbacks.Callback, Configurable):
    """Holds another callback back until the model has reached its target sparsity.

    `ModelCheckpoint(save_best_only=True)` and `EarlyStopping` prefer the early, denser epochs. Wrapped in this callback
    they see only epochs, batches and validations at the target. Beginning and end of training reach them always.

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
        if not self._others():
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

    # A validation has no update in it: what is let begin is let end, too.

    def on_test_begin(self, logs=None):
        if self._at_target():
            self.callback.on_test_begin(logs)

    def on_test_end(self, logs=None):
        if self._at_target():
            self.callback.on_test_end(logs)

    def on_test_batch_begin(self, batch, logs=None):
        if self._at_target():
            self.callback.on_test_batch_begin(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        if self._at_target():
            self.callback.on_test_batch_end(batch, logs)

    def _at_target(self):
        return all(callback.reached for callback in self._others())

    def _others(self):
        """The callbacks of the fit that make the model sparse."""
        sparse = optimizers.find(self._model)
        fit = None if sparse is None else sparse.sparse_parts.owner
        return [] if fit is None else fit.callbacks
