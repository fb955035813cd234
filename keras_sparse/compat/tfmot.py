"""The names of tensorflow-model-optimization (tfmot) on Keras 3: `from keras_sparse.compat import tfmot`.

`tfmot.load(path)` reads what tf_keras and tfmot saved, which Keras 3 refuses with "Unknown layer: PruneLowMagnitude".
`tfmot.sparsity.keras` has the functions and callbacks of pruning.
"""

import types

from keras_sparse.compat import schedules
from keras_sparse.compat import sparsity as _sparsity
from keras_sparse.compat.loading import load

__all__ = ["load", "sparsity"]

# All that `tfmot.sparsity.keras` has.
_NAMES = {
    _sparsity: """
        PrunableLayer PruneForLatencyOnXNNPack PruningPolicy PruningSummaries UpdatePruningStep prune_low_magnitude
        prune_scope strip_pruning
    """.split(),
    schedules: ["ConstantSparsity", "PolynomialDecay", "PruningSchedule"],
}
sparsity = types.SimpleNamespace(
    keras=types.SimpleNamespace(
        **{name: getattr(module, name) for module, names in _NAMES.items() for name in names},
    )
)
# What else is in tfmot, and what to do instead.
_INSTEAD = {
    "quantization": "For int8 see `ks.tflite.export(model, path, quantize='int8')`, or Keras's `model.quantize`.",
    "clustering": "Weights with few different values make files small; so do zeros: `ks.callbacks.Pruning(0.9)`.",
    "experimental": "To combine methods: prune first, and `ks.tflite.export(quantize='int8')` keeps the zeros.",
    "version": "See `ks.__version__`.",
}


def __getattr__(name):
    if name in _INSTEAD:
        raise AttributeError(
            f"`tfmot.{name}` is not served here: of tfmot, `ks.compat.tfmot` has `sparsity.keras`, and `load` "
            f"for files with any of its wrappers. {_INSTEAD[name]}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
