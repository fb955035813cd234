"""The check before training: what it says is what files do."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import attention, cnn, conv1d, image_model, lstm, mlp, nested, several, stem, subclassed
from xnnpack_graphs import BROKEN, DOUBTFUL, UNTOUCHED, WHOLE

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.runtimes import available, run
from keras_sparse.tflite.signatures import signature

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def pruned(model, report):
    ks.prune(model, report.target_sparsity)
    return model


@pytest.mark.parametrize(
    "build",
    [mlp, cnn, subclassed, *(pytest.param(one, marks=pytest.mark.slow) for one in (conv1d, lstm, attention, nested))],
)
@pytest.mark.lengthy(1)
def test_what_it_predicts_is_what_export_writes(build, tmp_path):
    keras.utils.set_random_seed(0)
    model = build()
    before = model.get_weights()
    report = ks.tflite.check(model)
    for value, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, other)
    assert report.pattern == "block_1x4" and bool(report.violations) == (build is cnn)
    assert set(report.filters) == set(report.target_sparsity)
    exported = ks.tflite.export(pruned(model, report), tmp_path / "m.tflite", target="xnnpack")
    assert exported.bytes_dense == report.bytes_dense
    assert exported.bytes_file == pytest.approx(report.bytes_sparse, rel=0.03)
    sparse = [row for row in report.rows if row["runs"] == "sparse"]
    assert len(exported.runs_sparse) == len(sparse) >= len(report.target_sparsity) > 0


def test_dense_layers_run_sparse_only_if_the_network_gains(tmp_path):
    model = several()  # its large Dense layer has 289 inputs
    report = ks.tflite.check(model)
    assert report.pattern is None and report.target_sparsity == {}
    assert any("out of XNNPACK" in note and "4 divides" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_networks_that_fit(name, tmp_path):
    model = image_model(WHOLE[name])
    report = ks.tflite.check(model)
    assert report.violations == [] and report.pattern == "unstructured" and report.totals["runs_sparse"] > 0.5
    convolutions = [row for row in report.rows if row["operator"] == "CONV_2D" and row["shape"][1:3] == [1, 1]]
    assert all(row["runs"] == "sparse" and row["from_sparsity"] == 2 / 3 for row in convolutions)
    exported = ks.tflite.export(pruned(model, report), tmp_path / "m.tflite", target="xnnpack", batch_size=1)
    assert len([use for use in exported.runs_sparse if use["operator"] == "CONV_2D"]) == len(convolutions)


NAMES = {  # of the layer that stands in the way
    "MAX_POOL_2D": "max_pooling2d", "AVERAGE_POOL_2D": "average_pooling2d", "DEPTHWISE_CONV_2D": "depthwise_conv2d",
    "CONV_2D": "conv2d", "CONV_2D (operator": "conv", "MUL": "global_average_pooling2d", "PRELU": "p_re_lu",
    "SHAPE": "flatten", "keepdims=True": "global_average_pooling2d",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_networks_that_fit_in_part(name):
    report = ks.tflite.check(image_model(BROKEN[name]))
    assert any(one["layer"].startswith(NAMES[name]) and one["mend"] for one in report.violations), report.violations
    assert not any(row["runs"] == "sparse" and row["operator"] == "CONV_2D" for row in report.rows)
    assert any("keeps the file out" in note for note in report.notes)
    if name in ("DEPTHWISE_CONV_2D", "SHAPE", "keepdims=True"):
        assert any("ks.tflite.adapt" in one["mend"] for one in report.violations)
        adapted, _ = ks.tflite.adapt(image_model(BROKEN[name]))
        assert ks.tflite.check(adapted).violations == []


@pytest.mark.parametrize("name", UNTOUCHED)
@pytest.mark.thorough(2)
def test_networks_that_do_not_fit(name):
    report = ks.tflite.check(image_model(UNTOUCHED[name]))
    assert report.violations and not any(r["runs"] == "sparse" and r["operator"] == "CONV_2D" for r in report.rows)


@pytest.mark.parametrize(
    ("target", "sparse"), [("xnnpack-x86", True), ("builtin", True), ("gpu", False), ("micro", False)]
)
@pytest.mark.lengthy(1)
def test_other_targets(target, sparse):
    report = ks.tflite.check(mlp(), target)
    assert bool(report.target_sparsity) == sparse and report.totals["target"] == target
    assert sparse or (
        "Nothing would run sparse" in report.notes[-1] and report.pattern is None and report.filters == []
    )
    # What takes no weights that are stored without zeros gets none.
    assert (report.bytes_sparse < report.bytes_dense) == sparse
    assert ("dense" in {row["runs"] for row in report.rows}) != sparse


@pytest.mark.parametrize("target", ["gpu", "xnnpack-wasm"])
def test_open_sizes_where_sizes_are_fixed(target):
    """Such a file loads there, at images of one pixel."""
    inputs = keras.Input((None, None, 3), name="image")
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(inputs))))
    report = ks.tflite.check(model, target)
    assert report.verdict == "refused" and any("fixed sizes" in n and "'image'" in n for n in report.notes)


@pytest.mark.slow
def test_training_for_it(tmp_path):
    model = image_model(WHOLE["mobilenet"])
    report = ks.tflite.check(model)
    model.compile("adam", "mse")
    x, y = np.random.default_rng(0).normal(size=(32, 32, 32, 3)), np.ones((32, 5))
    model.fit(
        x, y, verbose=0, callbacks=[ks.callbacks.Pruning(0.9, filters=report.filters, pattern=report.pattern, end=1)]
    )
    assert ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack").runs_sparse
    model = mlp()
    report = ks.tflite.check(model, "xnnpack-x86")
    model.compile("adam", "mse")
    x = np.ones((32, 64))
    model.fit(x, x, verbose=0, callbacks=[ks.callbacks.Pruning(report.target_sparsity, end=1)])
    assert len(ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack").runs_sparse) == 2


def test_bad_arguments():
    for sparsity in (0, 1, 1.5, "0.9", True):
        with pytest.raises(ValueError, match="between 0 and 1. Received"):
            ks.tflite.check(mlp(), sparsity=sparsity)
    with pytest.raises(TypeError, match="Received"):
        ks.tflite.check(mlp)


def engages(model, runtime):
    """Whether the runtime computes other bits from the sparse file than from the dense one."""
    called = signature(model)
    dense = convert(Job(model, called)).content
    leaf = called.inputs[0]
    x = {leaf.name: np.random.default_rng(0).normal(size=[1, *leaf.shape[1:]]).astype("float32")}
    first, second = (run(content, x, runtime) for content in (dense, encode(dense, hazardless(model)).content))
    return any((first[name] != second[name]).any() for name in first)


def hazardless(model):
    """As `export` decides: out of sparse kernels' way if they would compute wrong numbers."""
    return not any("keeps the file out" in note for note in ks.tflite.check(model).notes)


