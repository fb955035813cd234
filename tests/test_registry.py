"""Strings that stand for objects."""

import keras
import pytest

import keras_sparse as ks
from keras_sparse.registry import did_you_mean

KINDS = [
    (ks.schedules.get, ks.schedules.Schedule, "linear"),
    (ks.patterns.get, ks.patterns.Pattern, "unstructured"),
    (ks.criteria.get, ks.criteria.Criterion, "magnitude"),
]


@pytest.mark.parametrize(("get", "base", "name"), KINDS)
def test_get_takes_a_name_an_instance_or_a_config(get, base, name):
    instance = get(name)
    assert isinstance(instance, base)
    assert get(instance) is instance
    assert type(get(keras.saving.serialize_keras_object(instance))) is type(instance)


@pytest.mark.parametrize(
    ("received", "hint"),
    [("GPU", ". Did you mean 'gpu'?"), ("polynomal", ". Did you mean 'Polynomial'?"), ("zzz", ""), (3, ""), (None, "")],
)
def test_other_names_that_may_have_been_meant(received, hint):
    assert did_you_mean(received, ["cpu", "gpu", "Polynomial"]) == hint


@pytest.mark.parametrize(("get", "base", "name"), KINDS)
def test_errors_say_what_there_is(get, base, name):
    with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
        get(name[:-1])
    with pytest.raises(TypeError, match="Received: 3 of type int"):
        get(3)
    with pytest.raises(TypeError, match="Create an instance"):
        get(type(get(name)))


def test_what_has_a_config_shows_its_arguments():
    assert repr(ks.patterns.NM(2, 4)) == "NM(n=2, m=4)"
    assert repr(ks.pruning.ERK()) == "ERK(live_paths=False)"
    assert "filters=<function" in repr(ks.callbacks.Pruning(0.9, filters=lambda variable: True))
    with pytest.raises(TypeError, match="An allocation is a string"):
        ks.pruning.allocation.get(3)


@pytest.mark.parametrize("module", [ks.schedules, ks.patterns, ks.criteria])
def test_every_public_class_has_a_name(module):
    classes = [getattr(module, name) for name in module.__all__ if isinstance(getattr(module, name), type)]
    for cls in classes:
        assert cls.__module__ in (module.__name__, f"{module.__name__}.shapes")
    named = {type(module.get(name)) for name in NAMES[module.__name__.split(".")[-1]]}
    bases = {ks.schedules.Schedule, ks.patterns.Pattern, ks.patterns.WithinOutputs}
    bases |= {ks.criteria.Criterion, ks.criteria.InputCriterion, ks.criteria.Statistic}
    assert named == set(classes) - bases


NAMES = {
    "schedules": ["polynomial", "linear", "cosine", "exponential", "one_shot"],
    "patterns": ["unstructured", "channel", "block", "2:4"],
    "criteria": ["magnitude", "random", "gradient", "taylor", "movement", "snip", "fisher", "wanda", "obs", "slimming"],
}
