"""A padding is the rows and columns around an image, which say where the windows of a convolution begin and end."""

from keras import layers

__all__ = ["same", "wanted_padding", "windows"]


def wanted_padding(layer, x):
    """The padding on each side with which XNNPACK's sparse kernels take a convolution; `None` if it is none of theirs.

    Args:
        layer: A `Conv2D` or `DepthwiseConv2D`.
        x: Its input.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.padding import wanted_padding
    >>> wanted_padding(keras.layers.DepthwiseConv2D(5, 2), keras.KerasTensor((None, 32, 32, 8)))
    2
    """
    size = layer.kernel_size[0]
    if layer.dilation_rate not in (1, (1, 1)) or layer.kernel_size != (size, size) or layer.strides != (2, 2):
        return None
    if type(layer) is layers.Conv2D:
        return 1 if size == 3 and x.shape[-1] == 3 and layer.groups == 1 else None
    return size // 2 if size in (3, 5) and layer.depth_multiplier == 1 else None


def same(size, layer, axis):
    """The padding that "same" means, in front and behind.

    Args:
        size: Rows or columns of the image.
        layer: A convolution.
        axis: 0 for rows, 1 for columns.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.padding import same
    >>> same(32, keras.layers.DepthwiseConv2D(3, 2), 0), same(33, keras.layers.DepthwiseConv2D(3, 2), 0)
    ((0, 1), (1, 1))
    """
    stride = layer.strides[axis]
    total = max(0, (-(-size // stride) - 1) * stride + _extent(layer, axis) - size)
    return total // 2, total - total // 2


def windows(size, padding, layer, axis):
    """How a convolution reads a padded image.

    Args:
        size: Rows or columns of the image.
        padding: In front and behind.
        layer: A convolution.
        axis: 0 for rows, 1 for columns.

    Returns:
        `(padding in front, padding that is read behind, number of windows)`; negative behind: what is not read.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.padding import windows
    >>> windows(32, (1, 1), keras.layers.DepthwiseConv2D(3, 2), 0)
    (1, 0, 16)
    """
    first, last = padding
    stride, extent = layer.strides[axis], _extent(layer, axis)
    count = (size + first + last - extent) // stride + 1
    return first, stride * (count - 1) + extent - size - first, count


def _extent(layer, axis):
    rate = layer.dilation_rate if isinstance(layer.dilation_rate, int) else layer.dilation_rate[axis]
    return rate * (layer.kernel_size[axis] - 1) + 1
