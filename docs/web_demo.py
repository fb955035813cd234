"""Write what docs/web/speed.html shows first: `python docs/web_demo.py`.

A small MobileNet-like network that reads scikit-learn's handwritten digits, whose 1x1 convolutions are 90 % zeros, once
with dense and once with sparse-encoded weights; and a sample of digits that it was not trained on.
"""

import json
import pathlib

import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_sparse as ks

FOLDER = pathlib.Path(__file__).parent / "web"
LARGEST = 16  # of a pixel
SAMPLE = 100  # digits


def network():
    """A network that keeps the rules of XNNPACK's sparse kernels: explicit padding wherever the stride is 2."""
    inputs = keras.Input((8, 8, 1), batch_size=1, name="image")
    x = layers.UpSampling2D(8)(inputs)
    x = layers.Conv2D(16, 3, 2, activation="relu")(layers.ZeroPadding2D(1)(layers.Concatenate()([x, x, x])))
    for number, (filters, stride) in enumerate(((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1))):
        if stride == 2:
            x = layers.DepthwiseConv2D(3, 2, use_bias=False)(layers.ZeroPadding2D(1)(x))
        else:
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = layers.Conv2D(filters, 1, use_bias=False, name=f"pointwise_{number}")(layers.BatchNormalization()(x))
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)), name="demo")


def main():
    """Train, write the three files, and print what the sparse one holds."""
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    trained = network()
    model = keras.models.clone_model(trained, input_tensors=keras.Input((8, 8, 1)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, x_test = ((value / LARGEST).reshape(-1, 8, 8, 1).astype("float32") for value in (x, x_test))
    files, begun = {}, None
    # Both go on from the same network for as long.
    for name, callbacks in (("begun", []), ("dense", []), ("sparse", [ks.callbacks.Pruning(0.9, filters="pointwise")])):
        if begun:
            model.set_weights(begun)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
        model.fit(x, y, batch_size=32, epochs=15, verbose=0, callbacks=callbacks)
        begun = begun or model.get_weights()
        if name != "begun":
            print(name, model.evaluate(x_test, y_test, verbose=0, return_dict=True))
            trained.set_weights(model.get_weights())
            files[name] = ks.tflite.export(trained, FOLDER / f"demo_{name}.tflite", target="xnnpack-wasm")
    print(files["sparse"])
    pixels = (x_test[:SAMPLE].reshape(-1, 64) * LARGEST).astype(int).tolist()
    sample = {
        "of": "digits",
        "shape": [8, 8, 1],
        "largest": LARGEST,
        "images": pixels,
        "labels": y_test[:SAMPLE].tolist(),
    }
    (FOLDER / "demo_sample.json").write_text(json.dumps(sample, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
