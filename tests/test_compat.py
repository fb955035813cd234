"""Files and names of tensorflow-model-optimization: read and spoken."""

import json

import h5py
import keras
import numpy as np
import pytest
from tfmot_files import in_their_environment

import keras_sparse as ks
from keras_sparse.cli import run
from keras_sparse.compat import hdf5, keras2, schedules, tfmot
from keras_sparse.compat import sparsity as our_sparsity

names = tfmot.sparsity.keras
TF = keras.backend.backend() == "tensorflow"


def array(value):
    return ks.selection.as_array(value)


def wrapped(layer, prefix="prune_low_magnitude_"):
    config = {"name": prefix + layer["config"]["name"], "layer": layer, "pruning_schedule": {}}
    return {"class_name": "PruneLowMagnitude", "config": config}


def dense(name, units, **options):
    return {"class_name": "Dense", "config": {"name": name, "units": units, "trainable": True, **options}}


def write(path, layers, weights, kind="Sequential"):
    """A file as Keras 2 writes it."""
    config = layers if isinstance(layers, dict) else {"name": "old", "layers": layers}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = "2.14.0", "tensorflow"
        file.attrs["model_config"] = json.dumps({"class_name": kind, "config": config})
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in weights]
        for name, arrays in weights.items():
            inner = group.create_group(name)
            inner.attrs["weight_names"] = [key.encode() for key in arrays]
            for key, value in arrays.items():
                inner[key] = value
    return path


RNG = np.random.default_rng(0)
KERNEL, BIAS = RNG.normal(size=(4, 3)).astype("float32"), RNG.normal(size=3).astype("float32")
MASK = (RNG.random((4, 3)) > 0.4).astype("float32")
INPUT = {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 4], "name": "input_1", "ragged": False}}
WEIGHTS = {
    "prune_low_magnitude_dense": {
        "dense/kernel:0": KERNEL,
        "dense/bias:0": BIAS,
        "prune_low_magnitude_dense/mask:0": MASK,
        "prune_low_magnitude_dense/threshold:0": np.float32(0.1),
        "prune_low_magnitude_dense/pruning_step:0": np.int64(7),
    }
}


def pruned(path, **options):
    return write(path, [INPUT, wrapped(dense("dense", 3, **options))], WEIGHTS)


