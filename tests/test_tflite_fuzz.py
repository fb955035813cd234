"""Networks drawn at random: no wrong file leaves `export`, and what runs sparse is told beforehand."""

import keras
import pytest
from tflite_graphs import OTHERS, STEMS, build, outcome, recipe, shrink

import keras_sparse as ks
from keras_sparse.tflite.runtimes import available

pytestmark = [
    pytest.mark.everywhere,
    pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way"),
]
RUNTIMES = [name for name in ("native", "x86-no-avx", "wasm") if available()[name] is None]
needs_sparse_runtime = pytest.mark.skipif(len(RUNTIMES) == 1, reason="needs qemu-x86_64 or LiteRT.js")

# Each with the way export goes about it: out of the sparse kernels' way, weight by weight, or dense.
FAMILIES = {
    "only the front fits": (
        ["96x96", "fit", "pointwise relu6", "max pooling", "pointwise relu6", "dense", "0.9"],
        None,
    ),
    "1x1 convolution as classifier": (["96x96", "fit", "pointwise relu6", "convolution", "0.9"], None),
    "int8 weights, float inputs": (["96x96", "fit", "pointwise relu6", "hidden", "0.9"], "dynamic"),
    "float16 Dense in blocks": (["96x96", "same", "pointwise relu6", "hidden", "0.97"], "float16"),
}


@needs_sparse_runtime
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_broken_files(name):
    words, quantize = FAMILIES[name]
    found = outcome(words, quantize, RUNTIMES)
    assert found["faults"] == {} and found["encoding"] == "sparse"
    assert found["engages"] in (None, found["says"])


@needs_sparse_runtime
@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "float16", "dynamic", "int8"])
def test_random_networks(quantize):
    for seed in range(1000, 1002):
        words = ["96x96", *recipe(seed)[1:]]
        found = outcome(words, quantize, RUNTIMES)
        assert found["faults"] == {}, shrink(words, quantize, list(found["faults"]))
        assert found["engages"] in (None, found["says"]), words


@needs_sparse_runtime
@pytest.mark.slow
def test_without_the_rules_wrong_files_are_found():
    words = ["32x32", "fit", "elu", "pointwise relu6", "max pooling", "pointwise relu6", "dense", "0.9"]
    runtime = RUNTIMES[1]
    assert outcome(words, None, [runtime], rules=False)["faults"]
    small = shrink(words, None, [runtime], rules=False)
    assert len(small) < len(words) and outcome(small, None, [runtime], rules=False)["faults"]


def test_recipes():
    recipes = [recipe(seed) for seed in range(200)]
    assert recipes == [recipe(seed) for seed in range(200)]
    assert {words[1] for words in recipes} == set(STEMS)
    assert {word for words in recipes for word in words} >= set(OTHERS)
    model = build(recipes[1])
    kernels = [w for w in ks.report(model).rows if w["path"].endswith("kernel") and w["zeros"]]
    assert kernels and all(0.3 < row["zeros"] / row["size"] for row in kernels)
