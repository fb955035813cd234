"""Operators from which an accelerator computes wrong numbers without an error, however a file's weights are stored."""

__all__ = [
    "FAULTS", "averaged", "broadcast", "differs", "grouped", "resized", "shifted", "strided", "takes_groups",
]  # fmt: skip

_SAME = 0  # in the file's `Padding`
_AT_ONCE = 4  # channels that a GPU computes
_SUMS = {"MEAN": "mean", "SUM": "sum"}
_BYTES = ("int8", "uint8")
_ELEMENTWISE = ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE", "POW")


def shifted(model):
    """Why LiteRT's GPU accelerator computes wrong numbers from a file's transposed convolutions, or `None`.

    With padding "same" it cuts their outputs at another place: TFLite's rule looks at the convolution that it is the
    transpose of, from the output's size to the input's, and the GPU takes the padding of a convolution of the input's
    size. Where the two differ, in rows or columns, the output is shifted. Measured, ai-edge-litert 2.3.0: kernels of 3
    and 5 at stride 2 on images of odd size; outputs are wrong by more than their magnitude.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.faults import shifted
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> up = keras.layers.Conv2DTranspose(3, 3, 2, padding="same")
    >>> odd, even = (keras.Sequential([keras.Input((size, size, 3)), up]) for size in (7, 8))
    >>> shifted(read(convert(Job(even)).content)), shifted(read(convert(Job(odd)).content))[-19:]
    (None, 'images of even size')
    """
    for graph, operator in _operators(model, "TRANSPOSE_CONV"):
        kernel, images = (graph.tensors[number].shape for number in operator.inputs[1:3])
        output = graph.tensors[operator.outputs[0]]
        strides = operator.options.get("StrideH"), operator.options.get("StrideW")
        sizes = zip(kernel[1:3], strides, images[1:3], output.shape[1:3], strict=False)
        if operator.options.get("Padding") == _SAME and any(differs(*axis) for axis in sizes):
            found = "a transposed convolution of {}x{} at stride {}x{} on images of {}x{}"
            return (
                f"LiteRT's GPU accelerator shifts {found.format(*kernel[1:3], *strides, *images[1:3])} with "
                "padding='same', without an error: `ks.tflite.adapt(model, 'gpu')` writes it with padding='valid' and "
                "a cropping; or use images of even size"
            )
    return None


def differs(kernel, stride, size, out):
    """Whether the padding in front, by the output's size, is another than by the input's.

    Example:

    >>> from keras_sparse.tflite.faults import differs
    >>> differs(kernel=3, stride=2, size=7, out=14), differs(kernel=3, stride=2, size=8, out=16)
    (True, False)
    """
    out = out if out > 1 else stride * size  # a size that is not in the file
    right = max((size - 1) * stride + kernel - out, 0) // 2
    taken = max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2
    return right != taken


def grouped(model):
    """Why LiteRT's GPU accelerator computes wrong numbers from a file's convolutions in groups, or `None`.

    It computes four channels at once. Measured, ai-edge-litert 2.3.0: groups whose input or output channels are no
    multiples of four give zeros, for all outputs of the network, or end the process. Groups of one channel to one are
    depthwise convolutions, and right.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.faults import grouped
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> halves = (keras.layers.Conv2D(8, 3, groups=2) for _ in range(2))
    >>> of_four, of_three = (keras.Sequential([keras.Input((8, 8, n)), one]) for n, one in zip((8, 6), halves))
    >>> grouped(read(convert(Job(of_four)).content)), grouped(read(convert(Job(of_three)).content))[-41:]
    (None, 'or use groups of a multiple of 4 channels')
    """
    for graph, operator in _operators(model, "CONV_2D"):
        images, kernel = (graph.tensors[number].shape for number in operator.inputs[:2])
        groups = images[-1] // max(kernel[-1], 1)
        inputs, outputs = kernel[-1], kernel[0] // max(groups, 1)
        if groups > 0 and not takes_groups(groups, inputs, outputs):
            return (
                f"LiteRT's GPU accelerator computes zeros from a convolution in {groups} groups of {inputs} channels "
                f"to {outputs}, without an error, or ends the process: `ks.tflite.adapt(model, 'gpu')` writes one for "
                f"each group; or use groups of a multiple of {_AT_ONCE} channels"
            )
    return None


def takes_groups(groups, inputs, outputs):
    """Whether a GPU computes so many groups of so many input and output channels right.

    Example:

    >>> from keras_sparse.tflite.faults import takes_groups
    >>> takes_groups(groups=2, inputs=4, outputs=8), takes_groups(groups=2, inputs=3, outputs=4)
    (True, False)
    """
    return groups == 1 or (inputs, outputs) == (1, 1) or not (inputs % _AT_ONCE or outputs % _AT_ONCE)


def broadcast(model):
    """Why LiteRT's GPU accelerator computes wrong numbers where a file of integers combines tensors, or `None`.

    Measured, ai-edge-litert 2.3.0: sums, products and the like of two computed tensors of 8-bit integers that have
    another number of dimensions each give zeros. TensorFlow's converter makes such ones at batch size 1, where a Keras
    model adds vectors: it reshapes one of them to a single dimension. In floats, and with constants, they are right.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.faults import broadcast
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.signatures import signature
    >>> x = keras.Input((4,))
    >>> model = keras.Model(x, keras.layers.Dense(3)(x) + keras.layers.Dense(3)(x))
    >>> samples = [[row[None]] for row in np.random.default_rng(0).normal(size=(9, 4)).astype("float32")]
    >>> called = signature(model).with_batch(1)
    >>> jobs = Job(model, called), Job(model, called, "int8", samples)
    >>> [bool(broadcast(read(convert(job).content))) for job in jobs]
    [False, True]
    """
    for graph, operator in _operators(model, *_ELEMENTWISE):
        pair = [graph.tensors[number] for number in operator.inputs[:2]]
        ranks = [len(tensor.shape) for tensor in pair]
        if ranks[0] != ranks[-1] and all(one.dtype in _BYTES and one.stored is None for one in pair):
            return (
                f"LiteRT's GPU accelerator computes zeros from {operator.name} of 8-bit integers of {ranks[0]} and of "
                f"{ranks[1]} dimensions, without an error: use quantize='float16'; GPUs compute in floats in any case"
            )
    return None


