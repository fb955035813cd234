"""One-shot pruning by gradients on data, and masks against the real tfmot."""

import itertools
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from pruned_models import kernels, make

import keras_sparse as ks

DATA = np.random.default_rng(5)
X = DATA.normal(size=(70, 6)).astype("float32")
Y = DATA.normal(size=(70, 4)).astype("float32")


def data_forms():
    batches = [(X[at : at + 32], Y[at : at + 32]) for at in (0, 32, 64)]

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    return {
        "arrays": (X, Y),
        "weighted": (X, Y, np.ones(70)),
        "generator": (batch for batch in batches),
        "sequence": Sequence(),
    }


def linear(optimizer="adam", **arguments):
    model = make(6, 4, seed=2)
    model.compile(optimizer, "mse", **arguments)
    return model


def scores_in_numpy(criterion, kernel):
    """From the gradients of the mean squared error of x @ kernel + 0, batch by batch."""
    steps = []
    for at in (0, 32, 64):
        x, y = X[at : at + 32].astype("float64"), Y[at : at + 32].astype("float64")
        steps.append(2 / y.size * x.T @ (x @ kernel - y))
    return {
        "snip": np.abs(kernel * np.sum(steps, axis=0)),
        "movement": -kernel * np.sum(steps, axis=0),
        "taylor": np.mean([np.abs(kernel * g) for g in steps], axis=0),
        "gradient": np.mean(np.abs(steps), axis=0),
    }[criterion]


@pytest.mark.parametrize("form", ["arrays", "weighted", "generator", "sequence"])
@pytest.mark.parametrize("criterion", ["snip", "movement", "taylor", "gradient"])
def test_gradients_on_data_equal_numpy(criterion, form):
    model = linear()
    before = kernels(model)[0]
    scores = scores_in_numpy(criterion, before.astype("float64"))
    ks.prune(model, 0.75, criterion=criterion, data=data_forms()[form])
    expected = np.where(scores >= np.sort(scores, None)[18], before, 0)
    np.testing.assert_array_equal(kernels(model)[0], expected)


def recurrent_with_state():
    return [
        keras.layers.Reshape((2, 3)),
        keras.layers.GRU(5, name="gru"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.Dense(4, name="head"),
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_gradients_on_data_leave_everything_else(fails):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), *recurrent_with_state()])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(X, Y, epochs=2, verbose=0)
    optimizer, history = model.optimizer, model.history
    before = [ks.selection.as_array(v) for v in [*model.variables, *optimizer.variables]]
    data = (X, Y[:, :3]) if fails else (X, Y)
    if fails:
        with pytest.raises(Exception, match=r"shape|dimension|size"):
            ks.prune(model, 0.5, criterion="snip", filters="head", data=data)
    else:
        ks.prune(model, 0.5, criterion="snip", filters="head", data=data)
    assert model.optimizer is optimizer
    assert model.history is history
    pruned = id(model.get_layer("head").kernel)
    for variable, value in zip([*model.variables, *optimizer.variables], before, strict=True):
        if fails or id(variable) != pruned:
            np.testing.assert_array_equal(ks.selection.as_array(variable), value, err_msg=variable.path)
    assert fails or ks.report(model).totals["zeros"] == 10
    model.fit(X, Y, verbose=0)


def test_snip_before_training_and_zeros_stay():
    model = linear(jit_compile=False)
    ks.prune(model, 0.5, criterion="snip", allocation="global", data=(X, Y))
    pruned = kernels(model)[0] == 0
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    np.testing.assert_array_equal(kernels(model)[0] == 0, pruned)


def test_frozen_kernels_have_no_gradients():
    model = make(6, 5, 4)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    report = ks.prune(model, 0.5, criterion="snip", data=(X, Y))
    assert report.totals["zeros"] == 10
    assert "not trainable" in str(report)


@pytest.mark.parametrize(
    "data", [(X[:0], Y[:0]), (batch for batch in []), iter([])], ids=["arrays", "generator", "iterator"]
)
def test_data_without_samples(data):
    with pytest.raises(ValueError, match="at least one"):
        ks.prune(linear(), 0.5, criterion="snip", data=data)


def test_no_finite_gradient_is_an_error():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, dtype="mixed_float16")])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1e30), "mse")
    with pytest.raises(ValueError, match="no finite gradient"):
        ks.prune(model, 0.5, criterion="snip", data=(X, Y))


def test_masks_are_the_same_on_every_backend():
    # The weights come from NumPy, so the digest is the same wherever this runs.
    import zlib

    rng = np.random.default_rng(0)
    model = make(33, 17, 5)
    for layer in model.layers:
        layer.kernel.assign(np.round(rng.normal(size=layer.kernel.shape), 2))
    masks = b""
    for allocation in ("uniform", "global"):
        for criterion in ("magnitude", "random"):
            plan = ks.pruning.Plan(model, 0.73, criterion, allocation=allocation)
            masks += b"".join(np.packbits(mask).tobytes() for mask in plan.masks(plan.present_masks()))
    assert zlib.crc32(masks) == DIGEST


DIGEST = 2449592791

TFMOT = """
import sys
import numpy as np
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl, pruning_schedule
data = np.load(sys.argv[1])
out = {}
for name in data.files:
    _, pattern, sparsity = name.split("_")
    rows, cols = map(int, pattern.split("x")) if "x" in pattern else (1, 1)
    weight = tf.constant(data[name])
    pruning = pruning_impl.Pruning(
        training_step_fn=lambda: 0, pruning_vars=[],
        pruning_schedule=pruning_schedule.ConstantSparsity(float(sparsity), 0),
        # It divides the kernel [inputs, outputs] into blocks.
        block_size=[cols, rows], block_pooling_type="AVG", sparsity_m_by_n=(2, 4) if pattern == "2:4" else None)
    out[name] = pruning._maybe_update_block_mask(weight)[1].numpy() > 0
np.savez(sys.argv[2], **out)
"""

