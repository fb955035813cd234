"""Callbacks that make a model sparse, or keep it so, while `model.fit` trains it."""

from keras_sparse.callbacks.dynamic import DynamicSparseTraining
from keras_sparse.callbacks.fine_tuning import AtTargetSparsity, KeepSparsity
from keras_sparse.callbacks.gates import L0Penalty
from keras_sparse.callbacks.lottery import LotteryTicket
from keras_sparse.callbacks.neurons import NeuronSparsity
from keras_sparse.callbacks.proximal import ProximalL1
from keras_sparse.callbacks.pruning import Pruning
from keras_sparse.callbacks.strength import StrengthSchedule

__all__ = [
    "AtTargetSparsity",
    "DynamicSparseTraining",
    "KeepSparsity",
    "L0Penalty",
    "LotteryTicket",
    "NeuronSparsity",
    "ProximalL1",
    "Pruning",
    "StrengthSchedule",
]
