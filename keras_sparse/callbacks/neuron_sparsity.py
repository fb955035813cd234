"""A neuron callback logs how many units of a model are inactive while `model.fit` trains it."""

from collections.abc import Iterator

import keras

from keras_sparse import batches, neurons
from keras_sparse.registry import serializable

__all__ = ["NeuronSparsity"]


@serializable
class NeuronSparsity(keras.callbacks.Callback):
    """Logs the neuron sparsity of the hidden layers at the end of each epoch.

    `neuron_sparsity` is the share of units that are inactive on a sample, averaged over samples and units, and
    `dead_neurons` the share of those that are inactive on every sample; both over the hidden layers that have an
    activation. They stand in the logs, and with them in `History`, the progress bar and `CSVLogger`. The tables are in
    `report`, the last one. What is counted is told in `ks.neuron_sparsity`; a model without such layers logs nothing.

    Args:
        data: Inputs, as for `ks.neuron_sparsity`; something that can be read again each epoch, so no generator.
        batch_size: Samples in a batch if `data` are arrays.

    Raises:
        ValueError: If `data` cannot be used, at the latest at the end of the first epoch.
        TypeError: If `data` is of the wrong type, or can be read only once.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.zeros((16, 8)), np.zeros((16, 1))
    >>> history = model.fit(x, y, verbose=0, callbacks=[ks.callbacks.NeuronSparsity(x)])
    >>> history.history["dead_neurons"]
    [1.0]
    """

    def __init__(self, data, batch_size=32):
        super().__init__()
        if isinstance(data, Iterator):
            raise TypeError(
                "`data` must be readable again in each epoch; an iterator is used up after the first. Pass arrays, a "
                f"dataset or a `keras.utils.PyDataset`. Received: {data!r} of type {type(data).__name__}"
            )
        batches.check(data, batch_size)
        self.data, self.batch_size = data, batch_size
        self.report = None
        self._probe = None

    def get_config(self):
        """Raise a `ValueError`: data have no place in a config."""
        raise ValueError(
            "`NeuronSparsity` has no config, because its data have none: make it anew, with "
            f"`NeuronSparsity(data, batch_size={self.batch_size})`. Received: data of type {type(self.data).__name__}"
        )

    def on_train_begin(self, logs=None):
        self._probe = None

    def on_epoch_end(self, epoch, logs=None):
        if self._probe is None:
            self._probe = neurons.Probe(self.model)
        self.report = self._probe.measure(self.data, self.batch_size)
        if logs is not None:
            values = {name: self.report.totals[name] for name in ("neuron_sparsity", "dead_neurons")}
            logs.update({name: value for name, value in values.items() if value is not None})
