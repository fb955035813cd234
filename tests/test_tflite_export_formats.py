"""Exports in integers and half precision, of fixed batch sizes, on data as the model meets them."""

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from exported_files import clean, tensorflow_only
from keras import layers
from tflite_models import attention, cnn, lstm, mlp, several, sparsify, transposed

import keras_sparse as ks
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.runtimes import Worker
from keras_sparse.tflite.signatures import signature


def blocks_of_16():
    """Dense layers whose zeros stand in blocks of one output by 16 inputs."""
    inputs = keras.Input((128,))
    model = keras.Model(inputs, layers.Dense(64)(layers.Dense(96, activation="relu")(inputs)))
    ks.prune(model, 0.97, pattern="block_1x16")
    return model


@tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("build", [cnn, mlp, several, transposed, attention, blocks_of_16])
def test_int8(build, tmp_path):
    keras.utils.set_random_seed(1)
    model = sparsify(build(), 0.9) if build is not blocks_of_16 else build()
    called = signature(model)
    batches = [batch for i in range(8) for batch in random_batches(model, called, i)]
    arrays = {leaf.name: np.concatenate([b[j] for b in batches]) for j, leaf in enumerate(called.inputs)}
    report = ks.tflite.export(
        model, tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=arrays
    )
    assert report.parity_relative < 0.25 and report.bytes_file <= report.bytes_dense
    kept = [count for count in report.zeros if count["file"] is not None]
    assert kept and all(count["file"] >= count["model"] for count in kept)
    assert {row["dtype"] for row in report.rows} <= {"int8", "float32"}
    assert report.encoding == ("dense" if build is attention else "sparse")
    assert bool(report.runs_sparse) == (build is blocks_of_16)
    with Worker(report.path) as worker:
        assert {leaf["dtype"] for leaf in worker.inputs} <= {"float32", "int32"} and not worker.scales


@pytest.mark.slow
@tensorflow_only
@pytest.mark.parametrize("inference_type", ["int8", "uint8"])
def test_integers_in_and_out(inference_type, tmp_path):
    keras.utils.set_random_seed(1)
    model = sparsify(mlp(), 0.9)
    data = np.random.default_rng(0).normal(size=(20, 64))
    emulated = ks.tflite.runtimes.available()["x86-no-avx"] is None
    report = ks.tflite.export(
        model,
        tmp_path / "m.tflite",
        target="xnnpack",
        quantize="int8",
        representative_data=data,
        verify="strict" if emulated else "auto",
        inference_type=inference_type,
    )
    assert report.parity_relative < 0.2 and len(report.verified_on) == 1 + emulated  # LiteRT.js takes no such inputs
    with Worker(report.path) as worker:
        assert [leaf["dtype"] for leaf in worker.inputs] == [inference_type]
        scales, points = zip(*(worker.scales[name] for name in ("pixels", "output_0")), strict=True)
        limits = np.iinfo(inference_type)
        stored = np.clip(np.round(data[:1] / scales[0]) + points[0], limits.min, limits.max)
        worker.feed({"pixels": stored})
        output = worker.run()["output_0"]
    assert output.dtype == inference_type
    expected = keras.ops.convert_to_numpy(model(data[:1].astype("float32")))
    np.testing.assert_allclose(scales[1] * (output.astype(float) - points[1]), expected, atol=0.2 * expected.max())


def filters():
    """A network from sound to sound."""
    inputs = keras.Input((64, 1), name="wave")
    x = layers.Conv1D(32, 5, padding="same", activation="relu")(inputs)
    return keras.Model(inputs, layers.Conv1D(1, 5, padding="same")(layers.Conv1D(32, 5, padding="same")(x)))


@tensorflow_only
@pytest.mark.parametrize(("build", "encoding"), [(filters, "sparse"), (mlp, "dense")])
@pytest.mark.parametrize("inference_type", [None, pytest.param("int16", marks=pytest.mark.slow)])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_integers_of_16_bits(build, encoding, inference_type, tmp_path):
    """Activations of 16 bits leave the rounding of the weights; Dense layers do not read restored weights there."""
    keras.utils.set_random_seed(1)
    model = sparsify(build(), 0.9)
    data = np.random.default_rng(0).normal(size=(20, *model.inputs[0].shape[1:]))
    options = {"quantize": "int16x8", "representative_data": data, "inference_type": inference_type}
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", **options)
    assert report.encoding == encoding and report.parity_relative < 0.03
    assert {row["dtype"] for row in report.rows} == {"int8"}
    assert (report.bytes_file < 0.8 * report.bytes_dense) == (encoding == "sparse")
    with Worker(report.path) as worker:
        assert {leaf["dtype"] for leaf in worker.inputs} == {inference_type or "float32"}


