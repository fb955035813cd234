"""keras_sparse: sparsity for Keras 3 - pruning callbacks, reports, and verified sparse .tflite files."""

import importlib
import sys

from keras_sparse.quiet import quiet

if "keras" not in sys.modules:
    # TensorFlow prints lines at import even with TF_CPP_MIN_LOG_LEVEL=3 (2.21), and the command line must be silent.
    with quiet():
        import keras  # noqa: F401

from keras_sparse import (
    baking,
    batches,
    callbacks,
    criteria,
    gates,
    graph,
    layers,
    neurons,
    optimizers,
    patterns,
    pruning,
    regularizers,
    reports,
    schedules,
    selection,
)
from keras_sparse.baking import add_l0, bake
from keras_sparse.neurons import neuron_sparsity
from keras_sparse.pruning import prune, update_masks
from keras_sparse.regularizers import regularize
from keras_sparse.reports import report

__version__ = "0.1.0"

__all__ = [
    "add_l0",
    "bake",
    "baking",
    "batches",
    "callbacks",
    "compare",
    "comparison",
    "criteria",
    "gates",
    "graph",
    "layers",
    "neuron_sparsity",
    "neurons",
    "optimizers",
    "patterns",
    "prune",
    "pruning",
    "regularize",
    "regularizers",
    "report",
    "reports",
    "schedules",
    "search",
    "selection",
    "tflite",
    "update_masks",
]


def __getattr__(name):
    # These bring the TFLite runtime and converter, which only those who use them should pay for.
    if name in ("tflite", "comparison", "search"):
        return importlib.import_module(f"keras_sparse.{name}")
    if name == "compare":
        return importlib.import_module("keras_sparse.comparison").compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