@pytest.mark.slow
@pytest.mark.skipif(available()["x86-no-avx"] is not None, reason=str(available()["x86-no-avx"]))
@pytest.mark.parametrize(
    "name", [name for row in itertools.zip_longest(WHOLE, BROKEN, UNTOUCHED, DOUBTFUL) for name in row if name]
)
@pytest.mark.thorough(8)
def test_it_agrees_with_a_runtime(name):
    model = image_model({**WHOLE, **UNTOUCHED, **DOUBTFUL, **BROKEN}[name], batch_size=1)
    says = any(row["runs"] == "sparse" and row["operator"] == "CONV_2D" for row in ks.tflite.check(model).rows)
    assert engages(model, "x86-no-avx") == says


def normalized(matrix):
    """Rows of length 1, up to the sign: what is left of a kernel when a normalization is folded into it."""
    norms = np.linalg.norm(matrix.astype("float64"), axis=1, keepdims=True)
    return np.abs(matrix / np.where(norms == 0, 1, norms))


def bidirectional():
    """Two directions, and kernels and recurrent kernels of one size."""
    inputs = keras.Input((6, 24))
    return keras.Model(inputs, layers.Dense(96)(layers.Bidirectional(layers.LSTM(24))(inputs)))


def folded():
    """Convolutions of one size with normalizations, one of them of negative scale."""
    model = image_model(WHOLE["residual"])
    for weight in model.weights:
        if weight.name == "gamma":
            weight.assign(np.linspace(-2, 2, weight.shape[0]))
    return model