def test_masks_are_applied_and_wrappers_gone(tmp_path):
    path = pruned(tmp_path / "old.h5", activation="hard_sigmoid")
    model = tfmot.load(path)
    kernel, bias = (array(v) for v in model.layers[0].weights)
    np.testing.assert_array_equal(kernel, np.where(MASK == 0, 0, KERNEL))
    assert not np.signbit(kernel[MASK == 0]).any()
    np.testing.assert_array_equal(bias, BIAS)
    assert [type(layer) for layer in model.layers] == [keras.layers.Dense]
    assert (model.name, model.layers[0].name) == ("old", "dense")
    x = RNG.normal(size=(5, 4)).astype("float32")
    expected = np.clip(0.2 * (x @ (KERNEL * MASK) + BIAS) + 0.5, 0, 1)
    np.testing.assert_allclose(array(model(x)), expected, atol=1e-6)
    model.save(tmp_path / "new.keras")
    again = keras.saving.load_model(tmp_path / "new.keras")
    np.testing.assert_allclose(array(again(x)), expected, atol=1e-6)
    model.compile("adam", "mse")
    model.fit(x, np.ones((5, 3)), verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    assert (array(model.layers[0].kernel)[MASK == 0] == 0).all()


def distributed(layer):
    config = {"name": "steps", "layer": layer, "batch_input_shape": [None, 2, 4]}
    return [{"class_name": "TimeDistributed", "config": config}]


def test_what_steps_share_is_read_with_its_wrapper(tmp_path):
    names = {"kernel": KERNEL, "bias": BIAS, "mask": MASK, "threshold": np.float32(0.1), "pruning_step": np.int64(7)}
    weights = {"steps": {f"steps/{name}:0": value for name, value in names.items()}}  # as tf_keras names them
    model = tfmot.load(write(tmp_path / "old.h5", distributed(wrapped(dense("dense", 3))), weights))
    np.testing.assert_array_equal(array(model.layers[0].weights[0]), np.where(MASK == 0, 0, KERNEL))
    x = RNG.normal(size=(5, 2, 4)).astype("float32")
    np.testing.assert_allclose(array(model(x)), x @ (KERNEL * MASK) + BIAS, atol=1e-5)


def test_a_model_that_steps_share(tmp_path):
    normal = {"class_name": "BatchNormalization", "config": {"name": "normal", "axis": [1], "epsilon": 0.0}}
    first = {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 4], "name": "input_2"}}
    inner = {"class_name": "Sequential", "config": {"name": "inner", "layers": [first, dense("dense", 3), normal]}}
    values = {"dense/kernel": KERNEL, "dense/bias": BIAS}
    values |= {f"normal/{name}": RNG.uniform(1, 2, 3) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    weights = {"steps": {f"{name}:0": value for name, value in values.items()}}
    path = write(tmp_path / "old.h5", distributed(inner), weights)
    x = RNG.normal(size=(5, 2, 4)).astype("float32")
    gamma, beta, mean, variance = list(values.values())[2:]
    expected = (x @ KERNEL + BIAS - mean) / np.sqrt(variance) * gamma + beta
    np.testing.assert_allclose(array(tfmot.load(path)(x)), expected, rtol=1e-4, atol=1e-5)
    inner["config"]["layers"][1] = wrapped(dense("dense", 3))
    with pytest.raises(ValueError, match="'inner' is inside of a wrapper layer.*save it after `strip_pruning`"):
        tfmot.load(write(tmp_path / "other.h5", distributed(inner), weights))


def test_command(tmp_path, capsys):
    path = pruned(tmp_path / "old.h5")
    assert run.main(["convert-tfmot", str(path), str(tmp_path / "new.keras"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["sparsity"] == pytest.approx((MASK == 0).mean(), abs=1e-3)
    kernel = keras.saving.load_model(tmp_path / "new.keras").layers[0].kernel
    np.testing.assert_array_equal(array(kernel) == 0, MASK == 0)


def test_damaged_files(tmp_path):
    content = pruned(tmp_path / "old.h5").read_bytes()
    rng, bad = np.random.default_rng(1), tmp_path / "bad.h5"
    loaded = 0
    for trial in range(200):
        damaged = bytearray(content)
        if trial % 4 == 0:
            damaged = damaged[: rng.integers(len(content))]
        else:
            for position in rng.integers(len(content), size=rng.integers(1, 30)):
                damaged[position] ^= 1 << rng.integers(8)
        bad.write_bytes(damaged)
        try:
            assert tfmot.load(bad).count_params() == 15
            loaded += 1
        except ValueError as error:
            assert "Received: " in str(error)
    assert loaded < 190


def test_hostile_files(tmp_path):
    path = tmp_path / "bad.h5"
    code = {"class_name": "Lambda", "config": {"name": "evil", "function": ["4wAAAA==", None, None]}}
    write(path, [INPUT, code], {})
    with pytest.raises(ValueError, match="'evil'.*unsafe.*safe_mode=False"):
        tfmot.load(path)
    with pytest.raises(ValueError, match="cannot be read here"):
        tfmot.load(path, safe_mode=False)
    pruned(path, activation={"class_name": "__lambda__", "config": {"code": "4wAAAA=="}})
    with pytest.raises(ValueError, match="unsafe"):
        tfmot.load(path)
    write(path, [INPUT, dense("dense", 10**12)], {"dense": {"dense/kernel:0": KERNEL, "dense/bias:0": BIAS}})
    with pytest.raises(ValueError, match="larger than all that the file holds"):
        tfmot.load(path)
    with h5py.File(pruned(path), "r+") as file:
        group = file["model_weights/prune_low_magnitude_dense/dense"]
        del group["kernel:0"]
        group.create_dataset("kernel:0", (10**7, 10**7), "float32")
    with pytest.raises(ValueError, match="should have 400000000000000 bytes, and 0 are stored"):
        tfmot.load(path)
    with h5py.File(pruned(path), "r+") as file:
        group = file["model_weights/prune_low_magnitude_dense/dense"]
        del group["kernel:0"]
        group["kernel:0"] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(ValueError, match="a link to somewhere else"):
        tfmot.load(path)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"class_name": "CuDNNLSTM", "config": {"name": "l", "units": 3}}, "'l' .CuDNNLSTM. is of a class"),
        ({"class_name": "GRU", "config": {"name": "g", "units": 3, "time_major": True}}, "time_major=True"),
    ],
)
def test_what_keras_3_does_not_have_is_named(tmp_path, layer, message):
    with pytest.raises(ValueError, match=message):
        tfmot.load(write(tmp_path / "old.h5", [INPUT, layer], {}))


