"""A registry maps the strings that users may write to the classes they stand for, as `keras.optimizers.get` does."""

import difflib
import inspect
import math
import numbers
import re

import keras

__all__ = ["Configurable", "Registry", "check_penalty", "check_whole", "did_you_mean", "is_real", "serializable"]


def serializable(cls):
    """Register a class with Keras as `keras_sparse>Name`, so that configs that mention it can be revived.

    Example:

    >>> import keras, keras_sparse as ks
    >>> keras.saving.get_registered_name(ks.schedules.Cosine)
    'keras_sparse>Cosine'
    """
    return keras.saving.register_keras_serializable("keras_sparse")(cls)


class Configurable:
    """An object that Keras can serialize: its constructor's arguments come back from `get_config` as plain data.

    Example:

    >>> from keras_sparse.registry import Configurable
    >>> Configurable.from_config(Configurable().get_config()).get_config()
    {}
    """

    def get_config(self):
        """The constructor's arguments as plain data, read from the attributes of the same names.

        Raises:
            ValueError: If an argument is a function, a class or a layer, which no file can hold.
        """
        return {name: _plain(getattr(self, name), name) for name in inspect.signature(type(self)).parameters}

    @classmethod
    def from_config(cls, config):
        """The inverse of `get_config`."""
        return cls(**config)

    def __repr__(self):
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _plain(value, name):
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, re.Pattern) and value.flags == re.compile("").flags:
        return value.pattern
    if inspect.isroutine(value) or isinstance(value, (type, keras.layers.Layer)):
        raise ValueError(
            f"`{name}` that is a function, a class or a layer has no config: use regexes. Received: {name}={value!r}"
        )
    return keras.saving.serialize_keras_object(value)


class Registry:
    """The named classes of one kind.

    Args:
        kind: What the classes are, for error messages, such as `"schedule"`.

    Example:

    >>> from keras_sparse.registry import Configurable, Registry
    >>> shapes = Registry("shape")
    >>> @shapes.register("square")
    ... class Square(Configurable):
    ...     pass
    >>> type(shapes.get("square", Square)).__name__, list(shapes)
    ('Square', ['square'])
    """

    def __init__(self, kind):
        self.kind = kind
        self.classes = {}

    def __iter__(self):
        """The names."""
        return iter(self.classes)

    def register(self, name):
        """Decorator: make the class available as the string `name` and serializable by Keras."""

        def decorate(cls):
            self.classes[name] = cls
            return serializable(cls)

        return decorate

    def get(self, identifier, base):
        """Return the object that `identifier` stands for.

        Args:
            identifier: An instance of `base`, a registered name, or the config of a serialized instance.
            base: The class that the result must be an instance of.

        Raises:
            ValueError: If the string names nothing.
            TypeError: If `identifier` is none of the above.
        """
        if isinstance(identifier, base):
            return identifier
        if isinstance(identifier, str):
            if identifier not in self.classes:
                raise ValueError(
                    f"Unknown {self.kind}: expected one of {sorted(self.classes)} or an instance of "
                    f"`{base.__name__}`. Received: {identifier!r}{did_you_mean(identifier, self.classes)}"
                )
            return self.classes[identifier]()
        if isinstance(identifier, dict):
            revived = keras.saving.deserialize_keras_object(identifier)
            if isinstance(revived, base):
                return revived
        hint = " Create an instance of the class first." if isinstance(identifier, type) else ""
        raise TypeError(
            f"{'An' if self.kind[0] in 'aeiou' else 'A'} {self.kind} is a string among {sorted(self.classes)} or an "
            f"instance of `{base.__name__}`. "
            f"Received: {identifier!r} of type {type(identifier).__name__}.{hint}"
        )


def did_you_mean(received, names):
    """What to write behind what came in: the question whether another name was meant; nothing if none is like it.

    Example:

    >>> from keras_sparse.registry import did_you_mean
    >>> did_you_mean("GPU", ["cpu", "gpu"])
    ". Did you mean 'gpu'?"
    """
    known = {name.lower(): name for name in names}
    close = difflib.get_close_matches(received.lower(), known, n=1) if isinstance(received, str) else []
    return f". Did you mean {known[close[0]]!r}?" if close else ""


def check_penalty(name, value):
    """Raise unless `value` is a number of at least 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative, infinite or NaN.

    Example:

    >>> from keras_sparse.registry import check_penalty
    >>> check_penalty("strength", -1.0)
    Traceback (most recent call last):
    ...
    ValueError: `strength` must be at least 0 and finite. Received: strength=-1.0
    """
    if not is_real(value):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r} of type {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be at least 0 and finite. Received: {name}={value!r}")


def check_whole(name, value, least=1):
    """Raise unless `value` is a whole number of at least `least`.

    Raises:
        ValueError: If it is something else.

    Example:

    >>> from keras_sparse.registry import check_whole
    >>> check_whole("batch_size", 2.5)
    Traceback (most recent call last):
    ...
    ValueError: `batch_size` must be a whole number of at least 1. Received: batch_size=2.5
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}. Received: {name}={value!r}")


def is_real(value):
    """Whether `value` is a real number; booleans are none.

    Example:

    >>> from keras_sparse.registry import is_real
    >>> is_real(0.5), is_real(True)
    (True, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
