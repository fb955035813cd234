"""Comparisons: each number next to who else computes it - scikit-learn, Keras's evaluate."""

import collections
import gzip

import keras
import numpy as np
import pytest
from compared_models import LABELS, TENSORFLOW, X, classifier, files_only, largest, oracle, pruned, two_headed

import keras_sparse as ks
from keras_sparse.comparison.scores import CLASSIFICATION, Scores, resolve


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
    found = resolve(["acc", "f1", "mse", "huber", "AUC", loss, keras.metrics.Precision(name="p"), largest])
    names = [metric if isinstance(metric, str) else metric.name for metric in found]
    assert names[:5] == ["accuracy", "f1", "mean_squared_error", "huber", "auc"]
    assert names[5:] == ["sparse_categorical_crossentropy", "p", "largest"]
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


# Keras models, on each backend.


@pytest.mark.lengthy(0)
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
    assert ks.compare({"m": model}, data=(X, LABELS, weights), metrics=wanted, seconds=0).rows == expected
    for given in ({}, {"x": X, "data": X}):
        with pytest.raises(TypeError, match="`x` or `data` must hold .* Received: "):
            ks.compare({"m": model}, **given, metrics=[], seconds=0)
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


@pytest.mark.parametrize("structure", ["dict", "list"])
@pytest.mark.parametrize("file", [False, pytest.param(True, marks=files_only)])
@pytest.mark.lengthy(1)
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