# Shapes of kernels for which tfmot means the same: its blocks over the edge are shifted by half of what is missing, it
# has none in convolutions, and its groups of 2:4 end with the input channels.
TFMOT_SHAPES = {
    "1x1": [(20, 30), (7, 11), (64, 3), (3, 3, 5, 8), (1, 1, 16, 24), (5, 5, 1, 6)],
    "1x4": [(20, 30), (64, 3), (16, 7)],
    "2x8": [(32, 30), (128, 4)],
    "2:4": [(20, 30), (7, 11), (18, 5), (3, 3, 8, 6), (1, 1, 16, 24)],
}


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tfmot is TensorFlow's")
def test_masks_equal_the_real_tfmots(tmp_path):
    rng = np.random.default_rng(0)
    # Distinct magnitudes: tfmot keeps every weight that ties with its threshold. No halves: it rounds what is kept,
    # and at least one.
    weights = {}
    for pattern, shapes in TFMOT_SHAPES.items():
        for i, shape in enumerate(shapes):
            for sparsity in (0.5,) if pattern == "2:4" else (0.1, 0.51, 0.9, 0.97):
                ranks = rng.permutation(np.prod(shape)).reshape(shape)
                weights[f"{i}_{pattern}_{sparsity}"] = (ranks - ranks.size / 2 + 0.25).astype("float32")
    np.savez(tmp_path / "in.npz", **weights)
    command = [sys.executable, "-c", textwrap.dedent(TFMOT), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    masks = np.load(tmp_path / "out.npz")
    for name, weight in weights.items():
        _, pattern, sparsity = name.split("_")
        layer = keras.layers.Dense(weight.shape[-1])
        if weight.ndim == 4:
            layer = keras.layers.Conv2D(weight.shape[-1], weight.shape[:2])
        model = keras.Sequential([keras.Input((*[9] * (weight.ndim - 2), weight.shape[-2])), layer])
        layer.kernel.assign(weight)
        ks.prune(model, float(sparsity), pattern=f"block_{pattern}" if "x" in pattern else pattern)
        np.testing.assert_array_equal(layer.kernel.numpy() != 0, masks[name], err_msg=f"{name} {weight.shape}")


@pytest.mark.parametrize("seed", range(8))
def test_two_of_four_are_the_best_of_all_choices_in_every_kernel(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs, size = (int(n) for n in rng.integers((1, 1, 1), (11, 9, 4)))
    layer = [
        keras.layers.Dense(outputs),
        keras.layers.Conv2D(outputs, size),
        keras.layers.Conv2DTranspose(outputs, size),
    ]
    layer = layer[seed % 3]
    model = keras.Sequential([keras.Input((*[9] * (0 if seed % 3 == 0 else 2), inputs)), layer])
    before = layer.kernel.numpy()
    ks.prune(model, None, pattern="2:4")
    # Outputs first, then positions, input channels last, each row by itself.
    view = {2: (1, 0), 4: (2, 0, 1, 3) if seed % 3 == 2 else (3, 0, 1, 2)}[before.ndim]
    for old, new in zip(*(k.transpose(view).reshape(outputs, -1) for k in (before, layer.kernel.numpy())), strict=True):
        for start in range(0, len(old), 4):
            group = old[start : start + 4]
            choices = itertools.combinations(range(len(group)), min(2, len(group)))
            best = max(choices, key=lambda choice: np.abs(group[list(choice)]).sum())
            expected = np.zeros_like(group)
            expected[list(best)] = group[list(best)]
            np.testing.assert_array_equal(new[start : start + 4], expected)


@pytest.mark.parametrize("pattern", ["channel", "block_2x3"])
def test_patterns_see_the_matrix_that_the_runtime_multiplies(pattern):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.Conv2DTranspose(6, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(8),
        ]
    )
    before = [layer.kernel.numpy() for layer in model.layers if layer.name != "flatten"]
    ks.prune(model, 0.5, pattern=pattern, filters="kernel")
    views = [(3, 0, 1, 2), (2, 0, 1, 3), (1, 0)]
    for layer, old, view in zip([model.layers[0], model.layers[1], model.layers[3]], before, views, strict=True):
        matrix = old.transpose(view).reshape(old.shape[view[0]], -1)
        mask = ks.patterns.get(pattern).mask(np.abs(matrix), 0.5, output_axes=[0])
        own = ks.patterns.get(pattern).mask(np.abs(old), 0.5, output_axes=[view[0]])
        np.testing.assert_array_equal(own.transpose(view).reshape(matrix.shape), mask)
        now = layer.kernel.numpy().transpose(view).reshape(matrix.shape)
        if pattern == "channel":  # ranked by all weights that leave with it
            mask = np.broadcast_to((now != 0).any(axis=1, keepdims=True), matrix.shape)
            assert mask[:, 0].sum() == len(matrix) // 2
        np.testing.assert_array_equal(now, np.where(mask, matrix, 0))


def test_keys_of_a_target_may_be_callables():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)])
    kernel = model.layers[1].kernel
    ks.prune(model, {lambda variable: variable is kernel: (0.5, "2:4")})
    assert [int(np.sum(w == 0)) for w in model.get_weights()[::2]] == [0, 32]
    with pytest.raises(ValueError, match="is true for no weight"):
        ks.prune(model, {lambda variable: False: 0.5})
