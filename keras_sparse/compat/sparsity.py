"""The functions and callbacks of `tfmot.sparsity.keras` on Keras 3: layers are marked, and `fit` prunes them."""

import keras
import numpy as np

from keras_sparse import optimizers, patterns, selection
from keras_sparse.callbacks.sparse_callback import SparseCallback
from keras_sparse.compat import schedules
from keras_sparse.compat.wrappers import PRUNED
from keras_sparse.registry import serializable

__all__ = [
    "PrunableLayer",
    "PruneForLatencyOnXNNPack",
    "PruningPolicy",
    "PruningSummaries",
    "UpdatePruningStep",
    "prune_low_magnitude",
    "prune_scope",
    "strip_pruning",
]

# Layers of Keras in which tfmot prunes nothing.
_DENSE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class _Settings:
    """What `prune_low_magnitude` says of a layer, and how many steps it has been trained since."""

    def __init__(self, schedule, block_size, block_pooling_type, sparsity_m_by_n):
        self.schedule = schedules.get(schedule)
        if block_pooling_type not in ("AVG", "MAX"):
            raise ValueError(
                f"Unsupported pooling type: `block_pooling_type` should be 'AVG' or 'MAX'. "
                f"Received: {block_pooling_type!r}"
            )
        self.block, self.pooling = tuple(block_size), block_pooling_type
        if len(self.block) != 2 or not all(isinstance(size, int) and size > 0 for size in self.block):
            raise ValueError(f"`block_size` must be two positive integers. Received: {block_size!r}")
        self.pattern = None
        if sparsity_m_by_n:
            zeros, size = sparsity_m_by_n
            self.pattern = patterns.NM(size - zeros, size)
        self.step = 0

    def due(self, step):
        """Whether a mask is due in a step, and the sparsity of it."""
        prune, sparsity = self.schedule(step)
        if self.pattern is not None:
            return step == 1, self.pattern.sparsity  # whatever the schedule says: tfmot's conditional_mask_update
        return prune and sparsity > 0, sparsity

    def mask(self, weights, sparsity):
        """The mask that tfmot computes from weights: a boolean array, True where a weight stays."""
        if self.pattern is not None:
            rows = np.moveaxis(np.abs(weights), -1, 0).reshape(-1, weights.shape[-2])
            kept = self.pattern.mask(rows, self.pattern.sparsity, output_axes=(0,))
            return np.moveaxis(kept.reshape((weights.shape[-1], *weights.shape[:-1])), 0, -1)
        if self.block == (1, 1):
            return _largest(np.abs(weights), sparsity)
        height, width = self.block
        edges = [-size % step for size, step in zip(weights.shape, self.block, strict=True)]
        # Blocks that would stand over the edge, half of it on each side, as pooling with `padding="SAME"` has them.
        before = [edge // 2 for edge in edges]
        padded = np.pad(
            np.abs(weights), [(b, e - b) for b, e in zip(before, edges, strict=True)], constant_values=np.nan
        )
        blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        pooled = np.nanmean(blocks, (1, 3)) if self.pooling == "AVG" else np.nanmax(blocks, (1, 3))
        kept = _largest(pooled, sparsity).repeat(height, 0).repeat(width, 1)
        return kept[: weights.shape[0], : weights.shape[1]]


def _largest(scores, sparsity):
    """Keep the largest, ties with the smallest of them too; at least one."""
    count = max(1, int(np.round(np.float32(scores.size) * (np.float32(1) - np.float32(sparsity)))))
    return scores >= np.partition(scores, -count, axis=None)[-count]


def prune_low_magnitude(
    to_prune,
    pruning_schedule=None,
    block_size=(1, 1),
    block_pooling_type="AVG",
    pruning_policy=None,
    sparsity_m_by_n=None,
    **kwargs,
):
    """Mark what `UpdatePruningStep` is to prune, as `tfmot.sparsity.keras.prune_low_magnitude` does.

    Layers are not wrapped: what comes back is the same model or layer, with the same names.

    Args:
        to_prune: A `keras.Model` (Sequential or functional), a layer, or a list of layers.
        pruning_schedule: `ConstantSparsity` or `PolynomialDecay`; defaults to `ConstantSparsity(0.5, 0)`.
        block_size: Height and width of blocks, in matrices only.
        block_pooling_type: `"AVG"` or `"MAX"`: the score of a block.
        pruning_policy: A `PruningPolicy`, or `None` for all layers.
        sparsity_m_by_n: `(m, n)`: m zeros in n consecutive inputs.
        **kwargs: What tfmot passes to its wrapper: refused, as there is none.

    Returns:
        `to_prune`.

    Raises:
        ValueError: If `to_prune` or a layer in it is of a kind that is not supported.
        TypeError: If the schedule is of an unknown kind, or there are `kwargs`.

    Example:

    >>> import keras
    >>> from keras_sparse.compat import tfmot
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> tfmot.sparsity.keras.prune_low_magnitude(model) is model
    True
    """
    if kwargs:
        raise TypeError(
            "`prune_low_magnitude` puts no wrapper around a layer, so there is none for further arguments: write "
            "`keras.Input(shape)` as the first line of a Sequential instead of `input_shape=shape`, and give `name` to "
            f"the layer itself. Received: {', '.join(f'{key}={value!r}' for key, value in kwargs.items())}"
        )
    settings = pruning_schedule or schedules.ConstantSparsity(0.5, 0), block_size, block_pooling_type, sparsity_m_by_n
    whole = isinstance(to_prune, (keras.Sequential, keras.Model))
    if whole and not isinstance(to_prune, keras.Sequential) and not getattr(to_prune, "inputs", None):
        raise ValueError(
            "Subclassed models are not supported currently: `ks.callbacks.Pruning` prunes them. "
            f"Received: {type(to_prune).__name__} {to_prune.name!r}"
        )
    if not isinstance(to_prune, (list, keras.layers.Layer)):
        raise ValueError(
            "`prune_low_magnitude` can only prune an object of the following types: keras.models.Sequential, keras "
            "functional model, keras.layers.Layer, list of keras.layers.Layer (`to_prune` can only be a Keras 3 model "
            f"or layer; files of tf_keras are read by `ks.compat.tfmot.load`). Received: {to_prune!r}"
        )
    if pruning_policy is not None and whole:
        pruning_policy.ensure_model_supports_pruning(to_prune)
    layers = []
    for one in to_prune if isinstance(to_prune, list) else [to_prune]:
        layers += selection.layers(one) if isinstance(one, keras.Model) else [one]
    layers = [one for one in layers if not isinstance(one, (keras.Model, keras.layers.InputLayer))]
    if pruning_policy is not None:
        layers = [one for one in layers if pruning_policy.allow_pruning(one)]
    for layer in layers:
        _check_layer(layer)
    made = [_Settings(*settings) for _ in layers]
    for layer, one in zip(layers, made, strict=True):
        if not hasattr(layer, "tfmot_pruning"):
            layer.tfmot_pruning = one
    return to_prune


def _check_layer(layer):
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(f"`to_prune` can only be a list of `keras.layers.Layer`. Received: {layer!r} in it")
    known = type(layer).__module__.split(".")[0] == "keras"
    if not known and layer.weights and not hasattr(layer, "get_prunable_weights"):
        raise ValueError(
            "Please initialize `Prune` with a supported layer: of Keras, or your own with a method "
            f"`get_prunable_weights`. `ks.callbacks.Pruning` needs no such method. Received: {layer!r}"
        )


def strip_pruning(model):
    """Forget what `prune_low_magnitude` said; there are no wrappers to take off.

    Args:
        model: A `keras.Model`.

    Returns:
        The same model.

    Raises:
        ValueError: If it is no model.

    Example:

    >>> import keras
    >>> from keras_sparse.compat import tfmot
    >>> model = tfmot.sparsity.keras.prune_low_magnitude(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    >>> tfmot.sparsity.keras.strip_pruning(model) is model
    True
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected model to be a `keras.Model` instance but got: {model!r}")
    for layer in selection.layers(model):
        if hasattr(layer, "tfmot_pruning"):
            del layer.tfmot_pruning
    optimizers.unwrap(model)  # in a loop of one's own nothing else says that training has ended
    return model


class PrunableLayer:
    """Base of layers of one's own that say which of their weights `UpdatePruningStep` is to prune.

    Example:

    >>> import keras
    >>> from keras_sparse.compat import tfmot
    >>> class Scaled(keras.layers.Layer, tfmot.sparsity.keras.PrunableLayer):
    ...     def build(self, shape):
    ...         self.table = self.add_weight(shape=(shape[-1], 3), name="table")
    ...     def call(self, x):
    ...         return x @ self.table
    ...     def get_prunable_weights(self):
    ...         return [self.table]
    >>> layer = tfmot.sparsity.keras.prune_low_magnitude(Scaled())
    """

    def get_prunable_weights(self):
        """Return the list of variables to prune."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `get_prunable_weights(self)`.")


