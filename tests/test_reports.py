"""Reports: the numbers, and the forms they take."""

import io
import json

import keras
import numpy as np
import pytest
from rich.console import Console

import keras_sparse as ks
from keras_sparse.reports import Report


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    )
    kernel = np.ones((4, 5), "float32")
    kernel[:, 1] = 0
    kernel[0, 2:] = 0
    model.layers[0].kernel.assign(kernel)
    return model


def test_rows_and_totals_are_counted_by_hand(model):
    report = ks.report(model)
    row = report.rows[0]
    assert row == {
        "path": model.layers[0].kernel.path,
        "shape": [4, 5],
        "size": 20,
        "zeros": 7,
        "sparsity": 0.35,
        "pattern": "unstructured",
        "dead_units": 1,
        "dead_inputs": 0,
        "status": "pruned",
        "reason": "",
    }
    assert [r["status"] for r in report.rows[1:]] == ["skipped"] * 3 + ["dense"] + ["skipped"] * 3
    assert report.totals["size"] == 30 and report.totals["zeros"] == 7
    assert report.totals["sparsity"] == pytest.approx(7 / 30)
    assert report.totals["density"] == pytest.approx(23 / 30)
    assert report.totals["parameters"] == model.count_params()
    assert report.totals["nonzero_parameters"] == sum(int(np.count_nonzero(w)) for w in model.get_weights())


@pytest.mark.parametrize("pattern", ["channel", "block_2x2", "2:4", "unstructured"])
def test_pattern_of_every_kind_of_kernel(pattern):
    inputs = keras.Input((9, 8))
    x = keras.layers.MultiHeadAttention(4, 8)(inputs, inputs)
    x = keras.layers.Conv1D(24, 3)(keras.layers.GRU(16, return_sequences=True)(x))
    x = keras.layers.Reshape((7, 1, 24))(x)
    x = keras.layers.Conv2DTranspose(16, (3, 1))(keras.layers.DepthwiseConv2D((4, 1), depth_multiplier=2)(x))
    model = keras.Model(inputs, keras.layers.Dense(16)(x))
    before = {row["path"]: row["pattern"] for row in ks.report(model).rows}
    report = ks.prune(model, None if pattern == "2:4" else 0.5, pattern=pattern, filters="kernel")
    assert set(before.values()) == {""}
    assert {row["pattern"] for row in report.rows if row["status"] == "pruned"} == {pattern}
    assert {row["pattern"] for row in report.rows if row["status"] != "pruned"} == {""}
    # The units of GRU and attention cannot be silenced one by one.
    assert sum(row["status"] == "pruned" for row in report.rows) == (4 if pattern == "channel" else 10)
    assert pattern in str(report)


def test_says_why_weights_were_skipped(model):
    reasons = {row["path"].split("/")[-1]: row["reason"] for row in ks.report(model).rows}
    assert reasons["gamma"] == "gamma of BatchNormalization: not a kernel"
    assert reasons["bias"] == "bias of Dense: not a kernel"


def test_all_zero_weights_count_as_zero_initialised(model):
    model.layers[2].kernel.assign(np.zeros((5, 2)))
    row = ks.report(model).rows[4]
    assert (row["status"], row["dead_units"], row["dead_inputs"]) == ("dense", 2, 5)
    assert "zero-initialised" in row["reason"]


def test_a_zero_by_chance_is_no_pruning():
    # Uniform initializers draw an exact 0.0 about once in eight million float32 numbers: NASNetMobile has some.
    model = keras.Sequential([keras.Input((8, 8, 40)), keras.layers.DepthwiseConv2D(3), keras.layers.Conv2D(9, 1)])
    kernel = np.ones((3, 3, 40, 1), "float32")
    kernel[1, 1, 7] = 0
    model.layers[0].kernel.assign(kernel)
    row = ks.report(model).rows[0]
    assert (row["zeros"], row["status"], row["pattern"]) == (1, "skipped", "")
    assert "depthwise" in row["reason"]
    assert ks.prune(model, 0.001, filters=".").rows[0]["status"] == "pruned"


def test_forms(model):
    report = ks.report(model)
    assert json.loads(report.to_json()) == report.to_dict()
    assert set(report.to_dict()) == {"title", "rows", "totals", "notes"}
    text = str(report)
    assert "35.0%" in text and "4x5" in text and "connection" not in text.splitlines()[0]
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    assert "35.0%" in console.file.getvalue()
    html = report.to_html()
    assert html.count("<tr>") >= 9 and "35.0%" in html
    assert report._repr_html_() == html


def test_html_is_escaped():
    report = Report("<script>", [{"path": "<b>", "sparsity": 0.5}], {"a": "<i>"}, ["<u>"])
    html = report.to_html()
    assert not any(tag in html for tag in ("<script>", "<b>", "<i>", "<u>"))
    assert "&lt;script&gt;" in html


def test_text_is_not_read_as_markup():
    assert "[red]dense[/red]" in str(Report("t", [{"path": "[red]dense[/red]"}], {}))


def test_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    figure = ks.report(model).plot()
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert bars == [row["sparsity"] for row in ks.report(model).rows]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        Report("empty", [], {}).plot()


def test_empty_report_prints():
    assert str(Report("nothing", [], {})) == "nothing"


def test_masked_weights_are_pruned_weights_while_training(model):
    model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    report = ks.update_masks(model, 0.0, filters="a/")
    assert report.rows[0]["status"] == "pruned"
    assert report.rows[4]["reason"] == "not matched by `filters`"
