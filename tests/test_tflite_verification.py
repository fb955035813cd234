"""Verification: where files are compared, and what is said when that is not possible."""

import keras
import numpy as np
import pytest
from tflite_models import image_model, mlp, sparsify
from xnnpack_graphs import BROKEN, WHOLE

import keras_sparse as ks
from keras_sparse.tflite import verification
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature

pytestmark = [
    pytest.mark.everywhere,
    pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way"),
]


@pytest.fixture(params=["x86-no-avx", "wasm"])
def runtime(request):
    if available()[request.param] is not None:
        pytest.skip(available()[request.param])
    return request.param


def reference_of(model, make=Reference):
    called = signature(model)
    return convert(Job(model, called)).content, make(model, called, random_batches(model, called))


def test_strict_needs_a_runtime(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for name in ("PATH", "KERAS_SPARSE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path / "empty")
    assert verification.sparse_runtimes() == []
    with pytest.raises(ks.tflite.runtimes.RuntimeMissing, match="one is enough. .*Node.js"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", verify="strict")
    with pytest.raises(ValueError, match="'auto' or 'strict'"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.thorough(2)
@pytest.mark.lengthy(0)
def test_strict_verification(sparse, runtime, tmp_path):
    report = ks.tflite.export(
        sparsify(mlp(), 0.9), tmp_path / "m.tflite", target="xnnpack", sparse=sparse, verify="strict"
    )
    assert verification.SPARSE_RUNTIMES[runtime] in report.verified_on[1:]


@pytest.mark.slow
def test_the_rules_are_not_needed(runtime):
    """A fault that no rule knows shows itself on a runtime with sparse kernels."""
    for name in ("MAX_POOL_2D", "keepdims=True"):
        dense, reference = reference_of(image_model(BROKEN[name], batch_size=1))
        check = verification.Verification(dense, reference, 1e-4, runtimes=[runtime], rules=())
        fault, _ = check.fault(encode(dense).content)
        assert verification.SPARSE_RUNTIMES[runtime] in fault, name
        assert check.fault(encode(dense, engage=False).content)[0] is None


def test_a_dense_file_that_cannot_be_run_is_an_error():
    dense, reference = reference_of(mlp())
    check = verification.Verification(dense[: len(dense) // 2], reference, 1e-4)
    with pytest.raises(ks.tflite.ExportError, match="with dense weights either. Received: ."):
        check.dense()


@pytest.mark.lengthy(0)
def test_other_weights_are_a_fault():
    dense, reference = reference_of(sparsify(mlp(), 0.9))
    other = convert(Job(sparsify(mlp(), 0.9))).content
    assert verification.Verification(dense, reference, 1e-4).fault(encode(other).content) == (
        "a decoded weight is not the dense file's",
        None,
    )


@pytest.mark.lengthy(0)
def test_a_wrong_file_is_a_fault():
    """The weights are right, and the reference is another model's."""
    first = sparsify(mlp(), 0.9)
    dense, _ = reference_of(first)
    for weight in first.weights:
        weight.assign(np.ones(weight.shape))
    _, reference = reference_of(first)
    check = verification.Verification(dense, reference, 1e-4)
    assert "differs from the model's" in check.fault(encode(dense).content)[0]
    assert check.dense()[0] is False


@pytest.mark.lengthy(0)
def test_runtimes_are_asked_about_what_sparse_kernels_could_touch(runtime):
    for body, asked in ((WHOLE["mobilenet"], True), (lambda x: keras.layers.Conv2D(64, 3)(x), False)):
        dense, reference = reference_of(sparsify(image_model(body), 0.9))
        check = verification.Verification(dense, reference, 1e-4, runtimes=[runtime])
        assert check.fault(encode(dense).content)[0] is None and (len(check.verified_on) == 2) == asked


class Refused(Reference):
    """As a runtime without one of the operators has it."""

    def compare_on(self, name, content):
        raise ValueError("no such operator")


@pytest.mark.lengthy(1)
def test_a_runtime_that_cannot_run_the_dense_file_either(runtime):
    dense, reference = reference_of(image_model(WHOLE["mobilenet"]), Refused)
    check = verification.Verification(dense, reference, 1e-4, runtimes=[runtime])
    assert check.fault(encode(dense).content)[0] is None
    assert (
        len(check.verified_on) == 1 and "from the dense file as well, the file cannot be run (no such" in check.notes[0]
    )


@pytest.mark.skipif(available()["wasm"] is not None, reason=str(available()["wasm"]))
@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.lengthy(0)
def test_what_browsers_do_with_an_open_batch_is_said(batch_size, tmp_path):
    model = image_model(WHOLE["mobilenet"])
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack", batch_size=batch_size)
    assert verification.SPARSE_RUNTIMES["wasm"] in report.verified_on
    said = [note for note in report.notes if "batch size is open: LiteRT.js" in note and "batch_size=1" in note]
    assert len(said) == (batch_size is None)


def test_a_test_suite_may_stay_on_this_machine(monkeypatch):
    monkeypatch.setenv("KERAS_SPARSE_VERIFY", "native")
    assert verification.sparse_runtimes() == []
    monkeypatch.delenv("KERAS_SPARSE_VERIFY")
    assert verification.sparse_runtimes() == [
        name for name in verification.SPARSE_RUNTIMES if available()[name] is None
    ]
