"""Fine-tuning goes on with a model that is sparse, or waits until it is."""

import warnings

import keras

from keras_sparse import optimizers, pruning, selection
from keras_sparse.callbacks.masks import MaskCallback
from keras_sparse.registry import serializable

__all__ = ["AtTargetSparsity", "KeepSparsity"]


@serializable
class KeepSparsity(MaskCallback):
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
        plan = pruning.Plan(model, 0.0, filters=lambda variable: id(variable) in chosen)
        plan.keep_units(model)
        return plan


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
        if sparse is None or not any(isinstance(user, MaskCallback) for user in sparse.users):
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


def _is_dense(weight):
    value = weight.numpy()
    return (value != 0).all() or (value == 0).all()