@tensorflow_only
def test_integers_of_16_bits_need_data(tmp_path):
    with pytest.raises(ValueError, match="quantize='int16x8' needs `representative_data`"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int16x8")


@pytest.mark.parametrize(
    ("inference_type", "quantize"), [("int16", "int8"), ("int8", None), ("uint8", "dynamic"), ("int8", "int16x8")]
)
def test_bad_inference_types(inference_type, quantize, tmp_path):
    data = np.ones((2, 64))
    with pytest.raises(
        ValueError, match=r"`inference_type` must be None, or 'int8' or 'uint8' with.*or 'int16' with.*Received: infer"
    ):
        ks.tflite.export(
            mlp(),
            tmp_path / "m.tflite",
            target="xnnpack",
            quantize=quantize,
            representative_data=data,
            inference_type=inference_type,
        )


@tensorflow_only
@pytest.mark.slow
def test_a_crash_of_the_converter_is_an_error(tmp_path):
    with pytest.raises(
        ks.tflite.ExportError, match=r"TensorFlow crashed.*use quantize='dynamic'.*exit status -\d+ \(signal \d+\)$"
    ):
        ks.tflite.export(
            lstm(),
            tmp_path / "m.tflite",
            target="xnnpack",
            quantize="int8",
            representative_data=np.eye(80).reshape(80, 10, 8),
        )
    assert clean(tmp_path)


@tensorflow_only
@pytest.mark.parametrize(("size", "quantize"), [(1, None), (5, None), (200, None), (5, "int8")])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_representative_data_and_a_fixed_batch(size, quantize, tmp_path):
    inputs = keras.Input((4, 4, 2), batch_size=size, name="x")
    # A shape that names the batch size: the file cannot be run with another one.
    outputs = keras.ops.reshape(layers.Conv2D(2, 1)(layers.GlobalAveragePooling2D(keepdims=True)(inputs)), (size, 2))
    model = keras.Model(inputs, outputs)
    data = np.random.default_rng(0).normal(size=(max(size, 33), 4, 4, 2))
    if size > 1:
        with pytest.raises(ValueError, match=f"at least one batch of the model's fixed size of {size}"):
            ks.tflite.export(
                model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize, representative_data=data[: size - 1]
            )
    report = ks.tflite.export(
        model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize, representative_data=data
    )
    assert report.parity_relative < (0.1 if quantize else 1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_data_in_which_nothing_varies(value, tmp_path):
    with pytest.raises(ValueError, match=f"inputs as the model will meet them.*Received: nothing but {value:g}"):
        ks.tflite.export(
            mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=np.full((9, 64), value)
        )


@tensorflow_only
@pytest.mark.slow
def test_int8_that_is_none(tmp_path):
    inputs = keras.Input((4, 4, 4, 2))
    model = keras.Model(inputs, layers.Conv3D(2, 3)(inputs))
    data = np.random.default_rng(0).normal(size=(4, 4, 4, 4, 2))
    with pytest.raises(ks.tflite.ExportError, match="nothing in the model.*use quantize='float16'"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=data)
    assert clean(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("quantize", [None, "dynamic"])
def test_weights_that_are_not_finite(value, quantize, tmp_path):
    model = mlp()
    model.layers[-1].kernel.assign(np.full(model.layers[-1].kernel.shape, value))
    with pytest.raises(ValueError, match=f"training diverged(.|\n)*{model.layers[-1].kernel.path}"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize)
    assert clean(tmp_path)


@tensorflow_only
def test_double_precision(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="float64")])
    with pytest.raises(ValueError, match="TFLite does not in float64.*Received: float64 in .*/kernel"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
@pytest.mark.lengthy(0)
def test_a_constant_that_is_not_finite(tmp_path):
    inputs = keras.Input((64,))
    scaled = inputs * np.where(np.arange(64) == 3, np.inf, 1.0).astype("float32")  # the converter folds it in
    with pytest.raises(ks.tflite.ExportError, match="multiplies with a constant that is NaN or infinite"):
        ks.tflite.export(
            keras.Model(inputs, layers.Dense(64)(scaled)), tmp_path / "m.tflite", target="xnnpack", quantize="dynamic"
        )
    assert clean(tmp_path)


@tensorflow_only
@pytest.mark.parametrize(("quantize", "within"), [(None, 1e-5), ("int8", 0.1)])
def test_an_output_that_is_one_number(quantize, within, tmp_path):
    inputs = keras.Input((4,))
    model, x = keras.Model(inputs, keras.ops.sum(layers.Dense(4)(inputs))), np.random.default_rng(0).normal(size=(9, 4))
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", quantize=quantize, representative_data=x)
    assert report.parity_relative < within


@tensorflow_only
def test_a_stateful_layer_begins_anew_and_is_left_as_it_was(tmp_path):
    """The file goes on from run to run as the model does, from its initial state, and not from where a fit ended."""
    inputs = keras.Input((5, 4), batch_size=1, name="x")
    memory = layers.GRU(3, stateful=True, bias_initializer="random_normal")
    model = keras.Model(inputs, layers.Dense(2)(memory(inputs)))
    x = np.random.default_rng(0).normal(size=(4, 1, 5, 4)).astype("float32")
    right = [np.array(model(one)) for one in x]
    before = np.array(memory.states[0])
    report = ks.tflite.export(model, tmp_path / "m.tflite", representative_data=x[:, 0])
    np.testing.assert_array_equal(memory.states[0], before)
    assert np.abs(before).max() > 0.01 and "load it anew" in " ".join(report.notes)
    runner = Interpreter(str(tmp_path / "m.tflite")).get_signature_runner()
    for one, expected in zip(x, right, strict=True):
        np.testing.assert_allclose(runner(x=one)["output_0"], expected, rtol=1e-4, atol=1e-5)
    assert ks.tflite.verify(str(tmp_path / "m.tflite"), model).right
    np.testing.assert_array_equal(memory.states[0], before)
