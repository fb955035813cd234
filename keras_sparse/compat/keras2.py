"""A layer of Keras 2 is a configuration in a file; here it becomes a layer of Keras 3, or is refused by name."""

import inspect

import keras

__all__ = ["MODELS", "LayerFactory", "hard_sigmoid"]

# Arguments that Keras 3 has no more, and the values at which they did nothing.
_GONE = {
    "time_major": (False,), "ragged": (False,), "dynamic": (False,), "renorm": (False,), "fused": (None, True, False),
    "virtual_batch_size": (None,), "renorm_clipping": (None,), "renorm_momentum": (0.99,), "adjustment": (None,),
    "input_dtype": None, "implementation": None, "experimental_autocast": None, "softmax_robust_masking": None,
    "query_shape": None, "key_shape": None, "value_shape": None, "optional": None, "zero_output_for_mask": (False,),
}  # fmt: skip
_GROUPS_GONE = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", "Conv1DTranspose",
                "Conv2DTranspose", "Conv3DTranspose")  # fmt: skip
_KERNEL_GONE = ("kernel_initializer", "kernel_regularizer", "kernel_constraint")
MODELS = ("Functional", "Model", "Sequential")


@keras.saving.register_keras_serializable("keras_sparse", "keras2_hard_sigmoid")
def hard_sigmoid(x):
    """The `hard_sigmoid` of Keras 2, `clip(0.2 x + 0.5, 0, 1)`; that of Keras 3 is `relu6(x + 3) / 6`.

    Args:
        x: A tensor.

    Returns:
        A tensor of the same shape.

    Example:

    >>> from keras_sparse.compat import keras2
    >>> round(float(keras2.hard_sigmoid(1.0)), 4)
    0.7
    """
    return keras.ops.clip(0.2 * keras.ops.convert_to_tensor(x) + 0.5, 0.0, 1.0)


