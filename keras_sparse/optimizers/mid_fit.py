"""A model that is saved in the middle of a fit: how its file names the optimizer, so that it loads with us and without.

With keras_sparse imported, the optimizer comes back with what its parts had saved, for the fit that resumes. Without,
Keras finds the plain class of the optimizer by its module, and its own state where it always is.
"""

import types

import keras

from keras_sparse.optimizers.parts import Parts, SparseState
from keras_sparse.optimizers.sparse import SparseOptimizer
from keras_sparse.registry import Configurable, serializable

__all__ = ["MidFitOptimizer"]

_PACKAGE = "keras_sparse"
_FILES = "save_own_variables", "load_own_variables"


def shadow_compile_config(model):
    """Let a model that is saved now name its optimizer as this module says."""
    model.get_compile_config = types.MethodType(_compile_config, model)


def hide_in_files(outer, parts):
    """Let a `LossScaleOptimizer` save and load its state without that of the parts inside, which JAX's has."""
    for name in _FILES:

        def method(store, name=name):
            with parts.files():
                return getattr(type(outer), name)(outer, store)

        method.__name__ = name
        setattr(outer, name, method)


def show_in_files(outer):
    """The inverse of `hide_in_files`."""
    for name in _FILES:
        if name in vars(outer):
            delattr(outer, name)


def _compile_config(model):
    config = type(model).get_compile_config(model)
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict):
        # In mixed precision, the optimizer that takes the steps is inside.
        inner = optimizer["config"].get("inner_optimizer") if optimizer["class_name"] == "LossScaleOptimizer" else None
        target = optimizer if inner is None else inner
        if not (target["registered_name"] or "").startswith(f"{_PACKAGE}>"):
            target.update(_named(target))
    return config


def _named(config):
    kind = getattr(keras.optimizers, config["class_name"], None)
    # On torch, Keras's optimizers are classes of the backend, which are made from those that everybody knows.
    if config["module"].split(".")[0] == "keras" and kind is not None:
        return {"module": kind.__module__, "registered_name": f"{_PACKAGE}>MidFit{kind.__name__}"}
    # A class of the user's own must be registered to be found; without us, the name says what is missing.
    return {
        "module": MidFitOptimizer.__module__,
        "class_name": "MidFitOptimizer",
        "registered_name": f"{_PACKAGE}>MidFitOptimizer",
        "config": {"optimizer": dict(config)},
    }


def _with_room(optimizer):
    """Let an optimizer take what the parts of another had saved."""
    optimizer.sparse_state = SparseState(Parts())
    return optimizer


@serializable
class MidFitOptimizer(Configurable):
    """Stands in a file for an optimizer of the user's own class that was in the middle of a fit.

    Example:

    >>> import keras, keras_sparse as ks
    >>> config = {"optimizer": keras.saving.serialize_keras_object(keras.optimizers.SGD(0.5))}
    >>> type(ks.optimizers.mid_fit.MidFitOptimizer.from_config(config)).__name__
    'SGD'
    """

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Return the optimizer itself."""
        return _with_room(keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects))


def _register(kind):
    """Register what stands in a file for one of Keras's own optimizers."""

    def from_config(cls, config, custom_objects=None):
        return _with_room(kind.from_config(config))

    members = {"from_config": classmethod(from_config), "__module__": __name__}
    serializable(type(f"MidFit{kind.__name__}", (Configurable,), members))


for _name in sorted(vars(keras.optimizers)):
    _kind = getattr(keras.optimizers, _name)
    if isinstance(_kind, type) and issubclass(_kind, keras.optimizers.Optimizer) and _kind is not SparseOptimizer:
        _register(_kind)
