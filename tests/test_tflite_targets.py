"""Targets as data: complete, and the same as the code goes by."""

import json
import pathlib

import keras
import pytest

import keras_sparse as ks
from keras_sparse.tflite.targets import TARGETS, get

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_each_statement_has_a_source():
    for target in TARGETS:
        sources = [statement.source for statement in (*target.sparse, *target.rules, target.otherwise)]
        assert all("measured" in source or "read" in source or ".c" in source for source in sources), target.name
        assert all(kind.operator in ("CONV_2D", "FULLY_CONNECTED") for kind in target.sparse)
        for kind in target.sparse:
            assert ks.patterns.get(kind.pattern) and 0.5 < kind.sparsity < 1
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names) == 10


def test_unknown_targets():
    for call in (get, lambda name: ks.tflite.check(keras.Sequential([keras.Input((3,))]), name)):
        with pytest.raises(ValueError, match=r"must be one of 'xnnpack', .*'micro'\. Received: target='phone'"):
            call("phone")


def test_the_table():
    report = ks.tflite.targets()
    data = json.loads(report.to_json())
    assert {row["target"] for row in data["rows"]} == {target["name"] for target in data["targets"]}
    assert "1x1 convolutions" in str(report) and "src/subgraph.c" in str(report.full())


def test_the_guide_names_them_all():
    text = (DOCS / "guides" / "targets.md").read_text(encoding="utf-8")
    for target in TARGETS:
        assert f"`{target.name}`" in text and target.title in text, target.name
        for kind in target.sparse:
            assert f"{kind.pattern} from {kind.sparsity:.0%}" in text
        for statement in (*target.rules, target.otherwise):
            assert statement.text in " ".join(text.split()), statement.text
