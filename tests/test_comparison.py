"""Comparisons: each number next to who else computes it - scikit-learn, Keras's evaluate, the interpreter, the file."""

import collections
import gzip
import io
import json
import sys
import time

import keras
import numpy as np
import pytest
from rich.console import Console
from sklearn import metrics as sklearn_metrics
from tflite_mutations import attempt, mutate

import keras_sparse as ks
from keras_sparse.comparison.scores import CLASSIFICATION, Scores, resolve
from keras_sparse.quiet import quiet

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


def scored(targets, outputs, weights=None, threshold=None, parts=3):
    scores = Scores(list(CLASSIFICATION), threshold)
    for part in np.array_split(np.arange(len(targets)), parts):
        scores.update(targets[part], outputs[part], None if weights is None else weights[part])
    return [scores.results()[name] for name in CLASSIFICATION]


# Scores next to scikit-learn's.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "kind", ["whole", "column", "one-hot", "missing classes", "binary", "flat", "pixels", "labels"]
)
@pytest.mark.parametrize("seed", range(3))
def test_classification_is_scikit_learns(kind, weighted, seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(3, 6)
    outputs = rng.random((60, classes))
    labels = rng.integers(0, classes, 60)
    weights = rng.random(60) if weighted else None
    if kind == "missing classes":
        labels, outputs[:, 0] = rng.integers(1, classes - 1, 60), -1
    predicted = outputs.argmax(axis=1)
    expected = oracle(labels, predicted, weights)
    targets = {"column": labels[:, None], "one-hot": np.eye(classes)[labels]}.get(kind, labels)
    if kind in ("binary", "flat"):
        targets, outputs = rng.integers(0, 2, 60), outputs[:, :1]
        expected = oracle(targets, outputs[:, 0] > 0.5, weights)
        outputs = outputs[:, 0] if kind == "flat" else outputs
    elif kind == "pixels":
        targets, outputs = labels.reshape(15, 4), outputs.reshape(15, 4, classes)
        weights = rng.random(15) if weighted else None
        expected = oracle(labels, predicted, np.repeat(weights, 4) if weighted else None)
    elif kind == "labels":
        targets = (rng.random((60, classes)) < 0.3).astype("float32")
        expected = oracle(targets, outputs > 0.5, weights)
    np.testing.assert_allclose(scored(targets, outputs, weights), expected, rtol=1e-12)


def test_whether_targets_are_one_hot_is_settled_by_all_batches():
    outputs, targets = np.array([[0.9, 0.8], [0.2, 0.7], [0.6, 0.7]]), np.array([[1, 0], [0, 1], [1, 1]])
    assert scored(targets[:2], outputs[:2], parts=2) == [1, 1, 1, 1]
    assert scored(targets, outputs, parts=3) == oracle(targets, outputs > 0.5)


def test_logits_need_a_threshold():
    logits, targets = np.array([[-1.0], [0.3], [2.0]]), np.array([0, 1, 1])
    assert scored(targets, logits, threshold=0.0) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"threshold=0.0.*outside"):
        scored(targets, logits)
    with pytest.raises(ValueError, match="outside"):
        scored(np.array([[1, 1], [0, 0]]), np.array([[0.5, 3.0], [0.1, 0.2]]))
    assert scored(np.array([[0, 1], [1, 0]]), np.array([[-5.0, 3.0], [0.1, -9.0]])) == [1, 1, 1, 1]  # argmax


def test_nan_is_wrong():
    outputs = np.array([[np.nan, 0.1], [0.9, 0.1]])
    assert scored(np.array([0, 0]), outputs)[0] == 0.5
    assert scored(np.array([1, 1]), outputs[:, :1])[0] == 0.5
    assert scored(np.array([[1, 1], [1, 0]]), outputs, parts=1)[0] == 0.5


