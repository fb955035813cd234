"""A padding is the rows and columns around an image, which say where the windows of a convolution begin and end."""

from keras import layers

__all__ = ["same", "wanted_padding", "windows"]


def wanted_padding(layer, x, form):
    """The padding on each side with which a target's sparse kernels take a convolution of stride 2.

    Args:
        layer: A `Conv2D` or `DepthwiseConv2D`.
        x: Its input.
        form: The `Form` that the target wants.

    Returns:
        An int; `None` if it is no convolution of theirs, or none whose padding must be changed.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.padding import wanted_padding
    >>> from keras_sparse.tflite.targets import get
    >>> layer = keras.layers.DepthwiseConv2D(5, 2)
    >>> wanted_padding(layer, keras.KerasTensor((None, 32, 32, 8)), get("xnnpack").form)
    2
    """
    if layer.strides == (1, 1):
        return None
    rate = layer.dilation_rate
    what = layer.kernel_size, layer.strides, (rate, rate) if isinstance(rate, int) else rate
    if type(layer) is layers.Conv2D:
        kernel, *others = what
        taken = form.is_entry((*kernel, x.shape[-1]), *others, layer.groups)
    else:
        taken = form.takes_depthwise(*what, layer.depth_multiplier)
    return form.padding(layer.kernel_size[0]) if taken else None


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
