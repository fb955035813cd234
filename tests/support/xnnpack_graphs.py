"""Networks inside and outside of the rules of XNNPACK's sparse kernels."""

import keras
from keras import layers
from tflite_models import stem


def pointwise(x, channels, activation="relu6"):
    x = layers.BatchNormalization()(layers.Conv2D(channels, 1, use_bias=False)(x))
    return layers.Activation(activation)(x) if activation else x


def depthwise(x, strides=1, same=True, size=3):
    if not same:
        x = layers.ZeroPadding2D(size // 2)(x)
    return layers.ReLU(6.0)(layers.DepthwiseConv2D(size, strides, padding="same" if same else "valid")(x))


def head(x):
    return layers.Dense(5)(layers.GlobalAveragePooling2D()(x))


def residual(x):
    x = pointwise(stem(x), 32)
    return head(pointwise(layers.Add()([x, pointwise(depthwise(x), 32, None)]), 64))


def joined(x):
    x = pointwise(stem(x), 32)
    return head(layers.Add()([pointwise(x, 32, None), layers.Conv2D(32, 3, padding="same")(x)]))


def excited(x, activation="sigmoid"):
    """A squeeze-and-excite block, as EfficientNet has it."""
    x = pointwise(stem(x), 32, "swish")
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = layers.Conv2D(32, 1, activation=activation)(layers.Conv2D(8, 1, activation="swish")(y))
    return head(pointwise(layers.Multiply()([x, y]), 64))


def lone(x):
    return layers.Flatten()(layers.Conv2D(5, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x)))


WHOLE = {
    "mobilenet": lambda x: head(pointwise(depthwise(pointwise(depthwise(stem(x)), 32), 2, same=False), 64)),
    "residual": residual,
    "squeeze and excite": excited,
    "5x5": lambda x: head(pointwise(depthwise(pointwise(stem(x), 32, "swish"), 2, False, 5), 64, "gelu")),
    "resize": lambda x: head(pointwise(layers.UpSampling2D(interpolation="bilinear")(pointwise(stem(x), 32)), 64)),
}
UNTOUCHED = {
    "same padding at the stem": lambda x: head(pointwise(depthwise(pointwise(stem(x, True), 32), 2), 64)),
    "one tensor twice": lambda x: (lambda y: head(pointwise(layers.add([y, y]), 64)))(pointwise(stem(x), 32)),
    "no stem": lambda x: lone(layers.Conv2D(64, 3)(x)),
    "no pooling at the end": lambda x: layers.Dense(5)(layers.Flatten()(pointwise(depthwise(stem(x)), 16))),
    "max pooling at the end": lambda x: layers.Dense(5)(layers.GlobalMaxPooling2D()(pointwise(stem(x), 32))),
}
BROKEN = {  # these compute wrong numbers without AVX, or do not load
    "MAX_POOL_2D": lambda x: head(pointwise(layers.MaxPooling2D()(pointwise(depthwise(stem(x)), 32)), 64)),
    "AVERAGE_POOL_2D": lambda x: head(pointwise(layers.AveragePooling2D(2)(pointwise(stem(x), 32)), 64)),
    "DEPTHWISE_CONV_2D": lambda x: head(pointwise(depthwise(pointwise(stem(x), 32), 2), 64)),
    "CONV_2D": lambda x: head(pointwise(layers.Conv2D(32, 3, padding="same")(pointwise(stem(x), 32)), 64)),
    "PRELU": lambda x: head(pointwise(layers.PReLU(shared_axes=[1, 2])(pointwise(stem(x), 32, None)), 64)),
    "CONV_2D (operator": lambda x: head(pointwise(layers.Conv2D(32, 1, groups=4)(pointwise(stem(x), 32)), 64)),
    "MUL": lambda x: head(
        pointwise((lambda y: y * layers.GlobalAveragePooling2D(keepdims=True)(y))(pointwise(stem(x), 32)), 64)
    ),
    "SHAPE": lambda x: lone(pointwise(depthwise(stem(x)), 64)),
    "keepdims=True": lambda x: layers.Dense(5)(
        layers.GlobalAveragePooling2D(keepdims=True)(pointwise(depthwise(stem(x)), 64))
    ),
}
DOUBTFUL = {  # right today, but not covered by the rules
    "MUL": lambda x: excited(x, "hard_sigmoid"),
    "CONV_2D": joined,
    "not a global average pooling": lambda x: layers.Dense(5)(
        layers.Flatten()(keras.ops.mean(pointwise(depthwise(stem(x)), 64), axis=3))
    ),
}