@pytest.mark.parametrize(
    ("targets", "outputs", "message"),
    [
        (np.array([0, 4]), np.ones((2, 4)), "from 0 to 3"),
        (np.array([-1, 0]), np.ones((2, 4)), "from 0 to 3"),
        (np.array([0.5, 1.0]), np.ones((2, 4)), "regression"),
        (np.array([0, 2]), np.ones((2, 1)), "from 0 to 1"),
        (np.ones((2, 3)), np.ones((2, 4)), r"\(2, 3\).*\(2, 4\)"),
        (np.ones(3), np.ones((2, 4)), "3 targets for 2 outputs"),
        (np.array(["a", "b"]), np.ones((2, 4)), "must be numbers.*<U1"),
        (np.array([None, 1]), np.ones((2, 4)), "must be numbers.*object"),
        (np.array([np.nan, 1]), np.ones((2, 4)), "from 0 to 3"),
    ],
)
def test_targets_that_do_not_fit(targets, outputs, message):
    with pytest.raises(ValueError, match=message):
        Scores(["accuracy"]).update(targets, outputs)


def test_weights_that_do_not_fit():
    for weights, message in (
        (np.ones(3), r"\(2,\).*\(3,\)"),
        (np.array([1, -1]), "negative"),
        (np.array([1, np.nan]), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            Scores(["f1"]).update(np.array([0, 1]), np.ones((2, 4)), weights)


def test_names_of_metrics():
    loss = keras.losses.SparseCategoricalCrossentropy()
    found = resolve(["acc", "f1", "mse", "huber", "AUC", loss, keras.metrics.Precision(name="p"), _largest])
    names = [metric if isinstance(metric, str) else metric.name for metric in found]
    assert names[:5] == ["accuracy", "f1", "mean_squared_error", "huber", "auc"]
    assert names[5:] == ["sparse_categorical_crossentropy", "p", "_largest"]
    assert resolve("accuracy") == ["accuracy"]
    # Whatever was made before.
    assert [metric.name for metric in resolve(["AUC", "Precision"]) + resolve(["AUC"])] == ["auc", "precision", "auc"]
    for wrong, error, message in (
        (["nope"], ValueError, "'nope'"),
        (["loss"], ValueError, "by its own name"),
        (["mse", "mse"], ValueError, "twice.*mean_squared_error"),
        ([keras.metrics.Mean(name="bytes")], ValueError, "'bytes'"),
        ([3], TypeError, "Received: 3"),
        ([keras.metrics.AUC], TypeError, "of a class make one.*AUC"),
    ):
        with pytest.raises(error, match=message):
            resolve(wrong)


def _largest(y_true, y_pred):
    return keras.ops.max(y_pred, axis=-1)


# Keras models, on each backend.


def test_every_number_of_keras_models(folder):
    dense = classifier()
    sparse = pruned(dense)
    report = ks.compare(
        {"dense": dense, "sparse": sparse, "path": folder / "dense.keras"},
        X,
        LABELS,
        metrics=[*CLASSIFICATION, "sparse_categorical_crossentropy", keras.metrics.SparseTopKCategoricalAccuracy(2)],
        batch_size=16,
        seconds=0.01,
    )
    for row, model in zip(report.rows, (dense, sparse, dense), strict=True):
        model.compile(
            loss="sparse_categorical_crossentropy", metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
        )
        loss, accuracy, top = model.evaluate(X, LABELS, verbose=0)
        np.testing.assert_allclose(row["sparse_categorical_crossentropy"], loss, rtol=1e-5)
        np.testing.assert_allclose(row["sparse_top_k_categorical_accuracy"], top, rtol=1e-6)
        np.testing.assert_allclose(row["accuracy"], accuracy, rtol=1e-6)
        predicted = model.predict(X, verbose=0).argmax(axis=1)
        np.testing.assert_allclose([row[name] for name in CLASSIFICATION], oracle(LABELS, predicted))
        values = [keras.ops.convert_to_numpy(w) for w in model.weights]
        assert row["parameters"] == sum(v.size for v in values) == model.count_params()
        assert row["bytes"] == 4 * row["parameters"]
        assert abs(row["gzip_bytes"] / len(gzip.compress(b"".join(v.tobytes() for v in values), 6)) - 1) < 0.01
        assert row["sparsity"] == ks.report(model).totals["sparsity"]
        assert row["latency_ms"] > 0
        assert row["spread_ms"] >= 0
        assert row["form"] == "keras"
    assert report.totals == {"samples": 50}
    assert [row["model"] for row in report.rows] == ["dense", "sparse", "path"]
    first, second = report.rows[:2]
    (against, same) = report.differences.rows
    assert against["model"] == "sparse"
    for name in ("f1", "sparsity", "sparse_categorical_crossentropy"):
        assert against[f"{name}_change"] == second[name] - first[name]
    assert against["gzip_ratio"] == second["gzip_bytes"] / first["gzip_bytes"] < 0.6
    assert against["latency_ratio"] == second["latency_ms"] / first["latency_ms"]
    assert same["f1_change"] == 0


def test_forms_of_data():
    model = classifier()
    weights = np.linspace(0, 1, 50)
    parts = [(X[i : i + 20], LABELS[i : i + 20], weights[i : i + 20]) for i in (0, 20, 40)]

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return parts[index]

    wanted = ["accuracy", "f1", "sparse_categorical_crossentropy"]
    expected = ks.compare({"m": model}, X, LABELS, wanted, weights, seconds=0).rows
    model.compile(loss="sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    loss, accuracy = model.evaluate(X, LABELS, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(expected[0]["accuracy"], accuracy, rtol=1e-5)
    del loss  # Keras divides it by the number of samples, a metric by the sum of weights
    forms = [Data(), iter(parts), (part for part in parts), parts]
    if TENSORFLOW:
        import tensorflow as tf

        forms.append(tf.data.Dataset.from_tensor_slices((X, LABELS, weights)).batch(7))
    for form in forms[:3] + forms[4:]:
        (row,) = ks.compare({"m": model}, form, metrics=wanted, seconds=0).rows
        assert row["accuracy"] == pytest.approx(expected[0]["accuracy"], rel=1e-6)
        assert row["f1"] == pytest.approx(expected[0]["f1"], rel=1e-6)
        assert row[wanted[2]] == pytest.approx(expected[0][wanted[2]], rel=1e-5)


def test_sigmoid_and_one_hot():
    binary, labels = classifier(1, "sigmoid"), LABELS % 2
    (row,) = ks.compare({"m": binary}, X, labels, list(CLASSIFICATION), seconds=0).rows
    predicted = binary.predict(X, verbose=0)[:, 0] > 0.5
    np.testing.assert_allclose([row[name] for name in CLASSIFICATION], oracle(labels, predicted))
    model = classifier()
    rows = [ks.compare({"m": model}, X, y, ["f1"], seconds=0).rows for y in (LABELS, np.eye(4)[LABELS], list(LABELS))]
    assert rows[0] == rows[1] == rows[2]
    with pytest.raises(ValueError, match=r"threshold=0\.0.*of the model 'm'"):
        ks.compare({"m": classifier(1, None)}, X, labels, seconds=0)


def test_keras_metrics_have_a_state_for_each_model_and_are_reset():
    auc = keras.metrics.AUC(num_thresholds=30)
    auc.update_state([1, 0], [0.0, 1.0])  # of someone else
    models = {name: classifier(1, "sigmoid", seed) for seed, name in enumerate("abc")}
    labels = LABELS % 2
    report = ks.compare(models, X, labels, [auc, keras.metrics.F1Score(average=None, name="each")], seconds=0)
    for row, model in zip(report.rows, models.values(), strict=True):
        model.compile(loss="mse", metrics=[keras.metrics.AUC(num_thresholds=30)])
        assert row["auc"] == pytest.approx(model.evaluate(X, labels, batch_size=50, verbose=0)[1], abs=1e-6)
        assert isinstance(row["each"], list)
    assert len({row["auc"] for row in report.rows}) == 3
    assert np.all(np.concatenate([np.ravel(keras.ops.convert_to_numpy(v)) for v in auc.variables]) == 0)
    assert report.differences.rows[0]["each_change"] is None
    assert "auc" in str(report)
    assert report.plot() is not None


def two_headed(structure):
    inputs = {"left": keras.Input((6,), name="left"), "right": keras.Input((2,), name="right")}
    both = keras.layers.Concatenate()([inputs["left"], inputs["right"]])
    first = keras.layers.Dense(4, activation="softmax", name="kind")(both)
    second = keras.layers.Dense(1, name="amount")(both)
    outputs = {"kind": first, "amount": second} if structure == "dict" else [first, second]
    return keras.Model(inputs if structure == "dict" else list(inputs.values()), outputs)


@pytest.mark.parametrize("structure", ["dict", "list"])
@pytest.mark.parametrize("file", [False, pytest.param(True, marks=files_only)])
def test_several_inputs_and_outputs(structure, file, tmp_path):
    model = two_headed(structure)
    left, right, amounts = X, X[:, :2] * 2, X.sum(axis=1)
    models = {"model": model}
    if file:
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
        models["file"] = tmp_path / "m.tflite"
    x = {"left": left, "right": right} if structure == "dict" else [left, right]
    wanted = {"kind": ["accuracy"], "amount": ["mse"]}
    targets = {"kind": LABELS, "amount": amounts}
    report = ks.compare(models, x, targets, wanted, seconds=0.01)
    found = model.predict(x, verbose=0)
    kind, amount = (found["kind"], found["amount"]) if structure == "dict" else found
    for row in report.rows:
        assert list(row)[2:4] in (["kind_accuracy", "amount_mean_squared_error"], sorted(list(row)[2:4]))
        assert row["kind_accuracy"] == np.mean(kind.argmax(axis=1) == LABELS)
        assert row["amount_mean_squared_error"] == pytest.approx(np.mean((amount[:, 0] - amounts) ** 2), rel=1e-4)
    if structure == "list":
        (row, *_) = ks.compare(models, x, [LABELS, amounts], {"output_0": ["accuracy"]}, seconds=0).rows
        assert row["output_0_accuracy"] == report.rows[0]["kind_accuracy"]
    with pytest.raises(ValueError, match=r"without \['kind'\]|targets for the outputs"):
        ks.compare(models, x, {"amount": amounts}, ["mse"], seconds=0)
    with pytest.raises(ValueError, match=r"Received: metrics for \['size'\]"):
        ks.compare(models, x, targets, {"size": ["mse"]}, seconds=0)


def heads(outputs, seed):
    """A model with two regressions, by layers that are named after them."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,), name="x")
    made = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("age", "sex", "years")}
    return keras.Model(inputs, keras.tree.map_structure(made.get, outputs))


AGES, SEXES = X[:, 0] * 40, X[:, 1]


def head_errors(model, age="age"):
    """What Keras says of the two outputs, by layer."""
    inner = keras.Model(model.inputs, [model.get_layer(age).output, model.get_layer("sex").output])
    found = inner.predict(X, verbose=0)
    return [np.mean((y[:, 0] - own) ** 2) for y, own in zip(found, (AGES, SEXES), strict=True)]


def test_outputs_are_paired_by_name():
    models = {"dict": heads({"age": "age", "sex": "sex"}, 0), "list": heads(["sex", "age"], 1)}
    for names in (["dict", "list"], ["list", "dict"]):
        report = ks.compare({n: models[n] for n in names}, X, {"age": AGES, "sex": SEXES}, ["mse"], seconds=0)
        for row in report.rows:
            found = [row["age_mean_squared_error"], row["sex_mean_squared_error"]]
            assert found == pytest.approx(head_errors(models[row["model"]]), rel=1e-5)


@pytest.mark.parametrize("other", [{"years": "years", "sex": "sex"}, ["years", "sex"], {"age": "age"}])
def test_outputs_that_cannot_be_paired(other):
    models = {"a": heads({"age": "age", "sex": "sex"}, 0), "b": heads(other, 1)}
    with pytest.raises(ValueError, match="must have the same outputs.*of 'a'.*of 'b'"):
        ks.compare(models, X, {"age": AGES, "sex": SEXES}, ["mse"], seconds=0)


@files_only
@pytest.mark.parametrize("names", [["output_1", "output_2", "output_10"], ["a-b", "a0"], collections.OrderedDict])
@pytest.mark.thorough(1)
def test_the_order_of_models_changes_no_number(names, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="x")
    if names is collections.OrderedDict:
        outputs = names((name, keras.layers.Dense(1)(inputs)) for name in ("b", "a"))
    else:
        outputs = {name: keras.layers.Dense(1)(inputs) for name in names}
    model = keras.Model(inputs, outputs)
    ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    models = {"m": model, "f": tmp_path / "m.tflite"}
    targets = [X[:, i] for i in range(len(outputs))]
    found = keras.tree.flatten(model.predict(X, verbose=0))  # in the order in which Keras has the outputs
    wanted = [np.mean((y[:, 0] - own) ** 2) for y, own in zip(found, targets, strict=True)]
    for order in (["m", "f"], ["f", "m"]):
        report = ks.compare({n: models[n] for n in order}, X, targets, ["mse"], seconds=0)
        for row in report.rows:
            assert list(row.values())[2 : 2 + len(wanted)] == pytest.approx(wanted, rel=1e-5)


def test_without_metrics():
    report = ks.compare({"dense": classifier(), "sparse": pruned(classifier())}, X, metrics=[], seconds=0)
    assert list(report.rows[0])[:3] == ["model", "form", "sparsity"]
    assert report.rows[0]["latency_ms"] is None
    assert [patch.get_width() for patch in report.plot().axes[0].patches] == [0, report.rows[1]["sparsity"]]


def test_forms_of_the_report(tmp_path):
    models = {"<dense>": classifier(), "sparse": pruned(classifier())}
    report = ks.compare(models, X, LABELS, ["accuracy", "f1"], seconds=0)
    assert isinstance(report, ks.reports.Report)
    text = str(report)
    assert "Against <dense>" in text
    assert f"{100 * report.differences.rows[0]['f1_change']:+.2f} points" in text
    data = json.loads(report.to_json())
    assert data["differences"] == report.differences.rows
    page = ks.reports.html_page("Comparison", report)
    assert "&lt;dense&gt;" in page
    assert "Against" in page
    assert report._repr_html_() == report.to_html()
    figure = report.plot()
    left, right = figure.axes
    np.testing.assert_allclose(
        [points.get_offsets()[0] for points in left.collections],
        [[row["sparsity"], row["accuracy"]] for row in report.rows],
    )
    assert right.collections[0].get_offsets()[0][0] == pytest.approx(report.rows[0]["gzip_bytes"] / 1e3)
    figure.savefig(tmp_path / "plot.png")
    single = ks.compare({"one": classifier()}, X, LABELS, seconds=0)
    assert "Against" not in str(single) + single.to_html()


@pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow's log")
def test_several_models_are_no_reason_to_warn(caplog):
    models = {str(seed): classifier(seed=seed) for seed in range(7)}
    with caplog.at_level("WARNING", "tensorflow"):
        ks.compare(models, X, LABELS, seconds=0)
    assert caplog.records == []


def test_models_are_left_alone():
    model = classifier()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(X, LABELS, verbose=0)
    weights, optimizer = model.get_weights(), model.optimizer
    ks.compare({"m": model}, X, LABELS, seconds=0.01)
    for value, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, before)
    assert model.optimizer is optimizer
    model.fit(X, LABELS, verbose=0)
    assert any(np.any(value != before) for value, before in zip(model.get_weights(), weights, strict=True))


def test_half_precision():
    inputs = keras.Input((6,))
    outputs = keras.layers.Dense(4, activation="softmax", dtype="mixed_bfloat16")(inputs)
    model = keras.Model(inputs, outputs)
    (row,) = ks.compare({"m": model}, X, LABELS, seconds=0).rows
    predicted = keras.ops.convert_to_numpy(keras.ops.cast(model(X), "float32")).argmax(axis=1)
    assert row["accuracy"] == np.mean(predicted == LABELS)


# Wrong input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": {}}, ValueError, "at least one model"),
        ({"models": [1]}, TypeError, "must be a dict.*list"),
        ({"models": {"m": 3}}, TypeError, "Received.*int"),
        ({"models": {"m": "no.tflite"}}, FileNotFoundError, "no.tflite.*'m'"),
        ({"models": {"m": "no.keras"}}, FileNotFoundError, "no.keras"),
        ({"models": {"m": keras.Sequential([keras.layers.Dense(3)])}}, ValueError, "not built"),
        ({"metrics": ["nope"]}, ValueError, "nope"),
        ({"y": None}, ValueError, "`y` is needed"),
        ({"y": LABELS[:9]}, ValueError, r"\[9, 50\]"),
        ({"y": LABELS + 1}, ValueError, "from 0 to 3.*of the model 'm'"),
        ({"y": X}, ValueError, r"\(32, 6\).*\(32, 4\)"),
        ({"y": X, "metrics": ["mse"]}, ValueError, "'mean_squared_error'.*of the model 'm'"),
        ({"sample_weight": np.ones(3)}, ValueError, "`sample_weight`"),
        ({"x": X[:, :3]}, ValueError, r"'m' cannot be run.*\(32, 3\)"),
        ({"x": (X, LABELS)}, ValueError, "inputs only"),
        ({"x": X[:0], "y": LABELS[:0]}, ValueError, "no data"),
        ({"x": iter([(X, LABELS)])}, ValueError, "itself"),
        ({"x": iter([X]), "y": None}, ValueError, "`y` is needed"),
        ({"x": 3}, TypeError, "Received: 3"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"seconds": -1}, ValueError, "seconds=-1"),
        ({"timeout": float("nan")}, ValueError, "timeout=nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input(change, error, message):
    arguments = {"models": {"m": classifier()}, "x": X, "y": LABELS, "seconds": 0} | change
    with pytest.raises(error, match=message):
        ks.compare(**arguments)


def test_plot_says_what_is_not_installed(monkeypatch):
    report = ks.compare({"m": classifier()}, X, LABELS, seconds=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()


# Files.


@files_only
def test_every_number_of_files(folder):
    models = {"model": classifier(), "dense": folder / "dense.tflite", "sparse": str(folder / "sparse.tflite")}
    wanted = [*CLASSIFICATION, "sparse_categorical_crossentropy"]
    report = ks.compare(models, X.astype("float64"), LABELS, wanted, seconds=0.02)
    for row, model in zip(report.rows[1:], (classifier(), pruned(classifier())), strict=True):
        path = folder / f"{row['model']}.tflite"
        (same,) = ks.compare({"m": model}, X, LABELS, wanted, seconds=0).rows
        assert [row[name] for name in wanted] == pytest.approx([same[name] for name in wanted], abs=1e-5)
        assert row["sparsity"] == same["sparsity"]
        assert row["bytes"] == path.stat().st_size
        assert abs(row["gzip_bytes"] / len(gzip.compress(path.read_bytes(), 6)) - 1) < 0.01
        assert row["form"] == "tflite"
    # Biases that are all zero are not stored.
    assert report.rows[1]["parameters"] == 6 * 64 + 64 * 4 == report.rows[0]["parameters"] - 64 - 4
    assert [row["latency_ratio"] for row in report.differences.rows] == [None, None]
    assert any("one thread" in note for note in report.notes)
    only = ks.compare({k: models[k] for k in ("dense", "sparse")}, X, LABELS, seconds=0.02)
    assert only.differences.rows[0]["latency_ratio"] > 0
    assert only.notes == []


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """An int8 file with int8 inputs and outputs, as TensorFlow's own converter makes it, with a fixed batch of 2."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("int8")
    model = classifier()
    inputs = keras.Input(batch_shape=(2, 6), name="x")
    with quiet():
        keras.Model(inputs, model(inputs)).export(folder / "saved", verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "saved"))
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([X[i : i + 2]] for i in range(0, 50, 2))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        content = converter.convert()
    (folder / "int8.tflite").write_bytes(content)
    return folder / "int8.tflite"


@files_only
def test_quantised_inputs_and_outputs(quantised):
    from ai_edge_litert.interpreter import Interpreter

    x, labels = X[:49], LABELS[:49]  # the last batch of the file is filled up
    (row,) = ks.compare({"int8": quantised}, x, labels, ["accuracy", "f1", _largest], seconds=0.01).rows
    with quiet():
        runner = Interpreter(str(quantised)).get_signature_runner()
        ((scale, zero),) = [d["quantization"] for d in runner.get_input_details().values()]
        (detail,) = runner.get_output_details().values()
        outputs = []
        for i in range(0, 50, 2):
            # half away from zero, as TFLite's own QUANTIZE
            scaled = X[i : i + 2].astype("float64") / scale
            stored = np.clip(np.sign(scaled) * np.floor(np.abs(scaled) + 0.5) + zero, -128, 127).astype("int8")
            (found,) = runner(x=stored).values()
            outputs.append((found.astype("float64") - detail["quantization"][1]) * detail["quantization"][0])
    outputs = np.concatenate(outputs)[:49]
    expected = oracle(labels, outputs.argmax(axis=1))
    assert [row["accuracy"], row["f1"]] == pytest.approx([expected[0], expected[3]])
    assert row["_largest"] == pytest.approx(outputs.max(axis=1).mean(), rel=1e-6)
    assert 0 < row["_largest"] <= 1
    (dense,) = ks.compare({"m": classifier()}, x, labels, [_largest], seconds=0).rows
    assert row["_largest"] == pytest.approx(dense["_largest"], abs=0.05)


@files_only
def test_files_that_do_not_fit(folder, tmp_path):
    sparse = folder / "sparse.tflite"
    (tmp_path / "text.tflite").write_text("this is no model")
    for models, x, message in (
        ({"a": sparse}, X[:, :3], r"\(any, 6\).*Received: an array of shape \(32, 3\)"),
        ({"a": sparse}, {"other": X}, r"inputs \['x'\].*\['other'\]"),
        ({"a": sparse}, [X, X], r"inputs \['x'\].*list"),
        ({"a": tmp_path / "text.tflite"}, X, "Expected a .tflite file"),
        ({"a": tmp_path}, X, "this is a folder"),
        ({"a": classifier(), "b": two_headed("list")}, {"x": X}, "cannot be run|same outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            ks.compare(models, x, LABELS, seconds=0)
    (row,) = ks.compare({"a": sparse}, {"x": X}, LABELS, seconds=0).rows
    assert 0 <= row["accuracy"] <= 1


def test_nan_is_noted():
    model = classifier()
    model.layers[-1].bias.assign(np.full(4, 1e38, "float32"))
    model.layers[-1].kernel.assign(np.full((64, 4), 1e38, "float32"))
    report = ks.compare({"m": model}, X, LABELS, seconds=0)
    assert report.rows[0]["accuracy"] == 0
    assert "m: 200 outputs are NaN" in report.notes[0]


@files_only
def test_file_that_takes_too_long(folder):
    with pytest.raises(TimeoutError, match="longer than 0.001 seconds"):
        ks.compare({"a": folder / "sparse.tflite"}, X, LABELS, timeout=0.001)


def check_mutations(folder, seeds, tmp_path):
    content, outcomes = (folder / "sparse.tflite").read_bytes(), []
    path = tmp_path / "mutated.tflite"
    for seed in seeds:
        path.write_bytes(mutate(content, seed))
        outcomes.append(attempt(_compare, path))
    assert outcomes.count("answer") > 0
    assert len(set(outcomes)) > 1


def _compare(path):
    report = ks.compare({"m": path}, X[:8], LABELS[:8], ["f1"], seconds=0.001, timeout=20)
    assert 0 <= report.rows[0]["f1"] <= 1
    assert str(report)


@files_only
def test_mutated_files(folder, tmp_path):
    check_mutations(folder, range(20), tmp_path)


@files_only
@pytest.mark.slow
def test_more_mutated_files(folder, tmp_path):
    check_mutations(folder, range(20, 200), tmp_path)


@pytest.mark.slow
def test_file_next_to_its_model_on_each_backend(tmp_path):
    model = classifier()
    ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    report = ks.compare({"m": model, "f": tmp_path / "m.tflite"}, X, LABELS, ["accuracy"], seconds=0.01)
    assert report.rows[0]["accuracy"] == report.rows[1]["accuracy"]


def test_progress_bar_appears_if_it_takes_long():
    def slow(y, outputs):
        time.sleep(2.1)
        return 0.0

    for metric, shown in (("accuracy", False), (slow, True)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True)
        ks.compare({"m": classifier(), "again": classifier()}, X, LABELS, [metric], seconds=0, console=console)
        assert ("compare" in file.getvalue()) == shown


def test_function_is_an_attribute_whatever_was_imported_first():
    assert ks.compare is ks.comparison.compare
    assert callable(ks.compare)