def reversed_names():
    """Names that the converter's own numbering could be taken for."""
    inputs = keras.Input((64,))
    x = layers.Dense(64, name="dense_1", activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(64, name="dense_2")(layers.Dense(64, name="dense")(x)))


@pytest.mark.parametrize(
    "build",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in (bidirectional, lstm)),
        folded,
        reversed_names,
        nested,
        mlp,
    ],
)
@pytest.mark.thorough(2)
def test_rows_name_the_weight_that_a_tensor_holds(build):
    model = build()
    file = read(convert(Job(model)).content)
    tensors = [t for graph in file.subgraphs for t in graph.tensors if t.stored is not None and len(t.shape) >= 2]
    kernels = {weight.path: weight for weight in ks.selection.weights(model) if weight.kernel}
    rows = ks.tflite.check(model).rows
    assert sorted(row["weight"] for row in rows) == sorted(kernels), "each once"
    for row in rows:
        weight = kernels[row["weight"]]
        ours = normalized(ks.patterns.to_matrix(weight.numpy(), weight.output_axes))
        axes = (3,) if row["operator"] == "DEPTHWISE_CONV_2D" else (0,)
        alike = [t for t in tensors if list(t.shape) == row["shape"]]
        errors = [np.abs(normalized(ks.patterns.to_matrix(t.values(), axes)) - ours).max() for t in alike]
        assert min(errors) < 1e-4, row["weight"]


def test_constants_are_no_weights():
    """A constant of a kernel's size is not taken for that kernel."""
    inputs = keras.Input((16, 16))
    x = layers.Dense(16, name="dense")(inputs * np.random.default_rng(0).normal(size=(16, 16)).astype("float32"))
    rows = {row["operator"]: row["weight"] for row in ks.tflite.check(keras.Model(inputs, x)).rows}
    assert rows["FULLY_CONNECTED"] == "dense/kernel" and "dense" not in rows.get("MUL", "")


@pytest.mark.slow
def test_layers_at_the_outputs_are_named():
    """The converter calls an output after the signature, not after its layer."""
    inputs = keras.Input((32, 32, 3))
    x = stem(inputs)
    functional = keras.Model(inputs, {str(n): layers.Conv2D(4, 1, name=f"head_{n}")(x) for n in (10, 2, 1)})
    many = keras.Model(inputs, [layers.Conv2D(n + 1, 1, name=f"out_{n}")(x) for n in range(12)])
    steps = [layers.ZeroPadding2D(1), layers.Conv2D(16, 3, 2), layers.Conv2D(4, 1, name="last")]
    sequential = keras.Sequential([keras.Input((32, 32, 3)), *steps])
    for model, expected in (
        (functional, {"head_10", "head_2", "head_1"}),
        (many, {f"out_{number}" for number in range(12)}),
        (sequential, {"last"}),
    ):
        found = ks.tflite.check(model).violations
        assert {one["layer"] for one in found if "an output of the model" in one["violation"]} == expected


def test_two_layers_of_one_size():
    inputs = keras.Input((64,))
    x = layers.Dense(64, name="second")(layers.Dense(64, name="first")(inputs))
    report = ks.tflite.check(keras.Model(inputs, layers.Dense(3, name="third")(x)))
    assert [row["weight"] for row in report.rows] == ["first/kernel", "second/kernel", "third/kernel"]
