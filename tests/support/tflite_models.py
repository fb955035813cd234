"""Models for the tests of the TFLite stage, made sparse by plain NumPy."""

import functools
import os
import pathlib
import pickle
import tempfile

import keras
import numpy as np
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.job import Job


def sparsify(model, sparsity, blocks=False):
    """Set the smallest weights of each kernel to zero, one by one or in blocks of one output by four inputs."""
    for weight in model.weights:
        if weight.name in ("kernel", "recurrent_kernel") and len(weight.shape) >= 2:
            values = keras.ops.convert_to_numpy(weight).astype("float32")
            if blocks and values.ndim == 2 and values.shape[0] % 4 == 0:
                grouped = values.reshape(-1, 4, values.shape[1])
                norms = np.linalg.norm(grouped, axis=1, keepdims=True)
                values = (grouped * (norms > np.quantile(norms, sparsity))).reshape(values.shape)
            else:
                values = values * (np.abs(values) > np.quantile(np.abs(values), sparsity))
            weight.assign(values)
    return model


def mlp():
    inputs = keras.Input((64,), name="pixels")
    x = layers.Dense(96, activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(64, activation="softmax")(x))


def cnn():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.SeparableConv2D(32, 3),
            layers.Conv2D(16, 3, strides=2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )


def transposed():
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, layers.Conv2DTranspose(16, 3, strides=2)(layers.Conv2D(16, 3)(inputs)))


def conv3d():
    inputs = keras.Input((6, 6, 6, 4))
    return keras.Model(inputs, layers.Conv3DTranspose(12, 2)(layers.Conv3D(8, 3)(inputs)))


def conv1d():
    inputs = keras.Input((24, 4))
    x = layers.Conv1D(32, 5, activation="gelu")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)))


def lstm():
    inputs = keras.Input((10, 8))
    return keras.Model(inputs, layers.Dense(3)(layers.Bidirectional(layers.LSTM(24))(inputs)))


def gru():
    inputs = keras.Input((10, 8))
    return keras.Model(inputs, layers.TimeDistributed(layers.Dense(3))(layers.GRU(24, return_sequences=True)(inputs)))


def attention():
    tokens = keras.Input((12,), dtype="int32", name="tokens")
    x = layers.Embedding(37, 16)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 16)(x, x))
    return keras.Model(tokens, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def token_floats():
    return keras.Sequential([keras.Input((12,)), layers.Embedding(11, 16), layers.Flatten(), layers.Dense(32)])


def several():
    """A dict of two inputs, a dict of two outputs."""
    image, age = keras.Input((8, 8, 1), name="image"), keras.Input((1,), name="age")
    x = layers.concatenate([layers.Flatten()(layers.Conv2D(8, 3)(image)), age])
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model({"image": image, "age": age}, {"label": layers.Dense(4)(x), "score": layers.Dense(1)(x)})


def nested():
    """A nested structure of inputs, a list of outputs, a model within the model, a layer used twice."""
    a, b, c = (keras.Input((16,), name=name) for name in "abc")
    shared = layers.Dense(32, activation="tanh")
    inner = keras.Sequential([keras.Input((32,)), layers.Dense(48), layers.Dense(32)])
    x = shared(a) + shared(b)
    return keras.Model([a, (b, {"c": c})], [inner(x), x * layers.Dense(32)(c)])


@keras.saving.register_keras_serializable("tflite_tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(48, activation="relu")
        self.head = layers.Dense(4)

    def call(self, inputs):
        return self.head(self.hidden(inputs))


@keras.saving.register_keras_serializable("tflite_tests")
class DictOfInputs(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(19, 8)
        self.head = layers.Dense(48)

    def call(self, inputs):
        return {"out": self.head(self.embedding(inputs["tokens"])) + inputs["offset"]}


@keras.saving.register_keras_serializable("tflite_tests")
class TwoArguments(DictOfInputs):
    def build(self, tokens_shape, offset_shape):
        self.embedding.build(tokens_shape)
        self.head.build((*tokens_shape, 8))

    def call(self, tokens, offset, training=None):
        return [super().call({"tokens": tokens, "offset": offset})["out"], offset]


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 32), "float32"))
    return model


def dict_of_inputs():
    model = DictOfInputs()
    model({"tokens": np.zeros((2, 6), "int32"), "offset": np.zeros((2, 1, 48), "float32")})
    return model


def two_arguments():
    model = TwoArguments()
    model(np.zeros((2, 6), "int32"), np.zeros((2, 1, 48), "float32"))
    return model


def stem(inputs, same=False):
    """The entry of XNNPACK's sparse cluster: 3x3, stride 2, padding 1, 3 channels."""
    if same:
        return layers.Conv2D(16, 3, 2, padding="same", activation="relu")(inputs)
    return layers.Conv2D(16, 3, 2, activation="relu")(layers.ZeroPadding2D(1)(inputs))


def image_model(body, size=32, batch_size=None):
    """A model of images of that size whose 1x1 convolutions are 90 % zeros; `body` maps the input to the output."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, 3), batch_size=batch_size)
    model = keras.Model(inputs, body(inputs))
    for weight in model.weights:
        if weight.name == "kernel" and tuple(weight.shape[:2]) == (1, 1):
            values = keras.ops.convert_to_numpy(weight)
            weight.assign(values * (np.abs(values) > np.quantile(np.abs(values), 0.9)))
    return model


def qualifying():
    """An image model whose convolutions XNNPACK runs sparse where it has no AVX."""

    def body(inputs):
        x = stem(inputs)
        for filters in (32, 64):
            x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
            x = layers.Conv2D(filters, 1, activation="relu")(x)
        return layers.Dense(5)(layers.GlobalAveragePooling2D()(x))

    return image_model(body)


def made_once(name, make):
    """What `make()` returns, from the folder that all processes of a run share."""
    path = pathlib.Path(os.environ["KERAS_SPARSE_MADE_BY_TESTS"]) / name
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            pickle.dump(make(), file)
        os.replace(file.name, path)
    return pickle.loads(path.read_bytes())


@functools.cache
def exported(build, sparse=True):
    """The bytes of a model's file at 90 % zeros, made once for all tests."""

    def make():
        keras.utils.set_random_seed(0)
        model = build() if build is qualifying else sparsify(build(), 0.9, blocks=build is mlp)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.tflite"
            ks.tflite.export(model, path, target="xnnpack", sparse=sparse)
            return path.read_bytes()

    return made_once(f"{build.__name__} {sparse}", make)


@functools.cache
def encodings():
    """Dense and sparse encodings of models at 90 % zeros: `encodings()[kind, blocks, quantize][encoding]`."""

    def make():
        keras.utils.set_random_seed(0)
        made = {}
        for build, blocks, quantize in [
            (mlp, False, None), (mlp, True, None), (cnn, False, None), (lstm, False, None),
            (mlp, True, "float16"), (cnn, False, "float16"),
        ]:  # fmt: skip
            model = sparsify(build(), 0.9, blocks)
            dense = convert(Job(model, quantize=quantize)).content
            made[build.__name__, blocks, quantize] = {"dense": dense, "sparse": encode(dense).content}
        return made

    return made_once("encodings", make)


MODELS = {
    function.__name__: function
    for function in (
        mlp, cnn, conv1d, lstm, gru, attention, token_floats, several, nested, subclassed, dict_of_inputs, two_arguments
    )
}  # fmt: skip