class LayerFactory:
    """Makes layers of Keras 3 from configurations of Keras 2.

    Args:
        safe_mode: Whether `Lambda` layers, which run code from the file, are refused.
        initializer: What to use in place of every initializer, or `None`.

    Attributes:
        model: Function that makes the model inside of a wrapper layer from its configuration; `None`: there are none.

    Raises:
        ValueError: If a layer is not known, or has options that Keras 3 has not.

    Example:

    >>> from keras_sparse.compat import keras2
    >>> config = {"name": "dw", "kernel_size": [3, 3], "groups": 1, "batch_input_shape": [None, 8, 8, 2]}
    >>> keras2.LayerFactory().make({"class_name": "DepthwiseConv2D", "config": config}).kernel_size
    (3, 3)
    """

    def __init__(self, safe_mode=True, initializer=None):
        self.safe_mode, self._initializer = safe_mode, initializer
        self.model = None

    def make(self, config):
        """Return the layer that a configuration describes."""
        name, own = config["class_name"], dict(config["config"])
        where = f"The layer {own.get('name')!r} ({name})"
        if name in MODELS:
            raise ValueError(f"{where} is a model inside of a wrapper layer, which is not known here.")
        own.pop("batch_input_shape", None)
        own.pop("trainable", None)
        if name == "Lambda":
            return self._function(own, where)
        kind = self._class(config, where)
        arguments = {key: self._value(key, value) for key, value in own.items()}
        arguments = self._translated(name, arguments, where)
        if self._initializer is not None:  # Also where the configuration leaves it to the class.
            accepted = inspect.signature(kind).parameters
            arguments |= {key: self._initializer for key in accepted if key.endswith("_initializer")}
        try:
            if kind.__module__.split(".")[0] == "keras" and _has_layers(arguments):
                return kind(**arguments)
            return kind.from_config(arguments)
        except Exception as error:  # Whatever a constructor raises on what it does not know.
            raise ValueError(f"{where} cannot be made in Keras 3: {error}") from error

    def _class(self, config, where):
        name = config["class_name"]
        own = keras.saving.get_registered_object(config.get("registered_name") or name)
        own = own or keras.saving.get_registered_object(name)
        kind = own or getattr(
            keras.layers,
            {"ThresholdedReLU": "ReLU", "SyncBatchNormalization": "BatchNormalization"}.get(name, name),
            None,
        )
        if not (isinstance(kind, type) and issubclass(kind, keras.layers.Layer)):
            raise ValueError(
                f"{where} is of a class that Keras 3 does not have. If it is your own, register it before: decorate a "
                "Keras 3 version of it with `@keras.saving.register_keras_serializable()`, or load inside of "
                f"`keras.saving.custom_object_scope({{{name!r}: ...}})`."
            )
        return kind

    def _function(self, config, where):
        if self.safe_mode:
            raise ValueError(
                f"{where} holds Python code, which loading would run: unsafe with a file that others wrote. If you "
                "trust the file, pass `safe_mode=False`."
            )
        function = config.pop("function")
        if isinstance(function, (list, tuple)):
            code, defaults, closure = function
            function = {"class_name": "__lambda__", "config": {"code": code, "defaults": defaults, "closure": closure}}
        elif isinstance(function, str):
            found = keras.saving.get_registered_object(function)
            if found is None:
                raise ValueError(f"{where} calls the function {function!r}, which is not registered with Keras.")
            return keras.layers.Lambda(found, name=config.get("name"))
        config = {key: config.get(key) for key in ("name", "arguments") if config.get(key)}
        try:
            return keras.layers.Lambda.from_config({**config, "function": function}, safe_mode=False)
        except Exception as error:  # Code of another version of Python, and whatever else.
            raise ValueError(f"{where} holds code that cannot be read here: {error}") from error

    def _value(self, key, value):
        """A value in a configuration, without what only Keras 2 understands."""
        if self._initializer is not None and key.endswith("_initializer") and value is not None:
            return self._initializer
        if isinstance(value, (list, tuple)):
            return [self._value("", one) for one in value]
        if isinstance(value, str) and value == "hard_sigmoid" and key.endswith("activation"):
            return hard_sigmoid
        if not isinstance(value, dict) or "class_name" not in value:
            return {name: self._value("", one) for name, one in value.items()} if isinstance(value, dict) else value
        name, config = value["class_name"], value.get("config", {})
        if name in ("__tuple__", "TensorShape"):
            return tuple(value["items"])
        if name == "QuantizeAwareActivation":
            return self._value(key, config["activation"])
        if name == "NoOpActivation":
            return "linear"
        if name in ("Policy", "PolicyV1", "AutoCastPolicy"):
            return config["name"]
        if name == "function":
            return self._value(key, config)
        if name in ("__lambda__", "Lambda"):
            raise ValueError("The model holds Python code (`Lambda`), which loading would run: unsafe.")
        if name in MODELS and key == "layer" and self.model is not None:
            return self.model(value)
        if isinstance(getattr(keras.layers, name, None), type) and key in (
            "layer",
            "backward_layer",
            "cell",
            "cells",
            "",
        ):
            return self.make(value)
        registered = value.get("registered_name") or name
        known = keras.saving.get_registered_object(registered) is not None
        return {"class_name": registered if known else name, "config": self._value("", config)}

    def _translated(self, name, arguments, where):
        """The arguments under the names that they have in Keras 3."""
        for key, harmless in _GONE.items():
            if key in arguments and name != "InputLayer":
                value = arguments.pop(key)
                if harmless is not None and value not in harmless:
                    raise ValueError(f"{where} has `{key}={value!r}`, which Keras 3 does not know.")
        if name in _GROUPS_GONE and arguments.pop("groups", 1) != 1:
            raise ValueError(f"{where} has `groups`, which Keras 3 does not know in this layer.")
        if name.startswith(("Depthwise", "Separable")):
            arguments = {key: value for key, value in arguments.items() if key not in _KERNEL_GONE}
        if name == "LeakyReLU" and "alpha" in arguments:
            arguments["negative_slope"] = arguments.pop("alpha")
        if name == "ThresholdedReLU":
            arguments["threshold"] = arguments.pop("theta")
        if name == "SyncBatchNormalization":
            arguments["synchronized"] = True
        if name == "BatchNormalization" and isinstance(arguments.get("axis"), list):
            (arguments["axis"],) = arguments["axis"]
        return arguments


def _has_layers(arguments):
    values = [one for value in arguments.values() for one in (value if isinstance(value, list) else [value])]
    return any(isinstance(value, keras.layers.Layer) for value in values)