def test_operations_are_known_or_named(tmp_path):
    def model(function, options):
        operation = {"class_name": "TFOpLambda", "config": {"name": "f", "function": function}}
        layers = [
            {**INPUT, "name": "input_1", "inbound_nodes": []},
            {**operation, "name": "f", "inbound_nodes": [["input_1", 0, 0, options]]},
        ]
        ends = {"input_layers": [["input_1", 0, 0]], "output_layers": [["f", 0, 0]]}
        return write(tmp_path / "old.h5", {"name": "m", "layers": layers, **ends}, {}, "Functional")

    x = RNG.normal(size=(2, 4)).astype("float32")
    np.testing.assert_allclose(array(tfmot.load(model("math.multiply", {"y": 3.0, "name": None}))(x)), 3 * x)
    total = tfmot.load(model("math.reduce_sum", {"axis": 1, "keepdims": True}))(x)
    np.testing.assert_allclose(array(total), x.sum(1, keepdims=True), rtol=1e-5)
    with pytest.raises(ValueError, match=r"`tf.py_function` .TFOpLambda."):
        tfmot.load(model("py_function", {}))
    with pytest.raises(ValueError, match="'gamma'"):
        tfmot.load(model("nn.relu", {"gamma": 2.0}))


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match=r"SavedModel folder of Keras 2.*without saved_model\.pb"):
        tfmot.load(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "saved_model.pb").write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match="The folder is damaged"):
        tfmot.load(tmp_path / "folder")
    if TF:
        import tensorflow as tf

        tf.saved_model.save(tf.Module(), tmp_path / "other")
        with pytest.raises(ValueError, match="describes no Keras model"):
            tfmot.load(tmp_path / "other")
    (tmp_path / "a.h5").write_text("no")
    with pytest.raises(ValueError, match="no HDF5 file"):
        tfmot.load(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="holds weights and no model"):
        hdf5.read(tmp_path / "b.h5")
    with pytest.raises(AttributeError, match="is not served.*`load`"):
        tfmot.quantization  # noqa: B018
    assert float(keras2.hard_sigmoid(5.0)) == 1.0


