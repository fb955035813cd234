"""Reports of comparisons, of models and of files, and input that is wrong."""

import gzip
import io
import json
import sys
import time

import keras
import numpy as np
import pytest
from compared_models import LABELS, TENSORFLOW, X, classifier, files_only, largest, oracle, pruned, two_headed
from rich.console import Console
from tflite_mutations import attempt, mutate

import keras_sparse as ks
from keras_sparse.comparison.scores import CLASSIFICATION
from keras_sparse.quiet import quiet


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
        ({"x": (X, LABELS)}, ValueError, "itself"),
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
    (row,) = ks.compare({"int8": quantised}, x, labels, ["accuracy", "f1", largest], seconds=0.01).rows
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
    assert row["largest"] == pytest.approx(outputs.max(axis=1).mean(), rel=1e-6)
    assert 0 < row["largest"] <= 1
    (dense,) = ks.compare({"m": classifier()}, x, labels, [largest], seconds=0).rows
    assert row["largest"] == pytest.approx(dense["largest"], abs=0.05)


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


@pytest.mark.lengthy(0)
def test_progress_bar_appears_if_it_takes_long():
    asked = []

    def slow(y, outputs):
        if not asked:
            time.sleep(2.1)
        asked.append(len(y))
        return 0.0

    for metric, shown in (("accuracy", False), (slow, True)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True)
        ks.compare({"m": classifier(), "again": classifier()}, X, LABELS, [metric], seconds=0, console=console)
        assert ("compare" in file.getvalue()) == shown


def test_function_is_an_attribute_whatever_was_imported_first():
    assert ks.compare is ks.comparison.compare
    assert callable(ks.compare)


def test_files_of_other_kinds(tmp_path):
    """What Keras says of an HDF5 file under a .keras name is that there is no such file."""
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "old.keras").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "text.keras").write_text("no model")
    for name, said in (
        (
            "m.h5",
            "Load a file of Keras 2 with `keras.saving.load_model` and pass the model. Received: .* for the model",
        ),
        ("old.keras", "which is a zip archive. Received: .*old.keras', an HDF5 file of Keras 2: name it .h5"),
        ("text.keras", "which is a zip archive. Received: .*text.keras', damaged or another file"),
    ):
        with pytest.raises(ValueError, match=said):
            ks.compare({"m": tmp_path / name}, np.ones((2, 4)), metrics=[], seconds=0)
