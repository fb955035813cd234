"""Models and files that are compared."""

import keras
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

import keras_sparse as ks

TENSORFLOW = keras.backend.backend() == "tensorflow"
files_only = pytest.mark.skipif(not TENSORFLOW, reason="converts in this process; the slow test does on each backend")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6)).astype("float32")
LABELS = RNG.integers(0, 4, 50)


def classifier(units=4, activation="softmax", seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,), name="x"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(units, activation=activation),
        ]
    )
    return model


def pruned(model, sparsity=0.8):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    ks.prune(copy, sparsity)
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = classifier()
    model.save(folder / "dense.keras")
    if TENSORFLOW:
        ks.tflite.export(model, folder / "dense.tflite", target="xnnpack")
        ks.tflite.export(pruned(model), folder / "sparse.tflite", target="xnnpack")
    return folder


def oracle(labels, predicted, weights=None, **options):
    """scikit-learn's four numbers."""
    options = {"average": "macro", "zero_division": 0, "sample_weight": weights} | options
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(labels, predicted, **options)
    accuracy = sklearn_metrics.accuracy_score(labels, predicted, sample_weight=weights)
    return [accuracy, precision, recall, f1]


def largest(y_true, y_pred):
    return keras.ops.max(y_pred, axis=-1)


def two_headed(structure):
    inputs = {"left": keras.Input((6,), name="left"), "right": keras.Input((2,), name="right")}
    both = keras.layers.Concatenate()([inputs["left"], inputs["right"]])
    first = keras.layers.Dense(4, activation="softmax", name="kind")(both)
    second = keras.layers.Dense(1, name="amount")(both)
    outputs = {"kind": first, "amount": second} if structure == "dict" else [first, second]
    return keras.Model(inputs if structure == "dict" else list(inputs.values()), outputs)
