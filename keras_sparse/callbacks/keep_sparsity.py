"""Fine-tuning a sparse model: its zeros stay zero."""

import warnings

from keras_sparse import pruning, selection
from keras_sparse.callbacks.sparse_callback import SparseCallback
from keras_sparse.identity import IdentityDict
from keras_sparse.registry import serializable

__all__ = ["KeepSparsity"]


@serializable
class KeepSparsity(SparseCallback):
    """Fine-tunes a sparse model: weights that are zero stay zero.

    Every kernel with zeros is masked, depthwise kernels and embeddings too. Zeros that an initializer makes (identity
    matrices, kernels that start at zero) are no pruned weights and are trained. Kernels that Keras's `quantize` made
    integers are not trained at all, so their zeros stay anyway.

    Args:
        filters: Whose zeros are kept: a regex, a list of them, a layer, a layer class, or a callable on the variable;
            see `ks.selection.select`. `None`: every kernel's.

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

    def __init__(self, filters=None):
        super().__init__()
        selection.check_filters(filters)
        self.filters = filters

    def attach(self, run):
        model = run.model
        found = selection.pruned_zeros(model, self.filters)
        sparse = IdentityDict((weight.variable, zeros) for weight, zeros in found if weight.trainable)
        low_rank = [layer.name for layer in selection.layers(model) if getattr(layer, "lora_enabled", False)]
        if low_rank:
            warnings.warn(
                f"LoRA adds a dense update to the kernels of {low_rank}: their zeros are not kept. Merge it first "
                "(save and load the model), then prune and fine-tune.",
                stacklevel=2,
            )
        if not sparse:
            frozen = any(w.quantized and (w.in_use() == 0).any() for w in selection.weights(model))
            if not low_rank and not frozen:  # No step changes the integers that `model.quantize` made.
                warnings.warn(
                    f"KeepSparsity found no zeros to keep in {model.name!r}. Prune the model first, for example with "
                    "`ks.prune(model, 0.5)`.",
                    stacklevel=2,
                )
            return
        run.plan = pruning.Plan(model, 0.0, filters=lambda variable: variable in sparse)
        kept = [~sparse[goal.weight.variable] for goal in run.plan.goals]
        run.plan.keep_units(model, kept)
        run.plan.attach(run.parts, kept)
