"""Targets as data: complete, and the same as the code goes by."""

import json
import pathlib

import keras
import pytest

import keras_sparse as ks
from keras_sparse.tflite.targets import TARGETS, get, pays_from

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_each_statement_has_a_source():
    for target in TARGETS:
        sources = [statement.source for statement in (*target.sparse, *target.rules, target.otherwise)]
        assert all("measured" in source or "read" in source or ".c" in source for source in sources), target.name
        assert all(kind.operator in ("CONV_2D", "FULLY_CONNECTED") for kind in target.sparse)
        for kind in target.sparse:
            assert ks.patterns.get(kind.pattern) and 0.5 < kind.sparsity < 1
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names) == 19


def test_unknown_targets():
    for call in (get, lambda name: ks.tflite.check(keras.Sequential([keras.Input((3,))]), name)):
        with pytest.raises(ValueError, match=r"must be one of 'xnnpack', .*'qnn'\. Received: target='phone'"):
            call("phone")


def test_numbers_go_with_the_rules():
    for target in TARGETS:
        convolutions = any(kind.operator == "CONV_2D" for kind in target.sparse)
        assert convolutions == bool(target.rules) == (target.form is not None), target.name


@pytest.mark.parametrize(
    ("operator", "pattern", "sparsity"),
    [
        ("CONV_2D", "unstructured", 2 / 3),
        ("FULLY_CONNECTED", "block_1x4", 0.85),
        ("FULLY_CONNECTED", "block_1x16", 0.95),
    ],
)
def test_the_least_sparsity_that_pays(operator, pattern, sparsity):
    assert pays_from(operator, pattern) == sparsity
    with pytest.raises(ValueError, match="No target has a sparse kernel for .* Received: pattern='2:4'"):
        pays_from(operator, "2:4")


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({}, True),
        ({"kernel": (3, 3, 1)}, False),
        ({"kernel": (5, 5, 3)}, False),
        ({"kernel": (3, 1, 3)}, False),
        ({"strides": (1, 1)}, False),
        ({"strides": (2, 1)}, False),
        ({"dilation": (2, 2)}, False),
        ({"groups": 3}, False),
    ],
)
def test_the_convolution_that_a_network_begins_with(change, entry):
    assert get("xnnpack").form.is_entry(**{"kernel": (3, 3, 3), "strides": (2, 2)} | change) == entry


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"kernel": (5, 5)}, True),
        ({"strides": (1, 1)}, True),
        ({"kernel": (7, 7)}, False),
        ({"kernel": (3, 5)}, False),
        ({"strides": (3, 3)}, False),
        ({"strides": (2, 1)}, False),
        ({"dilation": (2, 2)}, False),
        ({"multiplier": 2}, False),
    ],
)
def test_depthwise_convolutions_of_a_network(change, taken):
    assert get("xnnpack").form.takes_depthwise(**{"kernel": (3, 3), "strides": (2, 2)} | change) == taken


def test_the_table():
    report = ks.tflite.targets()
    data = json.loads(report.to_json())
    assert {row["target"] for row in data["rows"]} == {target["name"] for target in data["targets"]}
    faults = [target["faults"] for target in data["targets"] if target["faults"]]
    assert faults == [["averaged"], ["shifted", "grouped", "broadcast", "strided"], *[["resized"]] * 4]
    assert "1x1 convolutions" in str(report) and "src/subgraph.c" in str(report.full())


def test_the_guide_names_them_all():
    text = (DOCS / "guides" / "targets.md").read_text(encoding="utf-8")
    for target in TARGETS:
        assert f"`{target.name}`" in text and target.title in text, target.name
        for kind in target.sparse:
            assert f"{kind.pattern} from {kind.sparsity:.0%}" in text
        for statement in (*target.rules, target.otherwise):
            assert statement.text in " ".join(text.split()), statement.text
