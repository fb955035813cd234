"""keras_sparse: sparsity for Keras 3 - pruning callbacks, reports, and verified sparse .tflite files."""

import contextlib
import importlib
import multiprocessing
import pathlib
import sys

from keras_sparse import quiet


def _is_command_line():
    """Whether this process is `keras-sparse` or `python -m keras_sparse`, and not one that they have started."""
    if sys.argv[0] == "-m":  # Python has yet to find the program that it was asked for
        return "keras_sparse" in sys.orig_argv
    return pathlib.PurePath(sys.argv[0]).stem == "keras-sparse" and sys.argv[0] in sys.orig_argv


# Importing Keras takes seconds. The command line does without until a command needs it; everybody else may rely on
# `import keras_sparse` for the classes that a saved model mentions. What TensorFlow prints meanwhile is the user's to
# see, but not once more from each worker of a search.
if not _is_command_line():
    with quiet.quiet() if multiprocessing.parent_process() else contextlib.nullcontext():
        from keras_sparse import (
            callbacks,
            compat,
            criteria,
            graph,
            layers,
            optimizers,
            patterns,
            pruning,
            regularizers,
            reports,
            schedules,
            selection,
        )
        from keras_sparse.baking import add_l0, bake
        from keras_sparse.channels import channel_groups, shrink
        from keras_sparse.neurons import neuron_sparsity
        from keras_sparse.plots import plot_history, plot_network
        from keras_sparse.pruning import Budget, prune, reestimate_batch_norm, sensitivity, update_masks
        from keras_sparse.regularizers import regularize
        from keras_sparse.reports import report

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "add_l0",
    "bake",
    "callbacks",
    "channel_groups",
    "compare",
    "compat",
    "criteria",
    "graph",
    "layers",
    "neuron_sparsity",
    "optimizers",
    "patterns",
    "plot_history",
    "plot_network",
    "prune",
    "pruning",
    "reestimate_batch_norm",
    "regularize",
    "regularizers",
    "report",
    "reports",
    "schedules",
    "search",
    "selection",
    "sensitivity",
    "shrink",
    "tflite",
    "update_masks",
]

_FUNCTIONS = {
    "Budget": "pruning",
    "add_l0": "baking",
    "bake": "baking",
    "channel_groups": "channels",
    "compare": "comparison",
    "neuron_sparsity": "neurons",
    "plot_history": "plots",
    "plot_network": "plots",
    "prune": "pruning",
    "reestimate_batch_norm": "pruning",
    "regularize": "regularizers",
    "report": "reports",
    "sensitivity": "pruning",
    "shrink": "channels",
    "update_masks": "pruning",
}


def __getattr__(name):
    # What was not imported above: `tflite`, `comparison` and `search` bring the TFLite runtime and converter, which
    # only those who use them should pay for; on the command line, everything.
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"keras_sparse.{_FUNCTIONS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"keras_sparse.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*__all__, "__version__"]