def network():
    layers = [keras.Input((10,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(8)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse", run_eagerly=TF)
    return model


def test_pruning_at_the_steps_of_tfmot():
    model = network()
    schedule = names.PolynomialDecay(0.2, 0.75, begin_step=2, end_step=8, frequency=3)
    assert names.prune_low_magnitude(model, pruning_schedule=schedule) is model
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float((array(self.model.layers[0].kernel) == 0).mean()))

    x, y = RNG.normal(size=(40, 10)), RNG.normal(size=(40, 8))
    callbacks = [names.UpdatePruningStep(), Watch()]
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    expected = [0] + 3 * [0.2] + 3 * [schedule(5)[1]] + 3 * [0.75]
    np.testing.assert_allclose(seen, expected, atol=1 / 160)
    assert history.history["sparsity"][-1] == pytest.approx(0.75)
    assert names.strip_pruning(model) is model
    with pytest.raises(ValueError, match="no layer to prune"):
        model.fit(x, y, verbose=0, callbacks=[names.UpdatePruningStep()])


def test_layers_alone_blocks_and_two_of_four():
    once = names.ConstantSparsity(0.5, 1)
    first = names.prune_low_magnitude(keras.layers.Dense(16), once, block_size=(2, 4), block_pooling_type="MAX")
    second = names.prune_low_magnitude(keras.layers.Dense(8), once, sparsity_m_by_n=(2, 4))
    model = keras.Sequential([keras.Input((10,)), first, second, keras.layers.Dense(8)])
    model.compile("adam", "mse", run_eagerly=TF)
    before = array(first.kernel if first.built else model.layers[0].kernel)
    model.fit(np.ones((4, 10)), np.ones((4, 8)), verbose=0, callbacks=[names.UpdatePruningStep()])
    pooled = np.abs(before).reshape(5, 2, 4, 4).max((1, 3))
    kept = pooled >= np.sort(pooled, axis=None)[10]
    np.testing.assert_array_equal(array(first.kernel) != 0, kept.repeat(2, 0).repeat(4, 1))
    assert ((array(second.kernel).T.reshape(8, 4, 4) == 0).sum(-1) == 2).all()
    assert (array(model.layers[2].kernel) != 0).all()


def test_clone_function_and_policy():
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3)(x)
    x = keras.layers.Conv2D(4, 1)(x)
    model = keras.Model(inputs, x)
    names.prune_low_magnitude(model, pruning_policy=names.PruneForLatencyOnXNNPack())
    assert [hasattr(layer, "tfmot_pruning") for layer in model.layers] == [False, False, True]
    clone = keras.models.clone_model(
        network(), clone_function=lambda layer: names.prune_low_magnitude(layer, names.ConstantSparsity(0.5, 1))
    )
    clone.compile("adam", "mse", run_eagerly=TF)
    clone.fit(np.ones((4, 10)), np.ones((4, 8)), verbose=0, callbacks=[names.UpdatePruningStep()])
    assert [float((array(layer.kernel) == 0).mean()) for layer in clone.layers] == [0.5, 0.5]
    with pytest.raises(ValueError, match="1x1 convolutions"):
        names.prune_low_magnitude(network(), pruning_policy=names.PruneForLatencyOnXNNPack())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`to_prune` can only be a Keras 3 model"):
        names.prune_low_magnitude("model")
    with pytest.raises(TypeError, match="`pruning_schedule` can only be"):
        names.prune_low_magnitude(network(), pruning_schedule=0.5)
    with pytest.raises(ValueError, match="'AVG' or 'MAX'"):
        names.prune_low_magnitude(network(), block_pooling_type="MEAN")
    with pytest.raises(ValueError, match=r"range \[0,1\)"):
        names.ConstantSparsity(1.0, 0)
    with pytest.raises(ValueError, match="keras.Model"):
        names.strip_pruning("model")

    class Theirs:  # Of the real tfmot.
        def get_config(self):
            return schedules.ConstantSparsity(0.25, 3).get_config()

    assert vars(schedules.get(Theirs())) == vars(schedules.ConstantSparsity(0.25, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_of_the_real_tf_keras_and_tfmot(tmp_path):
    in_their_environment(tmp_path)
    paths = sorted(tmp_path.glob("*.h5"))
    assert len(paths) >= 30
    for path in paths:
        check_loaded(path, np.load(path.with_suffix(".npz")))


def check_loaded(path, arrays):
    model = tfmot.load(path)
    x, y = ([arrays[key] for key in arrays.files if key.startswith(kind)] for kind in ("in", "out"))
    outputs = keras.tree.flatten(model(x if len(x) > 1 else x[0], training=False))
    for output, expected in zip(outputs, y, strict=True):
        np.testing.assert_allclose(array(output), expected, atol=1e-5, rtol=1e-5, err_msg=path.stem)
    zeros = [float((array(v) == 0).mean()) for v in model.weights if len(v.shape) > 1]
    assert all(min(abs(share - zero) for zero in zeros) < 1e-6 for share in arrays["masks"] if share), path.stem
    assert not any("prune_low" in layer.name or "quant_" in layer.name for layer in ks.selection.layers(model))


FOLDERS = """
    plain_sequential plain_functional pruned_sequential pruned_functional pruned_some_layers stripped
    nested pruned_nested nested_functional_shared pruned_shared pruned_two_outputs frozen old_gru bidirectional
    pruned_embedding normalization clustered
""".split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_folders_of_the_real_tf_keras_and_tfmot(tmp_path):
    in_their_environment(tmp_path, "folders", *FOLDERS)
    for name in FOLDERS:
        check_loaded(tmp_path / name, np.load(tmp_path / f"{name}.npz"))
    folder, outcomes = tmp_path / "pruned_functional", set()
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "fingerprint.pb"]
    rng = np.random.default_rng(0)
    for path in files:
        whole = path.read_bytes()
        for damage in range(20):
            content = bytearray(whole[: rng.integers(len(whole))] if damage % 2 else whole)
            for place in rng.integers(max(1, len(content)), size=5 * (damage % 2 == 0)):
                content[place] ^= 1 << rng.integers(8)
            path.write_bytes(content)
            try:
                tfmot.load(folder)
                outcomes.add("loads")
            except ValueError as error:
                assert len(str(error)) < 1500
                outcomes.add("ValueError")
        path.write_bytes(whole)
    assert outcomes == {"loads", "ValueError"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_same_masks_as_the_real_tfmot(tmp_path):
    in_their_environment(tmp_path, "trained")
    for path in sorted(tmp_path.glob("*.npz")):
        arrays = np.load(path)
        model = network()
        model.set_weights([arrays[f"w{i}"] for i in range(4)])
        config = json.loads(str(arrays["config"]))
        schedule = getattr(names, config["class_name"])(**config["config"])
        block = tuple(int(size) for size in arrays["block"])
        m_by_n = tuple(int(size) for size in arrays["m_by_n"]) or None
        names.prune_low_magnitude(model, schedule, block_size=block, sparsity_m_by_n=m_by_n)
        callbacks = [names.UpdatePruningStep()]
        model.compile(keras.optimizers.SGD(0.01), "mse")
        model.fit(arrays["x"], arrays["y"], batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
        for i, layer in enumerate(model.layers):
            ours, theirs = array(layer.kernel) == 0, arrays[f"mask{i}"] == 0
            if config["class_name"] == "ConstantSparsity":
                np.testing.assert_array_equal(ours, theirs, err_msg=path.stem)
            else:
                assert ours.mean() == theirs.mean(), path.stem


def test_largest_keeps_ties_and_one():
    kept = our_sparsity._Settings(None or names.ConstantSparsity(0.5, 0), (1, 1), "AVG", None)
    assert kept.mask(np.array([1.0, -1.0, 1.0, 0.0]), 0.5).tolist() == [True, True, True, False]
    assert kept.mask(np.array([1.0, -2.0]), 0.99).tolist() == [False, True]
