"""Reading .tflite files: decoding, with the dense file as the oracle."""

import math

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from tflite_models import encodings

import keras_sparse as ks
from keras_sparse.tflite.flatmodel import Tensor, read


@pytest.fixture(scope="module")
def files():
    return encodings()


def tensors(content):
    return [t for graph in read(content).subgraphs for t in graph.tensors if t.stored is not None]


@pytest.mark.thorough(4)
def test_decoding_equals_the_dense_file(files):
    seen = 0
    for key, made in files.items():
        dense = [t.values() for t in tensors(made["dense"])]
        for tensor in tensors(made["sparse"]):
            if tensor.levels is None:
                continue
            seen += 1
            values = tensor.values()
            same = [v for v in dense if v.dtype == values.dtype and np.array_equal(v, values)]
            assert len(same) == 1, (key, tensor.name)
            assert tensor.zeros == np.sum(values == 0) and 0.79 < tensor.zeros / tensor.size < 0.91
            assert tensor.bytes < values.nbytes
    assert seen > 15


def test_encodings_and_blocks(files):
    def kinds(*key):
        return {(t.encoding, t.block) for t in tensors(files[key]["sparse"]) if t.levels is not None}

    assert kinds("mlp", False, None) == {("sparse-csr", (1, 1))}
    assert kinds("mlp", True, None) == {("sparse-block-csr", (1, 4))}
    assert kinds("mlp", True, "float16") == {("sparse-block-csr", (1, 4))}
    assert ("sparse-csr", (1, 1, 1, 1)) in kinds("cnn", False, None)
    assert all(t.encoding == "dense" for t in tensors(files["cnn", False, None]["dense"]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_no_encoding_goes_below_the_limit(dtype):
    values = np.zeros(12, dtype)
    values[[0, 5, 7]] = 1
    tensor = Tensor("kernel", (3, 4), dtype, values.view("uint8"))
    assert tensor.bytes_limit == math.ceil(3 * values.itemsize + math.log2(math.comb(12, 3)) / 8)
    full = Tensor("kernel", (3, 4), dtype, (values + 1).astype(dtype).view("uint8"))
    assert full.bytes_limit == full.bytes


def test_files_lie_above_the_limit(files):
    for key, made in files.items():
        dense, sparse = (read(made[kind]) for kind in ("dense", "sparse"))
        assert sparse.bytes_limit <= sparse.bytes and dense.bytes_limit < dense.bytes, key
        # Tensor by tensor: the same, but for blocks, of which there are fewer ways.
        for tensor in tensors(made["sparse"]):
            values = tensor.values() if tensor.levels is not None else None
            if values is not None:
                plain = Tensor("", tensor.shape, tensor.dtype, np.ascontiguousarray(values).reshape(-1).view("uint8"))
                whole = all(n == 1 for n in tensor.block)
                assert tensor.bytes_limit == plain.bytes_limit if whole else tensor.bytes_limit <= tensor.bytes


def test_tensors_of_all_subgraphs(files):
    path_free = read(files["lstm", False, None]["sparse"])
    assert len(path_free.subgraphs) > 1
    inner = [t for graph in path_free.subgraphs[1:] for t in graph.tensors if t.levels is not None]
    assert len(inner) == 4  # kernel and recurrent kernel of both directions


def test_content_is_checked():
    with pytest.raises(ValueError, match="content of 4 bytes without the mark"):
        read(b"none")
    with pytest.raises(ValueError, match="damaged or truncated"):
        read(b"\x1c\x00\x00\x00TFL3")


def test_operators_that_run_in_circles(files):
    """What asks for the constant behind an input would never end."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(files["cnn", False, None]["sparse"], 0))
    codes = [code.builtinCode for code in model.operatorCodes]
    densify = [o for o in model.subgraphs[0].operators if codes[o.opcodeIndex] == schema.BuiltinOperator.DENSIFY]
    assert densify
    densify[0].outputs = densify[0].inputs
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    with pytest.raises(ValueError, match="damaged or truncated.*Received: content of"):
        read(bytes(builder.Output()))


@pytest.mark.parametrize(
    ("function", "path"),
    [
        (ks.tflite.inspect, ["a.tflite"]),
        (ks.tflite.inspect, None),
        (ks.tflite.benchmark, {"a": "a.tflite"}),
        (ks.tflite.benchmark, None),
    ],
)
def test_one_path_is_expected(function, path):
    with pytest.raises(TypeError, match=f"path of one .tflite file.* Received: path of type {type(path).__name__}"):
        function(path)
