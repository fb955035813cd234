"""The names of tensorflow-model-optimization (tfmot) on Keras 3: `from keras_sparse.compat import tfmot`.

`tfmot.load(path)` reads what tf_keras and tfmot saved, which Keras 3 refuses with "Unknown layer: PruneLowMagnitude".
`tfmot.sparsity.keras` has the functions and callbacks of pruning.
"""

import types

from keras_sparse.compat import schedules
from keras_sparse.compat import sparsity as _sparsity
from keras_sparse.compat.loading import load

__all__ = ["load", "sparsity"]

_NAMES = (
    "PruneForLatencyOnXNNPack",
    "PruningPolicy",
    "PruningSummaries",
    "UpdatePruningStep",
    "prune_low_magnitude",
    "strip_pruning",
)
sparsity = types.SimpleNamespace(
    keras=types.SimpleNamespace(
        **{name: getattr(_sparsity, name) for name in _NAMES},
        ConstantSparsity=schedules.ConstantSparsity,
        PolynomialDecay=schedules.PolynomialDecay,
        PruningSchedule=schedules.PruningSchedule,
    )
)


def __getattr__(name):
    if name in ("clustering", "quantization"):
        raise AttributeError(
            f"`tfmot.{name}` is not served here: of tfmot, `ks.compat.tfmot` has `sparsity.keras`, and `load` "
            "for files with any of its wrappers. For int8 see `ks.tflite.export(model, path, quantize='int8')`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
