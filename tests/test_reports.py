"""Reports: the numbers, and the forms they take."""

import io
import json
import re

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
    # Channels of heads that have left are blocks in the projection that reads them.
    reads_heads = {row["path"] for row in report.rows if "attention_output" in row["path"] and pattern == "channel"}
    pruned = {row["path"]: row["pattern"] for row in report.rows if row["status"] == "pruned"}
    assert {found for path, found in pruned.items() if path not in reads_heads} == {pattern}
    assert {pruned[path].split("_")[0] for path in reads_heads & pruned.keys()} <= {"block"}
    assert {row["pattern"] for row in report.rows if row["status"] != "pruned"} == {""}
    assert len(pruned) == 10
    assert pattern in str(report)


def test_says_why_weights_were_skipped(model):
    reasons = {row["path"].split("/")[-1]: row["reason"] for row in ks.report(model).rows}
    assert reasons["gamma"] == "gamma of BatchNormalization: not a kernel"
    assert reasons["bias"] == "bias of Dense: not a kernel"


def test_all_zero_weights_count_as_zero_initialised(model):
    model.layers[2].kernel.assign(np.zeros((5, 2)))
    model.layers[2].kernel_initializer = keras.initializers.Zeros()
    report = ks.report(model)
    row = report.rows[4]
    assert (row["status"], row["dead_units"], row["dead_inputs"]) == ("dense", 2, 5)
    assert "zero-initialised" in row["reason"]
    assert report.notes == []


def test_zeros_of_an_initializer_do_not_make_a_weight_pruned():
    model = keras.Sequential([keras.Input((5, 8)), keras.layers.SimpleRNN(8, recurrent_initializer="identity")])
    row = ks.report(model).rows[1]
    assert (row["zeros"], row["status"], row["pattern"]) == (56, "dense", "")
    assert row["reason"] == "zeros of its initializer, not of pruning"
    assert ks.prune(model, 0.5).rows[1]["status"] == "pruned"


# Kernels that lost their last weight


def small_middle():
    """A model whose middle kernel leaves first when all are ranked together."""
    model = keras.Sequential(
        [
            keras.Input((20,)),
            keras.layers.Dense(20, name="a"),
            keras.layers.Dense(20, name="b", kernel_initializer=keras.initializers.RandomNormal(stddev=1e-4)),
            keras.layers.Dense(4, name="c", use_bias=False),
        ]
    )
    model.compile("sgd", "mse")
    return model


def test_emptied_kernels_are_named_by_prune_and_report(tmp_path):
    model = small_middle()
    with pytest.warns(UserWarning, match="b/kernel has no weight left: all 400 are zero, .* only its bias") as caught:
        report = ks.prune(model, 0.7, allocation="global")
    assert [w.filename for w in caught if "no weight left" in str(w.message)] == [__file__]
    model.save(tmp_path / "model.keras")
    for found in (report, ks.report(model), ks.report(keras.saving.load_model(tmp_path / "model.keras"))):
        [note] = found.notes
        for word in ("b/kernel", 'allocation="erk"', "ks.pruning.Global(floor=1)", "`filters`"):
            assert word in note
        assert [row["status"] for row in found.rows if row["path"].endswith("kernel")] == ["pruned"] * 3
    report = ks.prune(model, 0.8, allocation="global")  # Said once, and still in the notes.
    assert "b/kernel" in report.notes[0]
    assert ks.prune(small_middle(), 0.7, allocation=ks.pruning.Global(floor=1)).notes == []


def test_a_zero_initialised_kernel_is_not_emptied_by_pruning_half_of_it():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, kernel_initializer="zeros")])
    report = ks.prune(model, 0.5)
    assert (report.rows[0]["zeros"], report.notes) == (36, [])
    assert ks.selection.pruned_weights(model)[0].pruned_zeros().sum() == 18


def test_what_passes_an_emptied_kernel():
    inputs = keras.Input((3, 4))
    x = keras.layers.GRU(4, name="gru")(keras.layers.Dense(4, use_bias=False, name="plain")(inputs))
    model = keras.Model(inputs, x)
    weights = [w for w in ks.selection.weights(model) if w.kernel]
    sentences = ks.reports.emptied(weights, [np.zeros(w.variable.shape, bool) for w in weights])
    assert "only zeros" in sentences[0] and "only its bias" in sentences[1] and "earlier steps" in sentences[2]
    assert ks.reports.emptied(weights) == []


# LoRA

