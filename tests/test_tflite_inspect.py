"""Inspection: its report, and files that are not what they should be."""

import errno
import os
import time
import tracemalloc

import keras
import numpy as np
import pytest
from tflite_models import attention, cnn, conv1d, conv3d, encodings, lstm, mlp, sparsify, transposed

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.job import Job


@pytest.fixture(scope="module")
def files():
    return encodings()


@pytest.mark.parametrize("encoding", ["dense", "sparse"])
def test_report(encoding, files, tmp_path):
    content = files["mlp", True, None][encoding]
    (tmp_path / "m.tflite").write_bytes(content)
    report = ks.tflite.inspect(tmp_path / "m.tflite")
    assert report.totals["bytes"] == len(content) > report.totals["bytes_gzip"] > 1000
    kernels = [row for row in report.rows if len(row["shape"]) == 2]
    assert sorted((row["shape"], row["dtype"]) for row in kernels) == [([64, 96], "float32"), ([96, 64], "float32")]
    for row in kernels:
        assert row["sparsity"] == pytest.approx(0.9, abs=0.001) and row["zeros"] == round(row["sparsity"] * 6144)
        expected = ("dense", "") if encoding == "dense" else ("sparse-block-csr", "1x4")
        assert (row["encoding"], row["block"], row["pattern"]) == (*expected, "block_1x4")
        assert row["bytes"] == 24576 if encoding == "dense" else row["bytes"] < 3500
    assert report.totals["tensors_sparse"] == (0 if encoding == "dense" else 2)
    assert "89.97" in str(report)


