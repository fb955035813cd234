"""A signature says how a model is called: the names, shapes and types of its inputs, and how they are nested."""

import inspect
import re
from dataclasses import dataclass, replace

import keras

from keras_sparse.tflite.errors import ExportError

__all__ = ["HALF", "Input", "Signature", "output_names", "signature"]

# Half precision, as a type or as a policy, and what the file has in its place.
HALF = dict.fromkeys(("float16", "bfloat16", "mixed_float16", "mixed_bfloat16"), "float32")


@dataclass(frozen=True)
class Input:
    """One input of the exported file: its name in the file's signature, shape (`None`: any) and dtype.

    Example:

    >>> Input("image", (None, 28, 28), "float32").name
    'image'
    """

    name: str
    shape: tuple
    dtype: str


@dataclass(frozen=True)
class Signature:
    """How a model is called.

    Attributes:
        inputs: A list of `Input`, in the order in which `keras.tree` flattens the structure.
        structure: The nested structure that the model takes, one leaf for each input.
        keywords: Whether the structure is a dict of keyword arguments (a subclassed model with several arguments).
        typed: Whether the model records the types of its inputs; a subclassed one does not.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.signatures import signature
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> taken = signature(model)
    >>> taken.typed, taken.call(model, [keras.ops.ones((2, 4))]).shape == (2, 3)
    (True, True)
    """

    inputs: list
    structure: object
    keywords: bool
    typed: bool

    def call(self, model, flat):
        """Run the model for inference on a flat list of arrays or tensors."""
        inputs = keras.tree.pack_sequence_as(self.structure, list(flat))
        return model(**inputs, training=False) if self.keywords else model(inputs, training=False)

    def with_batch(self, size):
        """The same signature with a fixed batch size, where it is open."""

        def fixed(shape):
            return (size, *shape[1:]) if shape[:1] == (None,) else shape

        return replace(self, inputs=[replace(leaf, shape=fixed(leaf.shape)) for leaf in self.inputs])

    def with_dtypes(self, dtypes):
        """The same signature with other input types; 64-bit numbers, NumPy's default, become 32-bit ones."""
        dtypes = [str(dtype).replace("64", "32") for dtype in dtypes]
        inputs = [replace(leaf, dtype=HALF.get(dtype, dtype)) for leaf, dtype in zip(self.inputs, dtypes, strict=True)]
        return replace(self, inputs=inputs)


def signature(model):
    """Read from a built model how it is called.

    Args:
        model: A built Keras model.

    Returns:
        A `Signature`. The names are those of the model's `keras.Input`s, else of its `call` arguments. Half-precision
        inputs are taken as float32, and so are all inputs of a subclassed model, which does not record their types.

    Raises:
        ValueError: If the model has not recorded the shapes of its inputs.
        ExportError: If one of them takes strings.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.signatures import signature
    >>> signature(keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3)])).inputs
    [Input(name='x', shape=(None, 4), dtype='float32')]
    """
    typed, keywords = bool(getattr(model, "inputs", None)), False
    if typed:
        structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    else:
        config = model.get_build_config() or {}
        shapes = config.get("input_shape", config.get("shapes_dict"))
        if shapes is None:
            raise ValueError(
                f"The model {model.name!r} has not recorded the shape of its input. Call it once on a batch of data, "
                "then export it."
            )
        keywords = "shapes_dict" in config
        arguments = [p.name for p in inspect.signature(model.call).parameters.values() if p.default is p.empty]
        if not keywords and len(arguments) > 1:
            raise ValueError(
                f"Keras has not recorded the shapes of all arguments of {type(model).__name__}.call. Give the model "
                "one argument, a list or dict of tensors, or a method `build` that takes a shape for each argument. "
                f"Received: arguments {arguments}, shape {shapes}"
            )
        if keywords:
            shapes = {name.removesuffix("_shape"): shape for name, shape in shapes.items()}
        structure = _inputs_of_shapes(shapes, "inputs")
    taken, inputs = set(), []
    for leaf in keras.tree.flatten(structure):
        if leaf.dtype == "string":
            raise ExportError(
                "A .tflite file takes numbers. Export the part of the model behind its `StringLookup` or "
                "`TextVectorization`, and let the app do what these do. "
                f"Received: the input {leaf.name!r} of {model.name!r}, which takes strings"
            )
        name = re.sub(r"\W", "_", leaf.name, flags=re.ASCII)  # TensorFlow takes no other letters
        if name == "self" or not re.search("[a-zA-Z0-9]", name):  # nor these
            name = f"input_{name.strip('_')}"
        while name in taken:
            name += "_1"
        taken.add(name)
        inputs.append(Input(name, tuple(leaf.shape), HALF.get(leaf.dtype, leaf.dtype)))
    return Signature(inputs, structure, keywords, typed)


def _inputs_of_shapes(shapes, name):
    if isinstance(shapes, dict):
        return {key: _inputs_of_shapes(value, str(key)) for key, value in shapes.items()}
    if all(n is None or isinstance(n, int) for n in shapes):
        return Input(name, (None, *shapes[1:]), "float32")
    return [_inputs_of_shapes(value, f"{name}_{i}") for i, value in enumerate(shapes)]


def output_names(outputs):
    """Names of a model's flattened outputs in the file: the keys of a dict, else `output_0`, `output_1`, ...

    Example:

    >>> output_names({"b": 1, "a": 2}), output_names([1, 2])
    (['a', 'b'], ['output_0', 'output_1'])
    """
    flat = list(range(len(keras.tree.flatten(outputs))))
    places = keras.tree.pack_sequence_as(outputs, flat)
    named = isinstance(places, dict) and all(isinstance(item, str) for item in places)
    # Sorted, but for an `OrderedDict`, which keeps its order.
    keys = sorted(places, key=places.get) if named and all(type(i) is int for i in places.values()) else []
    names = [re.sub(r"\W", "_", key) for key in keys]
    return names if len(set(names)) == len(flat) else [f"output_{i}" for i in flat]
