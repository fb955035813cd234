"""Write the two files that docs/web/speed.html shows first: `python docs/web_demo.py`.

A small MobileNet-like network of random weights, whose 1x1 convolutions are 90 % zeros, once with dense and once with
sparse-encoded weights.
"""

import pathlib

import keras
from keras import layers

import keras_sparse as ks

FOLDER = pathlib.Path(__file__).parent / "web"


def network():
    """A network that keeps the rules of XNNPACK's sparse kernels: explicit padding wherever the stride is 2."""
    inputs = keras.Input((96, 96, 3), batch_size=1, name="image")
    x = layers.Conv2D(16, 3, 2, activation="relu")(layers.ZeroPadding2D(1)(inputs))
    for number, (filters, stride) in enumerate(((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1))):
        # Nine of ten inputs of a pointwise convolution will be gone: larger weights keep the signal from fading.
        pointwise = {"activation": "relu", "kernel_initializer": keras.initializers.VarianceScaling(20.0)}
        depthwise = {"activation": "relu", "depthwise_initializer": "he_normal"}
        if stride == 2:
            x = layers.DepthwiseConv2D(3, 2, **depthwise)(layers.ZeroPadding2D(1)(x))
        else:
            x = layers.DepthwiseConv2D(3, padding="same", **depthwise)(x)
        x = layers.Conv2D(filters, 1, **pointwise, name=f"pointwise_{number}")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)), name="demo")


def main():
    """Write both files, and print what the sparse one holds."""
    keras.utils.set_random_seed(0)
    model = network()
    ks.prune(model, 0.9, filters="pointwise")
    print(ks.tflite.export(model, FOLDER / "demo_sparse.tflite", target="xnnpack"))
    ks.tflite.export(model, FOLDER / "demo_dense.tflite", sparse=False)


if __name__ == "__main__":
    main()