@pytest.mark.parametrize("quantize", [None, pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("build", "pattern"),
    [(cnn, "block_1x4"), (cnn, "channel"), (transposed, "2:4"), (conv3d, "block_2x4"), (attention, "block_1x4"),
     (lstm, "2:4"), (conv1d, "unstructured")],
)  # fmt: skip
@pytest.mark.thorough(4)
def test_patterns_are_those_of_the_model(build, pattern, quantize, tmp_path):
    model = build()
    report = ks.prune(model, None if pattern == "2:4" else 0.6, pattern=pattern, filters=".")
    pruned = [row for row in report.rows if row["status"] == "pruned"]
    assert {row["pattern"] for row in pruned} == {pattern}
    dense = convert(Job(model, quantize=quantize)).content
    for encoding, content in {"dense": dense, "sparse": encode(dense).content}.items():
        (tmp_path / "m.tflite").write_bytes(content)
        found = [row for row in ks.tflite.inspect(tmp_path / "m.tflite").rows if row["pattern"]]
        assert [row["pattern"] for row in found] == [pattern] * len(pruned), encoding
        assert sorted(np.prod(row["shape"]) for row in found) == sorted(row["size"] for row in pruned)


def test_dense_kernels_have_no_pattern(tmp_path):
    model = mlp()
    (tmp_path / "m.tflite").write_bytes(convert(Job(model)).content)
    assert not any(row["pattern"] for row in ks.tflite.inspect(tmp_path / "m.tflite").rows)


@pytest.mark.parametrize(("sparsity", "blocks"), [(0.0, False), (0.9, False), (0.7, True)])
def test_quantised_zeros(tmp_path, sparsity, blocks):
    """int8 weights from elsewhere: zero is the zero point, and some weights are rounded to it."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("needs TensorFlow's converter in this process")
    import tensorflow as tf

    from keras_sparse.quiet import quiet

    model = sparsify(mlp(), sparsity, blocks)
    with quiet():
        model.export(tmp_path / "saved", format="tf_saved_model", verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        (tmp_path / "m.tflite").write_bytes(converter.convert())
    rows = [row for row in ks.tflite.inspect(tmp_path / "m.tflite").rows if row["dtype"] == "int8"]
    assert len(rows) == 2 and all(sparsity < row["sparsity"] + 1e-3 < sparsity + 0.02 for row in rows)
    expected = "block_1x4" if blocks else "unstructured" if sparsity else ""
    assert [row["pattern"] for row in rows] == [expected] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"0 bytes in all"),
        (b"TFL", r"3 bytes in all"),
        (b"not a model at all", r"m.tflite' without the mark 'TFL3' at byte 4$"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "m.tflite', an HDF5 file, such as Keras 2 saves: load it"),
        (b"PK\x03\x04" + bytes(99), "m.tflite', a zip archive, such as a .keras file$"),
        (b"\x1c\x00\x00\x00TFL3", "damaged or truncated"),
        (b"\xff\xff\xff\xffTFL3" + bytes(100), "damaged or truncated"),
        (b"\x08\x00\x00\x00TFL3" + bytes(64), "damaged or truncated"),
    ],
)
def test_no_model(content, message, tmp_path):
    (tmp_path / "m.tflite").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ks.tflite.inspect(tmp_path / "m.tflite")
    assert "Received" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.inspect(tmp_path / "none.tflite")
    with pytest.raises(ValueError, match="folder"):
        ks.tflite.inspect(tmp_path)


def damage(content, rng):
    """One seeded mutation: cut, a run of random bytes, single bits, words of large numbers, a part copied elsewhere."""
    data, n = bytearray(content), len(content)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(data[: rng.integers(8, n)])
    if kind == 1:
        start = rng.integers(8, n - 64)
        data[start : start + 64] = rng.bytes(64)
    elif kind == 2:
        for position in rng.integers(8, n, 30):
            data[position] ^= 1 << rng.integers(8)
    elif kind == 3:
        for start in rng.integers(8, n - 4, 3):
            data[start : start + 4] = [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x40"][rng.integers(3)]
    elif kind == 4:
        a, b = rng.integers(8, n - 256, 2)
        data[a : a + 256] = data[b : b + 256]
    else:
        # the tables lie at the end of the file
        for position in rng.integers(max(8, n - 3000), n, 10):
            data[position] = rng.integers(256)
    return bytes(data)


@pytest.mark.parametrize("key", [("mlp", True, None), ("cnn", False, "float16"), ("lstm", False, None)])
def test_damaged_files_raise_quickly_or_read(key, files, tmp_path):
    rng, path = np.random.default_rng(7), tmp_path / "m.tflite"
    refused = 0
    tracemalloc.start()
    for _ in range(60):
        path.write_bytes(damage(files[key]["sparse"], rng))
        start = time.process_time()
        try:
            report = ks.tflite.inspect(path)
        except ValueError as error:
            refused += 1
            assert "Received" in str(error)
        else:
            assert all(row["zeros"] is None or 0 <= row["zeros"] for row in report.rows)
        assert time.process_time() - start < 60
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused >= 15 and peak < 50e6


def test_a_hostile_file_cannot_ask_for_a_large_array(tmp_path):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(4096, use_bias=False)])
    kernel = np.zeros((64, 4096), "float32")
    kernel[:4, 0] = 1.0
    model.layers[0].kernel.assign(kernel)
    content = encode(convert(Job(model)).content).content
    # The same few values in a tensor that claims to be 2 GB.
    large = content.replace(np.int32([4096, 64]).tobytes(), np.int32([1 << 23, 64]).tobytes())
    (tmp_path / "m.tflite").write_bytes(large)
    tracemalloc.start()
    rows = ks.tflite.inspect(tmp_path / "m.tflite").rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row["zeros"], row["pattern"]) for row in rows if len(row["shape"]) == 2] == [((64 << 23) - 4, "")]
    assert peak < 50e6


def test_each_truncation_raises(files, tmp_path):
    content, path = files["mlp", False, None]["sparse"], tmp_path / "m.tflite"
    for size in range(8, len(content) - 16, len(content) // 40):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="damaged or truncated"):
            ks.tflite.inspect(path)


def test_unreadable_file(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "m.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3")
    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(OSError, match="Input/output error"):
        ks.tflite.inspect(os.fspath(tmp_path / "m.tflite"))