LORA = {
    "Dense": (lambda: keras.layers.Dense(8), (8,)),
    "EinsumDense": (lambda: keras.layers.EinsumDense("abc,cd->abd", (3, 8)), (3, 8)),
    "Conv2D": (lambda: keras.layers.Conv2D(8, 3), (5, 5, 4)),
    "Embedding": (lambda: keras.layers.Embedding(9, 8), (3,)),
}


@pytest.mark.parametrize("name", LORA)
def test_lora_is_counted_in_the_kernel_in_use(name, tmp_path):
    make, shape = LORA[name]
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    zeros = ks.prune(model, 0.75, filters=layer).totals["zeros"]
    layer.enable_lora(2)
    report = ks.report(model)
    assert report.totals["zeros"] == zeros and "as soon as it is trained" in report.notes[0]
    kind = "embeddings" if name == "Embedding" else "kernel"
    b = getattr(layer, f"lora_{kind}_b")
    update = np.ones(b.shape, "float32")
    update[..., :2] = 0  # The last axis of the kernel is untouched there.
    b.assign(update)
    report = ks.report(model)
    in_use = keras.ops.convert_to_numpy(getattr(layer, kind))
    assert report.totals["zeros"] == (in_use == 0).sum() < zeros
    assert "LoRA's update fills" in report.notes[0]
    model.save(tmp_path / "model.keras")
    loaded = ks.report(keras.saving.load_model(tmp_path / "model.keras"))
    same = ("zeros", "dead_units", "dead_inputs", "pattern")
    row, after = (next(r for r in found.rows if r["path"].endswith(kind)) for found in (report, loaded))
    assert [row[key] for key in same] == [after[key] for key in same]


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


LONG = "net/" + "block/" * 30 + "kernel"


def wide(rows=60, notes=()):
    """A report as of a real network, with names as the converter makes them."""
    rows = [{"tensor": f"{LONG}_{i}", "size": 10**9, "reason": "because of " * 20, "empty": ""} for i in range(rows)]
    return Report("Wide", rows, {f"total_{i}": 10**9 for i in range(30)}, notes, {"size": ",d"})


def test_a_report_fits_a_terminal_of_120_columns():
    report = wide(notes=["a sentence " * 100])
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == "Wide" and lines[1].startswith("total 0")  # What sums it up comes first.
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("tensor")) + 2 :]
    assert len(table) == len(report.rows)
    assert all(re.match(rf"….*block/kernel_{i}  +1,000,000,000  because of", line) for i, line in enumerate(table))
    assert "empty" not in str(report)
    full = str(report.full())
    assert f"{LONG}_59" in full and "because of " * 19 in full and "a sentence " * 50 in full and "empty" in full


def test_what_the_short_form_leaves_out_is_in_the_full_one():
    rows = [{"name": name, "size": size, "note": "why"} for name, size in (("a", 3), ("b", 0))]
    report = Report("Chosen", rows, {}, columns={"name": lambda row: row["name"] * 2}, shown=lambda row: row["size"])
    below = Report("Below", rows, {}, columns=["note"])
    report.below = [below]
    text = str(report)
    assert "aa" in text and "bb" not in text and "why" in text.partition("Below")[2]
    assert "1 row and 2 columns more" in text and "2 columns more" in text.partition("Below")[2]
    assert "more" not in str(report.full()) and str(report.full()).count("size") == 2
    assert report.to_dict()["rows"] == rows
    html = report.to_html()
    assert html.count("<details>") == 2 and html.index("aa") < html.index("<details>") < html.index("why")
    assert "<details>" not in report.full().to_html()


def test_report_of_a_model_has_a_line_for_each_kernel(model):
    text = str(ks.report(model))
    assert "gamma" not in text and len(re.findall(r"^\S*kernel", text, re.M)) == 2
    assert "6 rows and" in text and "gamma of BatchNormalization: not a kernel" in str(ks.report(model).full())


def test_html_is_escaped():
    report = Report("<script>", [{"path": "<b>", "sparsity": 0.5}], {"a": "<i>"}, ["<u>"])
    html = report.to_html()
    assert not any(tag in html for tag in ("<script>", "<b>", "<i>", "<u>"))
    assert "&lt;script&gt;" in html


def test_totals_without_a_text_are_left_out():
    """As `not_verified` of a file that was verified for all of its targets: the report ended in "not verified"."""
    report = Report("made", [], {"verified_on": ["native"], "not_verified": [], "parity": None, "zeros": 0})
    assert str(report).splitlines()[1] == "verified on native, zeros 0"
    assert "not verified" not in report.to_html() and "parity" not in report.to_html()


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
