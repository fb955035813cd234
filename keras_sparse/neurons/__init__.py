"""Which units of a model are active on data, and which are dead."""

from keras_sparse.neurons.measure import Probe, neuron_sparsity

__all__ = ["Probe", "neuron_sparsity"]