def prune_scope():
    """Return a scope in which `keras.models.load_model` loads what a script has saved.

    Models that were pruned here are plain, and need no scope. A file of the real tfmot is refused in it with the way to
    read it, `load`.

    Returns:
        A `keras.saving.CustomObjectScope`.

    Example:

    >>> import keras
    >>> from keras_sparse.compat import tfmot
    >>> model = tfmot.sparsity.keras.prune_low_magnitude(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    >>> model.save("pruned.keras")
    >>> with tfmot.sparsity.keras.prune_scope():
    ...     loaded = keras.models.load_model("pruned.keras")
    """
    return keras.saving.CustomObjectScope({"PruneLowMagnitude": _Refused})


class _Refused:
    """What Keras finds under the name of tfmot's wrapper."""

    @classmethod
    def from_config(cls, config):
        raise ValueError(
            "The real tensorflow-model-optimization wrote this file, with the wrapper `PruneLowMagnitude` around "
            "layers, which Keras 3 cannot load: read it with `ks.compat.tfmot.load(path)`, or convert it by "
            f"`keras-sparse convert-tfmot old.h5 new.keras`. Received: the layer {config.get('name')!r}"
        )


@serializable
class UpdatePruningStep(SparseCallback):
    """Prunes in `fit` what `prune_low_magnitude` has marked, in the training steps in which tfmot would.

    A mask that is due in step n is computed from the weights before step n. Masked weights are zero after every step;
    tfmot lets them move between two steps.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.compat import tfmot
    >>> sparsity = tfmot.sparsity.keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> model = sparsity.prune_low_magnitude(model, sparsity.ConstantSparsity(0.5, begin_step=1))
    >>> model.compile("adam", "mse")
    >>> _ = model.fit(np.ones((8, 4)), np.ones((8, 5)), verbose=0, callbacks=[sparsity.UpdatePruningStep()])
    >>> int((model.layers[0].get_weights()[0] == 0).sum())
    10
    """

    def attach(self, run):
        self._weights = []
        trainable = {id(variable) for variable in run.model.trainable_variables}
        for layer in selection.layers(run.model):
            settings = getattr(layer, "tfmot_pruning", None)
            if settings is not None:
                self._weights += [(settings, one) for one in _prunable(layer, settings) if id(one) in trainable]
        if not self._weights:
            raise ValueError(
                "`UpdatePruningStep` finds no layer to prune: call `prune_low_magnitude` on the model, or its layers, "
                f"before. Received: the model {run.model.name!r}"
            )
        run.parts.masks.add([variable for _, variable in self._weights])
        self.start(run)  # a loop of one's own may begin no epoch

    def start(self, run):
        self._epoch_start = [settings.step for settings, _ in self._weights]

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        if not self._run.attached:
            return
        due = []
        for (settings, variable), step in zip(self._weights, self._steps(batch), strict=True):
            prune, sparsity = settings.due(step)
            if prune:
                due.append((settings, variable, sparsity))
        self._count(batch)
        if not due:
            return
        self.model  # noqa: B018 - JAX puts the state of its step into the variables.
        masks = self._run.parts.masks
        for settings, variable, sparsity in due:
            masks.of(variable).assign(settings.mask(selection.as_array(variable), sparsity))
        masks.apply()

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if self._run.attached and batch >= 0:
            self._count(batch)

    def on_epoch_end(self, batch, logs=None):  # the argument's name in tfmot, by which loops of one's own pass it
        super().on_epoch_end(batch, logs)
        if self._run.attached and self._run.fit.by_hand:  # `fit` applies them in each step
            self._run.parts.masks.apply()

    def _steps(self, batch):
        """The number of a batch's step, from 1 on, for each weight; in a loop of one's own -1 stands for the next."""
        if batch < 0:
            return [settings.step + 1 for settings, _ in self._weights]
        return [start + batch + 1 for start in self._epoch_start]

    def _count(self, batch):
        for (settings, _), step in zip(self._weights, self._steps(batch), strict=True):
            settings.step = step


