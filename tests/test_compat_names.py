"""Each public name of tfmot is served, or says what to do instead."""

import inspect
import json

import h5py
import keras
import pytest
from tfmot_files import in_their_environment

import keras_sparse as ks
from keras_sparse.compat import tfmot

names = tfmot.sparsity.keras
NAMES = """
    ConstantSparsity PolynomialDecay PrunableLayer PruneForLatencyOnXNNPack PruningPolicy PruningSchedule
    PruningSummaries UpdatePruningStep prune_low_magnitude prune_scope strip_pruning
""".split()


def test_every_name_is_served_or_says_what_to_do_instead():
    assert sorted(name for name in vars(names) if name[0] != "_") == NAMES
    for name in ("clustering", "experimental", "quantization", "version"):
        with pytest.raises(AttributeError, match=rf"`tfmot\.{name}` is not served here.*`ks\."):
            getattr(tfmot, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tfmot.nothing  # noqa: B018


@pytest.mark.slow
def test_names_and_arguments_of_the_real_tfmot(tmp_path):
    in_their_environment(tmp_path, "names")
    theirs = json.loads((tmp_path / "names.json").read_text())
    assert theirs.pop("") == ["clustering", "experimental", "quantization", "sparsity", "version"]
    assert sorted(theirs) == NAMES
    for name, arguments in theirs.items():
        ours = inspect.signature(getattr(names, name)).parameters
        assert [key for key in arguments if key not in ours] == [], name


def test_prune_scope(tmp_path):
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(16)])
    ks.prune(model, 0.5)
    model.save(tmp_path / "new.keras")
    dense = {"class_name": "Dense", "config": {"name": "dense", "units": 3}}
    wrapped = {"class_name": "PruneLowMagnitude", "config": {"name": "prune_dense", "layer": dense}}
    with h5py.File(tmp_path / "old.h5", "w") as file:
        config = {"name": "old", "layers": [wrapped]}
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": config})
        file.create_group("model_weights")
    with names.prune_scope():
        loaded = keras.models.load_model(tmp_path / "new.keras")
        with pytest.raises(ValueError, match=r"real tensorflow-model-opt.*tfmot\.load.*the layer 'prune_dense'"):
            keras.models.load_model(tmp_path / "old.h5")
    assert ks.report(loaded).totals == ks.report(model).totals
    with pytest.raises(ValueError, match="Unknown layer"):
        keras.models.load_model(tmp_path / "old.h5")
    with pytest.raises(NotImplementedError, match="must implement `get_prunable_weights"):
        names.PrunableLayer().get_prunable_weights()
    with pytest.raises(TypeError, match=r"keras\.Input\(shape\).*Received: input_shape=\(4,\)"):
        names.prune_low_magnitude(keras.layers.Dense(3), input_shape=(4,))
