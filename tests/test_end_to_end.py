"""The whole path on real data: train with the callback, save, export, run the file, compare."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import keras_sparse as ks


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images / 16).astype("float32")[order, ..., None], data.target[order]


@pytest.fixture(scope="module")
def trained(digits):
    """A CNN that was pruned to 90 % while it learned the digits."""
    keras.utils.set_random_seed(0)
    x, y = digits
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(
        x[:1300], y[:1300], batch_size=64, epochs=12, verbose=0, callbacks=[ks.callbacks.Pruning(0.9, end=0.5)]
    )
    return model, history.history


@pytest.fixture(scope="module")
def exported(trained, digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("end_to_end") / "model.tflite"
    return ks.tflite.export(trained[0], path, target="xnnpack", representative_data=digits[0][1300:1400])


def kernels(model):
    return [variable for variable in model.trainable_variables if variable.name == "kernel"]


def test_training_reaches_the_target_and_still_learns(trained, digits):
    model, history = trained
    assert isinstance(model.optimizer, keras.optimizers.Adam)  # nothing of ours is left in the model
    for kernel in kernels(model):
        assert np.sum(kernel.numpy() == 0) == round(0.9 * kernel.numpy().size)
    zeros, size = (sum(f(kernel.numpy()) for kernel in kernels(model)) for f in (lambda w: np.sum(w == 0), np.size))
    assert history["sparsity"] == sorted(history["sparsity"])
    assert history["sparsity"][-1] == zeros / size
    # Measured over seeds: 96 to 98 %.
    assert model.evaluate(digits[0][1300:], digits[1][1300:], verbose=0)[1] > 0.93


def test_report_tells_what_is_in_the_model(trained):
    report = ks.report(trained[0])
    for row in report.rows:
        expected = "pruned" if row["path"].endswith("/kernel") else "skipped"
        assert (row["path"], row["status"]) == (row["path"], expected)
    assert report.totals["zeros"] == sum(int(np.sum(kernel.numpy() == 0)) for kernel in kernels(trained[0]))


def test_file_computes_what_the_model_computes(trained, exported, digits):
    from ai_edge_litert.interpreter import Interpreter

    x, y = digits[0][1300:], digits[1][1300:]
    interpreter = Interpreter(model_path=str(exported.path))
    (given,) = interpreter.get_input_details()
    (returned,) = interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    outputs, expected = interpreter.get_tensor(returned["index"]), trained[0].predict(x, verbose=0)
    # Both compute in float32 (unit roundoff 6e-8) and differ by the order of their sums, by the exp of the softmax, and
    # by folding the batch normalization into a kernel. Sums of 1024 terms in random order err by 6e-8 * sqrt(1024) =
    # 2e-6 of their magnitude. Logits are below 50, so they err by less than 1e-4, and the softmax passes on at most a
    # quarter of that: 2.5e-5. A wrong weight or layout would cost 0.1 and more.
    np.testing.assert_allclose(outputs, expected, atol=2.5e-5, rtol=0)
    np.testing.assert_array_equal(outputs.argmax(-1), expected.argmax(-1))
    assert np.mean(outputs.argmax(-1) == y) > 0.93


def test_file_is_smaller_and_keeps_the_zeros(trained, exported):
    assert exported.encoding == "sparse"
    assert exported.bytes_file == os.path.getsize(exported.path)
    assert exported.bytes_dense > 4 * exported.bytes_file
    assert exported.bytes_gzip <= exported.bytes_gzip_dense  # zeros zip well in either encoding
    for count, kernel in zip(exported.zeros, kernels(trained[0]), strict=True):
        assert count["file"] == count["model"] == np.sum(kernel.numpy() == 0)
    tensors = {row["zeros"]: row for row in ks.tflite.inspect(exported.path).rows}
    for kernel in kernels(trained[0]):
        row = tensors[int(np.sum(kernel.numpy() == 0))]
        assert np.prod(row["shape"]) == kernel.numpy().size
        assert row["encoding"].startswith("sparse")


@pytest.mark.lengthy(0)
def test_saved_model_needs_no_keras_sparse(trained, digits, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", digits[0][:16])
    code = (
        "import sys\n"
        "sys.modules['keras_sparse'] = None\n"  # every import of it raises
        "import keras, numpy as np\n"
        "model = keras.saving.load_model('model.keras')\n"
        "model.fit(np.load('x.npy'), np.zeros(16), verbose=0)\n"  # as it was compiled, optimizer and all
        "model = keras.saving.load_model('model.keras')\n"
        "np.save('y.npy', model.predict(np.load('x.npy'), verbose=0))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # The same program on the same weights, on another shape of batch at most: float32 rounding.
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(digits[0][:16], verbose=0), atol=1e-5)


def test_a_second_fit_keeps_the_zeros(trained, digits):
    model = keras.models.clone_model(trained[0])
    model.set_weights(trained[0].get_weights())
    model.compile("adam", "sparse_categorical_crossentropy")
    before = [kernel.numpy() == 0 for kernel in kernels(model)]
    model.fit(digits[0][:256], digits[1][:256], verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    for zeros, kernel in zip(before, kernels(model), strict=True):
        np.testing.assert_array_equal(kernel.numpy() == 0, zeros)