def _prunable(layer, settings):
    """The weights of a layer that tfmot prunes."""
    if hasattr(layer, "get_prunable_weights"):
        found = layer.get_prunable_weights()
    elif isinstance(layer, _DENSE):
        found = []
    else:
        found = [one for one in layer.weights if one.path.split("/")[-1] in PRUNED]
    wrong = [one for one in found if settings.block != (1, 1) and len(one.shape) != 2]
    if wrong:
        raise ValueError(
            "Block Sparsity can only be used for layers which have 2-dimensional weights: `ks.callbacks.Pruning("
            f"pattern='block_1x4')` prunes others too. Received: {wrong[0].path!r} of shape {tuple(wrong[0].shape)}"
        )
    if settings.pattern is not None:
        found = [one for one in found if len(one.shape) in (2, 4)]
    return found


class PruningSummaries(keras.callbacks.TensorBoard):
    """Writes the sparsity, which `UpdatePruningStep` puts into the logs, to TensorBoard. List it after that one.

    Args:
        log_dir: The folder.
        update_freq: As in `keras.callbacks.TensorBoard`.
        **kwargs: As in `keras.callbacks.TensorBoard`.

    Raises:
        ValueError: If `log_dir` is no text.

    Example:

    >>> from keras_sparse.compat import tfmot
    >>> tfmot.sparsity.keras.PruningSummaries("")
    Traceback (most recent call last):
    ...
    ValueError: `log_dir` must be a non-empty string. Received: log_dir=''
    """

    def __init__(self, log_dir, update_freq="epoch", **kwargs):
        if not isinstance(log_dir, str) or not log_dir:
            raise ValueError(f"`log_dir` must be a non-empty string. Received: log_dir={log_dir!r}")
        super().__init__(log_dir=log_dir, update_freq=update_freq, **kwargs)


