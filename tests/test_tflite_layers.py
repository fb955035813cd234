"""Every kind of layer in every number format: a file that is right and smaller, or dense weights and the reason."""

import os

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import image_model
from xnnpack_graphs import BROKEN, DOUBTFUL, WHOLE

import keras_sparse as ks
from keras_sparse.tflite.runtimes import available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.everywhere,
    pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way"),
]
QUANTIZE = [None, "int8", "float16", "dynamic"]
# The argument for each is at `rounding.TOLERANCE`; for one layer it is the rounding of the weights, and for int8
# that of the inputs and outputs: 1/256 of a range on either side of an output, and what the layer makes of the first.
PARITY = {None: 2e-6, "float16": 2e-3, "dynamic": 2e-2, "int8": 6e-2}
SPARSE = "x86-no-avx", "wasm"
LAYERS = {  # what it is, the shape of its input
    "Dense": (lambda: layers.Dense(96, activation="relu"), (64,)),
    "Dense on a sequence": (lambda: layers.Dense(96), (5, 64)),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cde->abde", (None, 8, 16)), (6, 64)),
    "EinsumDense of many matrices": (lambda: layers.EinsumDense("abc,bcd->abd", (6, 48)), (6, 64)),
    "Conv1D": (lambda: layers.Conv1D(64, 3), (24, 32)),
    "Conv2D": (lambda: layers.Conv2D(64, 3, 2, padding="same", activation="tanh"), (15, 16, 32)),
    "Conv2D, dilated": (lambda: layers.Conv2D(64, 3, dilation_rate=2), (16, 16, 32)),
    "Conv2D in groups": (lambda: layers.Conv2D(64, 3, groups=4), (16, 16, 32)),
    "Conv3D": (lambda: layers.Conv3D(32, 3), (6, 6, 6, 16)),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(5), (16, 16, 512)),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(64, 3), (16, 64)),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(64, 3), (16, 16, 64)),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(64, 3, 2), (24, 32)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(48, 3, 2, padding="same"), (8, 8, 32)),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(32, 3), (4, 4, 4, 16)),
    "LSTM": (lambda: layers.LSTM(48), (10, 32)),
    "GRU": (lambda: layers.GRU(48), (10, 32)),
    "MultiHeadAttention": (lambda: Attention(), (12, 64)),
}
REFUSED = {  # in int8: by a crash of TensorFlow, and because nothing of it would be computed in integers
    **dict.fromkeys(("LSTM", "GRU"), "TensorFlow crashed, as it does on calibrating recurrent layers"),
    **dict.fromkeys(("Conv3D", "Conv3DTranspose"), "found nothing in the model 'sequential' that it can compute"),
}


class Attention(layers.Layer):
    """Attention of a sequence to itself."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(4, 32)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


def pruned(layer, shape, sparsity=0.9):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), layer])
    ks.prune(model, sparsity, filters=".")
    return model


def samples(model, count=20):
    shape = [n or 32 for n in model.input_shape[1:]]
    return np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")


def found():
    """The runtimes with sparse kernels that are here."""
    return [name for name in SPARSE if available()[name] is None]


def export(model, path, quantize):
    return ks.tflite.export(
        model,
        path,
        target="xnnpack",
        quantize=quantize,
        representative_data=samples(model) if quantize == "int8" else None,
        # Every file in one format; of the others those that sparse kernels could touch, as users have it.
        verify="strict" if found() and quantize is None else "auto",
    )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.thorough(36)
def test_every_kind_of_layer(kind, quantize, tmp_path):
    build, shape = LAYERS[kind]
    model = pruned(build(), shape)
    if quantize == "int8" and kind in REFUSED:
        with pytest.raises(ks.tflite.ExportError, match=REFUSED[kind]):
            export(model, tmp_path / "m.tflite", quantize)
        assert os.listdir(tmp_path) == []
        return
    report = export(model, tmp_path / "m.tflite", quantize)
    assert report.parity_relative <= PARITY[quantize]
    assert report.bytes_file == os.path.getsize(report.path) <= report.bytes_dense
    assert report.encoding == "sparse" and "Stored dense: " not in " ".join(report.notes)
    kept = [count for count in report.zeros if count["file"] is not None]
    assert all(count["file"] >= count["model"] for count in kept)
    for row in ks.tflite.inspect(report.path).rows:
        assert row["bytes"] <= np.prod(row["shape"]) * np.dtype(row["dtype"]).itemsize


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.thorough(6)
def test_few_zeros_make_nothing_larger(kind, tmp_path):
    """Near 40 % zeros, TensorFlow's own encoding is larger than none."""
    build, shape = LAYERS[kind]
    report = ks.tflite.export(pruned(build(), shape, 0.4), tmp_path / "m.tflite", target="xnnpack", quantize="dynamic")
    assert report.bytes_file <= report.bytes_dense


FAMILIES = [(bodies, kind) for bodies in (BROKEN, WHOLE, DOUBTFUL) for kind in bodies]
# XNNPACK's sparse kernels take floats: of the families in integers, one of each verdict. In half precision they take
# the same graphs: one of each verdict, and the others when all cases are asked for.
FIRST = [(bodies, next(iter(bodies))) for bodies in (BROKEN, WHOLE, DOUBTFUL)]
FORMATS = [(*family, None) for family in FAMILIES] + [
    (*family, quantize) for quantize in ("float16", "dynamic", "int8") for family in FIRST
]
CASES = [*FORMATS, *((*family, "float16") for family in FAMILIES if family not in FIRST)]


@pytest.mark.parametrize(("bodies", "kind", "quantize"), CASES, ids=[f"{kind}-{how}" for _, kind, how in CASES])
@pytest.mark.thorough(len(FORMATS))
def test_every_family_of_graphs(bodies, kind, quantize, tmp_path):
    report = export(image_model(bodies[kind], batch_size=1), tmp_path / "m.tflite", quantize)
    assert report.bytes_file <= report.bytes_dense
    if report.encoding == "sparse" and quantize in (None, "float16"):
        # LiteRT.js 2.5.3 computes zeros of one, however its weights are stored.
        assert len(report.verified_on) > 1 or "from the dense file as well" in report.notes[-1] or not found()
    assert bool(report.runs_sparse) == (bodies is WHOLE and quantize in (None, "float16"))