def strided(model):
    """Why LiteRT's GPU accelerator computes wrong numbers from a file's 1x1 convolutions of integers, or `None`.

    Measured, ai-edge-litert 2.3.0: it overlooks the strides of 1x1 convolutions (those of one step, for sequences)
    with weights of 8 bits, such as the shortcuts of residual networks; outputs are wrong by their magnitude. Other
    sizes of kernels are right, and so are floats, and integers of 16 bits with such weights.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.faults import strided
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(3, 1, strides=2)])
    >>> samples = [[image[None]] for image in np.random.default_rng(0).normal(size=(9, 8, 8, 3)).astype("float32")]
    >>> jobs = Job(model), Job(model, quantize="int8", samples=samples)
    >>> [bool(strided(read(convert(job).content))) for job in jobs]
    [False, True]
    """
    for graph, operator in _operators(model, "CONV_2D"):
        images, kernel = (graph.tensors[number] for number in operator.inputs[:2])
        strides = operator.options.get("StrideH"), operator.options.get("StrideW")
        output = graph.tensors[operator.outputs[0]]
        # Of one row or column it takes the first, as it should.
        several = [output.shape[axis] > 1 or axis in output.opened for axis in (1, 2)]
        if kernel.dtype in _BYTES and images.dtype != "int16" and tuple(kernel.shape[1:3]) == (1, 1):
            if any(stride > 1 and many for stride, many in zip(strides, several, strict=True)):
                return (
                    "LiteRT's GPU accelerator overlooks the strides of a 1x1 convolution with weights of 8 bits "
                    f"({strides[0]}x{strides[1]}), without an error: use quantize='float16'; GPUs compute in floats in "
                    "any case"
                )
    return None


def averaged(model):
    """Why LiteRT.js computes wrong numbers from a file's means and sums of 8-bit integers, or `None`.

    On WebAssembly it does where the last axis is among those that are summed over, as layer normalization, RMS
    normalization and unit norms do. Measured, LiteRT.js 2.5.3, axes of 1 to 256 numbers: outputs are wrong by 0.3 to 3
    times their magnitude. Over other axes, as in global pooling, they are right, as is all on other runtimes.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.faults import averaged
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.LayerNormalization()])
    >>> samples = [[row[None]] for row in np.random.default_rng(0).normal(size=(9, 4)).astype("float32")]
    >>> jobs = Job(model), Job(model, quantize="int8", samples=samples)
    >>> [bool(averaged(read(convert(job).content))) for job in jobs]
    [False, True]
    """
    for graph, operator in _operators(model, *_SUMS):
        values, axes = (graph.tensors[number] for number in operator.inputs[:2])
        last = len(values.shape) - 1
        # Axes that are computed may be any.
        if values.dtype in _BYTES and (axes.stored is None or {-1, last} & set(axes.values().reshape(-1))):
            return (
                f"LiteRT.js computes a {_SUMS[operator.name]} of 8-bit integers over the last axis wrong on "
                "WebAssembly, without an error (layer normalization has one): use quantize='dynamic' or 'float16'"
            )
    return None


def resized(model):
    """Why TFLite Micro computes wrong numbers from a file with tensors of computed sizes, or `None`.

    It lays out the memory of all tensors before it runs, and gives one whose size follows while it runs the place of a
    single number: what is written there overwrites others. Recurrent layers that return sequences have such tensors,
    in the loop that puts their outputs together. Measured, tflite-micro of 2026-10: over 3 steps the outputs are wrong
    by more than their magnitude; over 16 the loop never ends.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.faults import resized
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> layers = [keras.layers.GRU(4, return_sequences=True, unroll=unroll) for unroll in (False, True)]
    >>> models = [keras.Sequential([keras.Input((3, 2), batch_size=1), layer]) for layer in layers]
    >>> [bool(resized(read(convert(Job(model)).content))) for model in models]
    [True, False]
    """
    for graph in model.subgraphs:
        for operator in graph.operators:
            taken = [graph.tensors[number] for number in operator.inputs if number >= 0]
            made = [graph.tensors[number] for number in operator.outputs]
            # Where a size begins to be open. What only gets another shape has as many numbers as before.
            if operator.name != "RESHAPE" and _open(made) and not _open(taken):
                return (
                    f"TFLite Micro computes wrong numbers from a {operator.name} whose size is computed while it runs, "
                    "without an error, or never ends: give inputs whole shapes, and recurrent layers that return "
                    "sequences `unroll=True`"
                )
    return None


def _open(tensors):
    return any(tensor.opened for tensor in tensors)


def _operators(model, *names):
    """Yield graphs and their operators of some names."""
    for graph in model.subgraphs:
        yield from ((graph, operator) for operator in graph.operators if operator.name in names)


FAULTS = (  # and what users call the accelerator
    (shifted, "GPUs"),
    (grouped, "GPUs"),
    (broadcast, "GPUs"),
    (strided, "GPUs"),
    (averaged, "browsers"),
    (resized, "microcontrollers"),
)