class PruningPolicy:
    """Base of policies: which layers `prune_low_magnitude` marks.

    Example:

    >>> from keras_sparse.compat import tfmot
    >>> class OnlyDense(tfmot.sparsity.keras.PruningPolicy):
    ...     def allow_pruning(self, layer):
    ...         return type(layer).__name__ == "Dense"
    """

    def allow_pruning(self, layer):
        """Whether to prune a layer."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `allow_pruning(self, layer)`.")

    def ensure_model_supports_pruning(self, model):
        """Raise `ValueError` if a model is not what the policy is for."""


class PruneForLatencyOnXNNPack(PruningPolicy):
    """Prunes 1x1 convolutions only, which XNNPACK runs sparse.

    Whether the graph around them lets it is said by `ks.tflite.check(model, "xnnpack")`, of which tfmot has a part.

    Example:

    >>> import keras
    >>> from keras_sparse.compat import tfmot
    >>> tfmot.sparsity.keras.PruneForLatencyOnXNNPack().allow_pruning(keras.layers.Conv2D(8, 1))
    True
    """

    def allow_pruning(self, layer):
        return isinstance(layer, keras.layers.Conv2D) and tuple(layer.kernel_size) == (1, 1)

    def ensure_model_supports_pruning(self, model):
        if not any(self.allow_pruning(layer) for layer in selection.layers(model)):
            raise ValueError(
                "`PruneForLatencyOnXNNPack` prunes 1x1 convolutions (`Conv2D` with `kernel_size=1`), and the model has "
                f"none. Received: the model {model.name!r}"
            )
