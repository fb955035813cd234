"""XNNPACK: which graphs it would rewrite whole, in part, or not at all.

The verdicts were compared with what the files compute on a CPU without AVX; where qemu is installed they are again.
"""

import keras
import numpy as np
import pytest
from tflite_models import image_model, mlp, sparsify
from xnnpack_graphs import BROKEN, DOUBTFUL, UNTOUCHED, WHOLE, excited

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.xnnpack import hazard, uses

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")

MISSING = available()


def verdict(body, batch_size=None):
    model = image_model(body, batch_size=batch_size)
    content = encode(convert(Job(model)).content).content
    flat = read(content)
    return model, content, hazard(flat), [use.operator for use in uses(flat) if use.sparse]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.thorough(2)
@pytest.mark.lengthy(1)
def test_whole_clusters_run_sparse(name):
    _, _, reason, operators = verdict(WHOLE[name], batch_size=1)
    assert reason is None and set(operators) == {"CONV_2D"} and len(operators) >= 2


@pytest.mark.slow
def test_squeeze_and_excite_of_an_open_batch(tmp_path):
    """Sparse kernels are right for the first sample of it, and for whole batches of a fixed size."""
    model, content, reason, operators = verdict(excited)
    assert "right for one sample only: MEAN" in reason and "batch_size=1" in reason and operators == []
    assert len(uses(read(content), fixed_batch=True)) >= 2
    checked = ks.tflite.check(model)
    assert checked.violations == [] and any("batch_size=1" in note for note in checked.notes)
    assert {row["runs"] for row in checked.rows if row["operator"] == "CONV_2D" and row["size"] > 500} >= {"sparse"}
    report = ks.tflite.export(model, tmp_path / "open.tflite", target="xnnpack")
    assert report.encoding == "sparse" and report.runs_sparse == [] and "batch_size=1" in report.notes[0]
    report = ks.tflite.export(model, tmp_path / "two.tflite", target="xnnpack", batch_size=2)
    assert report.encoding == "sparse" and len(report.runs_sparse) >= 2
    if MISSING["x86-no-avx"] is None:
        called, fixed = signature(model), signature(model).with_batch(2)
        random = random_batches(model, called)
        assert Reference(model, called, random[:1]).compare_on("x86-no-avx", content).relative < 1e-5
        assert Reference(model, called, random).compare_on("x86-no-avx", content).relative > 1e-4
        two = (tmp_path / "two.tflite").read_bytes()
        assert Reference(model, fixed, random[1:2]).compare_on("x86-no-avx", two).relative < 1e-5


@pytest.mark.parametrize("name", UNTOUCHED)
@pytest.mark.thorough(2)
@pytest.mark.lengthy(1)
def test_untouched_graphs_are_safe(name):
    _, _, reason, operators = verdict(UNTOUCHED[name])
    assert reason is None and operators == []


@pytest.mark.parametrize(("name", "bodies"), [*((n, BROKEN) for n in BROKEN), *((n, DOUBTFUL) for n in DOUBTFUL)])
@pytest.mark.thorough(2)
@pytest.mark.lengthy(1)
def test_partial_clusters_are_found(name, bodies):
    _, _, reason, operators = verdict(bodies[name])
    assert name in reason and "a part of the graph" in reason and operators == []


@pytest.mark.slow
@pytest.mark.skipif(MISSING["x86-no-avx"] is not None, reason="needs qemu-x86_64")
def test_what_a_cpu_without_avx_cannot_load_is_no_missing_runtime():
    model, content, _, _ = verdict(BROKEN["MUL"])
    called = signature(model)
    with pytest.raises(ValueError, match="cannot be run on the runtime 'x86-no-avx'"):
        Reference(model, called, random_batches(model, called)).compare_on("x86-no-avx", content)


@pytest.mark.parametrize("name", ["MAX_POOL_2D", "keepdims=True", "SHAPE"])
@pytest.mark.parametrize("size", [32, None], ids=["even", "open"])
@pytest.mark.thorough(2)
@pytest.mark.lengthy(1)
def test_export_does_not_hand_out_a_partial_cluster(name, size, tmp_path):
    """At even sizes the way into the cluster can be closed; at unknown ones the file is stored dense."""
    model = image_model(BROKEN[name], size)
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert name in report.notes[0] and report.runs_sparse == []
    assert (report.encoding, "stays out of XNNPACK" in report.notes[0]) == (
        ("sparse", True) if size else ("dense", False)
    )
    assert not size or report.bytes_file < 0.85 * report.bytes_dense


@pytest.mark.lengthy(0)
def test_export_of_a_whole_cluster(tmp_path):
    report = ks.tflite.export(image_model(WHOLE["mobilenet"]), tmp_path / "m.tflite", target="xnnpack")
    assert report.encoding == "sparse" and "x86 without AVX" in report.runs_sparse[0]["where"]


@pytest.mark.parametrize(("sparsity", "engages"), [(0.66, False), (0.68, True)])
@pytest.mark.lengthy(0)
def test_threshold_of_two_thirds(sparsity, engages):
    model = image_model(WHOLE["residual"])
    for weight in model.weights:
        if weight.name == "kernel" and tuple(weight.shape[:2]) == (1, 1):
            values = np.ones(weight.shape, "float32").ravel()
            values[: int(sparsity * values.size)] = 0
            weight.assign(values.reshape(weight.shape))
    flat = read(encode(convert(Job(model)).content).content)
    assert bool([use for use in uses(flat) if use.sparse]) == engages


def test_dense_layers_in_blocks():
    model = sparsify(mlp(), 0.9, blocks=True)
    flat = read(encode(convert(Job(model)).content).content)
    assert [(use.operator, use.sparse) for use in uses(flat)] == [("FULLY_CONNECTED", True)] * 2
    assert hazard(flat) is None


@pytest.mark.slow
@pytest.mark.skipif(MISSING["x86-no-avx"] is not None, reason="needs qemu-x86_64")
@pytest.mark.parametrize(
    ("bodies", "right"), [(WHOLE, True), (UNTOUCHED, True), (BROKEN, False)], ids=["whole", "untouched", "broken"]
)
def test_verdicts_on_a_cpu_without_avx(bodies, right):
    for name, body in bodies.items():
        model, content, _, _ = verdict(body, batch_size=2)
        called = signature(model)
        reference = Reference(model, called, random_batches(model, called))
        try:
            parity = reference.compare_on("x86-no-avx", content)
        except ValueError:  # it does not load
            assert not right, name
            continue
        assert (parity.relative < 1e-4) == right, name


@pytest.mark.slow
@pytest.mark.skipif(all(MISSING[name] for name in ("x86-no-avx", "wasm")), reason="needs qemu-x86_64 or LiteRT.js")
@pytest.mark.everywhere
def test_no_broken_file_with_an_open_batch_leaves_export(tmp_path):
    """Whatever the rules say, on the runtimes themselves: right numbers, and smaller than dense."""
    for name, body in {**BROKEN, **WHOLE, **DOUBTFUL}.items():
        report = ks.tflite.export(image_model(body), tmp_path / "m.tflite", target="xnnpack")
        assert report.encoding == "sparse" or "not smaller" in report.notes[0], (name, report.notes)
        if report.encoding == "sparse":
            # LiteRT.js 2.5.3 computes zeros of one, however its weights are stored.
            assert len(report.verified_on) > 1 or "from the dense file as well" in report.notes[-1], name
