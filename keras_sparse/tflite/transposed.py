"""A transposed convolution with padding "same" cuts its output at a place that LiteRT's GPU accelerator finds wrong.

TFLite's rule looks at the convolution that it is the transpose of: from the output's size to the input's. The GPU takes
the padding of a convolution of the input's size. Where the two differ, in rows or columns, the output is shifted.
"""

__all__ = ["shifted"]

_SAME = 0  # in the file's `Padding`


def shifted(model):
    """Why a GPU computes wrong numbers from a file, however its weights are stored, or `None`.

    Measured, ai-edge-litert 2.3.0: kernels of 3 and 5 at stride 2 on images of odd size; outputs are wrong by more than
    their magnitude, without an error.

    Args:
        model: A `FlatModel`.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.transposed import shifted
    >>> up = keras.layers.Conv2DTranspose(3, 3, 2, padding="same")
    >>> odd, even = (keras.Sequential([keras.Input((size, size, 3)), up]) for size in (7, 8))
    >>> shifted(read(convert(Job(even)).content)), shifted(read(convert(Job(odd)).content))[-19:]
    (None, 'images of even size')
    """
    for graph in model.subgraphs:
        for operator in graph.operators:
            if operator.name == "TRANSPOSE_CONV" and operator.options.get("Padding") == _SAME:
                kernel, images = (graph.tensors[number].shape for number in operator.inputs[1:3])
                output = graph.tensors[operator.outputs[0]]
                strides = operator.options["StrideH"], operator.options["StrideW"]
                sizes = zip(kernel[1:3], strides, images[1:3], output.shape[1:3], strict=False)
                if any(_differs(*axis) for axis in sizes):
                    found = "a transposed convolution of {}x{} at stride {}x{} on images of {}x{}"
                    return (
                        f"LiteRT's GPU accelerator shifts {found.format(*kernel[1:3], *strides, *images[1:3])} with "
                        "padding='same', without an error: use padding='valid' and a `Cropping2D` of what is too "
                        "much, first at the bottom and right, or images of even size"
                    )
    return None


def _differs(kernel, stride, size, out):
    """Whether the padding in front, by the output's size, is another than by the input's."""
    out = out if out > 1 else stride * size  # a size that is not in the file
    right = max((size - 1) * stride + kernel - out, 0) // 2
    taken = max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2
    return right != taken
