"""Exports that fail leave nothing, and say why."""

import errno
import io
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
from exported_files import clean, run, tensorflow_only
from keras import layers
from tflite_models import cnn, mlp

import keras_sparse as ks


@tensorflow_only
@pytest.mark.parametrize("existing", [None, b"old"])
def test_a_mismatch_leaves_nothing(existing, tmp_path):
    class Counting(layers.Layer):
        """Adds how often it was called, so that no two runs agree."""

        calls = 0

        def call(self, x):
            Counting.calls += 1
            return x + float(Counting.calls)

    if existing is not None:
        (tmp_path / "m.tflite").write_bytes(existing)
    inputs = keras.Input((4,))
    with pytest.raises(ks.tflite.ExportError, match=r"does not compute what the model computes.*'output_0' differs"):
        ks.tflite.export(
            keras.Model(inputs, Counting()(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack"
        )
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if existing is None else [existing])


@tensorflow_only
def test_arguments_without_recorded_shape(tmp_path):
    class Weighted(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, a, b):
            return self.dense(a) + b

    model = Weighted()
    model(np.ones((1, 4)), np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"Give the model one argument.*\['a', 'b'\]"):
        ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
def test_an_error_of_a_layer_is_told(tmp_path):
    class Fails(layers.Layer):
        def call(self, x):
            raise ValueError("no graphs here")

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((4,))
    with pytest.raises(ks.tflite.ExportError, match=r"Fails\.call\(\)\. no graphs here"):
        ks.tflite.export(keras.Model(inputs, Fails()(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
def test_unsupported_operator_is_named(tmp_path):
    class Inverse(layers.Layer):
        def call(self, x):
            return keras.ops.erfinv(keras.ops.tanh(x))

    inputs = keras.Input((4,))
    with pytest.raises(ks.tflite.ExportError, match=r"cannot be converted to \.tflite.*Erfinv") as caught:
        ks.tflite.export(
            keras.Model(inputs, Inverse()(layers.Dense(4)(inputs))), tmp_path / "m.tflite", target="xnnpack"
        )
    assert len(str(caught.value)) < 600 and clean(tmp_path)


@tensorflow_only
def test_nan_and_infinity_are_compared(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.log(layers.Dense(4)(inputs)))
    report = ks.tflite.export(model, tmp_path / "m.tflite", target="xnnpack")
    assert np.isfinite(report.parity_relative)


@pytest.mark.parametrize("quantize", ["float8", "", 16, True])
def test_unknown_quantization(quantize, tmp_path):
    with pytest.raises(ValueError, match=r"must be one of None, 'float16', 'dynamic', 'int8', 'int16x8'\. Received"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", quantize=quantize)


@pytest.mark.parametrize("sparse", ["no", 0, None])
def test_sparse_is_a_bool(sparse, tmp_path):
    with pytest.raises(TypeError, match="`sparse` must be True or False. Received: sparse="):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", sparse=sparse)


@tensorflow_only
def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "m.tflite").symlink_to(tmp_path / "there" / "real.tflite")
    ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack")
    assert (tmp_path / "m.tflite").is_symlink() and (tmp_path / "there" / "real.tflite").stat().st_size > 1000


def test_int8_needs_data(tmp_path):
    with pytest.raises(ValueError, match="needs `representative_data`"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int8")
    with pytest.raises(ValueError, match="must fit the model's input 'pixels'"):
        ks.tflite.export(
            mlp(), tmp_path / "m.tflite", target="xnnpack", quantize="int8", representative_data=np.ones((4, 63))
        )


def test_a_table_whose_columns_one_scale_cannot_hold(tmp_path):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 6)) * 10.0 ** np.arange(-2, 4)).astype("float32")
    normalize = layers.Normalization()
    normalize.adapt(x)
    model = keras.Sequential([keras.Input((6,), name="table"), normalize, layers.Dense(4, "tanh"), layers.Dense(1)])
    with pytest.raises(ks.tflite.ExportError, match="'table' reach from 0.0.* share one scale .*Normalization out"):
        ks.tflite.export(model, tmp_path / "m.tflite", quantize="int8", representative_data=x)
    assert list(tmp_path.iterdir()) == []


def test_bad_paths(tmp_path):
    (tmp_path / "folder.tflite").mkdir()
    with pytest.raises(ValueError, match=r"must end in '\.tflite'"):
        ks.tflite.export(mlp(), tmp_path / "m.lite", target="xnnpack")
    for path in (None, 3, b"m.tflite"):
        with pytest.raises(TypeError, match=r"`path` must be a string or a `pathlib.Path`.*Received: path="):
            ks.tflite.export(mlp(), path, target="xnnpack")
    with pytest.raises(ValueError, match="folder of that name"):
        ks.tflite.export(mlp(), tmp_path / "folder.tflite", target="xnnpack")
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        ks.tflite.export(mlp(), tmp_path / "none" / "m.tflite", target="xnnpack")


def test_bad_models(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match="not built"):
        ks.tflite.export(keras.Sequential([layers.Dense(3)]), path, target="xnnpack")
    with pytest.raises(TypeError, match="Received"):
        ks.tflite.export(np.ones(3), path, target="xnnpack")
    built = layers.Dense(3)
    built.build((None, 4))
    with pytest.raises(TypeError, match=r"keras\.Model"):
        ks.tflite.export(built, path, target="xnnpack")
    assert clean(tmp_path)


def test_bad_keras_files(tmp_path):
    (tmp_path / "bad.keras").write_bytes(b"PK\x03\x04 nonsense")
    (tmp_path / "empty.keras").write_bytes(b"")
    for name in ("bad.keras", "empty.keras"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            ks.tflite.export(tmp_path / name, tmp_path / "m.tflite", target="xnnpack")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.export(tmp_path / "none.keras", tmp_path / "m.tflite", target="xnnpack")
    with pytest.raises(ValueError, match=r"path of a \.keras file"):
        ks.tflite.export(tmp_path / "m.h5", tmp_path / "m.tflite", target="xnnpack")


@tensorflow_only
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk(step, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "m.tflite").write_bytes(b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        ks.tflite.export(mlp(), tmp_path / "m.tflite", target="xnnpack")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m.tflite"] and (tmp_path / "m.tflite").read_bytes() == b"old"


def python(code, folder, **environment):
    """Run Python code in a process of its own."""
    root = pathlib.Path(ks.__file__).parents[1]
    path = os.pathsep.join([str(root), str(pathlib.Path(__file__).parent / "support"), str(folder)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_nothing_is_printed_and_other_backends(backend, tmp_path):
    """In one process, because to start Keras on another backend, and TensorFlow beside it, takes longer."""
    code = """
        import os, sys
        saved = os.dup(1), os.dup(2)  # what importing Keras itself prints is not ours
        void = os.open(os.devnull, os.O_WRONLY); os.dup2(void, 1); os.dup2(void, 2)
        import keras
        if keras.config.backend() == "tensorflow":
            import tensorflow
        os.dup2(saved[0], 1); os.dup2(saved[1], 2)
        import numpy as np
        from tflite_models import attention, cnn, lstm, nested, sparsify, subclassed
        import keras_sparse as ks
        print("before")
        for build in (cnn, lstm):
            report = ks.tflite.export(sparsify(build(), 0.9), "m.tflite", target="xnnpack")
            assert report.parity_relative < 1e-5 and report.encoding == "sparse", report
        ks.tflite.inspect("m.tflite"); ks.tflite.benchmark("m.tflite")
        print("after")
        sys.stdout.flush(); os.write(1, b"fd 1\\n"); os.write(2, b"fd 2\\n")
        if keras.config.backend() == "tensorflow":
            sys.exit()

        keras.utils.set_random_seed(2)  # not above: it imports TensorFlow, whatever the backend is
        for build in (attention, nested, subclassed) if keras.config.backend() == "jax" else (subclassed,):
            model = sparsify(build(), 0.9)
            model.compile("adam", "mse")
            report = ks.tflite.export(model, "m.tflite", target="xnnpack")
            assert report.parity_relative < 1e-5 and report.encoding == "sparse", report
        data = np.ones((3, 32))
        report = ks.tflite.export(model, "m.tflite", "xnnpack", quantize="float16", representative_data=data)
        assert report.parity_relative < 1e-2, report

        class Twice(keras.layers.Layer):
            def call(self, x):
                return 2 * x

        @keras.saving.register_keras_serializable("mine")
        class Thrice(Twice):
            pass

        for layer in (Twice(), Thrice()):
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), layer])
            try:
                ks.tflite.export(model, "refused.tflite")
            except ks.tflite.ExportError as error:
                print(error)
    """
    result = python(code, tmp_path, KERAS_BACKEND=backend)
    assert result.stdout.startswith("before\nafter\nfd 1\n")
    assert result.stderr.startswith("fd 2\n")
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["m.tflite"]
    refused = result.stdout.splitlines()[3:]
    assert len(refused) == (0 if backend == "tensorflow" else 2)
    for line, name in zip(refused, ("Twice", "Thrice"), strict=False):
        assert "defined in `__main__`" in line and "Move it to a module" in line and name in line


@pytest.mark.slow
def test_full_disk_for_real(tmp_path):
    code = """
        import keras, resource, signal, keras_sparse as ks
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(512), keras.layers.Dense(512)])
        for limit in (1000, 100_000):  # too little for the SavedModel in the temporary folder, for the file itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                ks.tflite.export(model, "m.tflite", target="xnnpack")
            except OSError as error:
                print("OSError")
    """
    (tmp_path / "tmp").mkdir()
    result = python(code, tmp_path, KERAS_BACKEND="tensorflow", TMPDIR=str(tmp_path / "tmp"))
    assert result.stdout == "OSError\nOSError\n", result.stderr
    assert os.listdir(tmp_path) == ["tmp"] and not list((tmp_path / "tmp").glob("keras_sparse-*"))


@tensorflow_only
def test_streams_are_restored(tmp_path, monkeypatch):
    """Also where Python's streams are not the process's, as in a notebook."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with warnings.catch_warnings(record=True):
        ks.tflite.export(cnn(), tmp_path / "m.tflite", target="xnnpack")
    assert sys.stdout is out and sys.stderr is err
    assert (out.getvalue(), err.getvalue()) == ("", "")


@tensorflow_only
def test_a_batch_size_for_the_file(tmp_path):
    """A model of any batch size; on data that do not fill whole batches, too."""
    report = ks.tflite.export(
        mlp(), tmp_path / "m.tflite", target="xnnpack", batch_size=np.int64(2), representative_data=np.ones((5, 64))
    )
    assert not report.notes or "batch" not in report.notes[0]
    assert run(report.path, pixels=np.ones((2, 64), "float32"))["output_0"].shape == (2, 64)
    for size, message in ((0, "positive integer"), (True, "positive integer"), (2.0, "positive integer")):
        with pytest.raises(ValueError, match=f"{message}. Received: batch_size={size}"):
            ks.tflite.export(mlp(), tmp_path / "n.tflite", target="xnnpack", batch_size=size)
    assert "The file takes 2 samples at a time, no more and no fewer." in report.notes
    with pytest.raises(
        ValueError, match="the most that a tensor holds: they take 25,600,000,000. Received: batch_size="
    ):
        ks.tflite.export(mlp(), tmp_path / "n.tflite", batch_size=10**8)
    inputs = keras.Input((4,), batch_size=5)
    with pytest.raises(ValueError, match="takes batches of 5 samples.*Received: batch_size=1"):
        ks.tflite.export(
            keras.Model(inputs, layers.Dense(2)(inputs)), tmp_path / "n.tflite", target="xnnpack", batch_size=1
        )
    assert os.listdir(tmp_path) == ["m.tflite"]


@tensorflow_only
def test_outputs_that_do_not_depend_on_the_inputs_are_said(tmp_path):
    inputs = keras.Input((4,))
    constant = layers.Dense(3, kernel_initializer="zeros", bias_initializer="ones", name="constant")(inputs)
    report = ks.tflite.export(
        keras.Model(inputs, [constant, layers.Dense(3)(inputs)]), tmp_path / "m.tflite", target="xnnpack"
    )
    noted = [note for note in report.notes if "The comparison says little of output_0:" in note]
    assert len(noted) == 1 and "output_1" not in noted[0] and "representative_data" in noted[0]


def test_strings_are_no_input_of_a_file(tmp_path):
    words = keras.Input((1,), dtype="string", name="city")
    lookup = keras.layers.StringLookup(vocabulary=["Lyon", "Ghent"])
    model = keras.Model(words, keras.layers.Dense(2)(keras.layers.Embedding(3, 4)(lookup(words))))
    for call in (lambda: ks.tflite.export(model, tmp_path / "m.tflite"), lambda: ks.tflite.check(model)):
        with pytest.raises(ks.tflite.ExportError, match="behind its `StringLookup`.*'city' of .*takes strings"):
            call()
    assert not list(tmp_path.iterdir())


@tensorflow_only
def test_channels_that_follow_from_open_sizes(tmp_path):
    """TFLite has convolutions: that it has none is not what a user should read."""
    inputs = keras.Input((None, None, 3))
    x = layers.UpSampling2D(2)(layers.Conv2D(4, 3, strides=2, padding="same")(inputs))
    model = keras.Model(inputs, layers.Conv2D(2, 1)(layers.Concatenate()([inputs, x])))
    with pytest.raises(ks.tflite.ExportError, match="Conv2D.*give `keras.Input` the sizes that it leaves open"):
        ks.tflite.export(model, tmp_path / "m.tflite")
    assert os.listdir(tmp_path) == []
