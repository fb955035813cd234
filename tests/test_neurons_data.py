"""Neuron sparsity on every form of data, and what it leaves as it was."""

import weakref

import keras
import numpy as np
import pytest
from keras import layers
from measured_models import check, dense, normal, relu, sequential

import keras_sparse as ks

# Data


class Batches(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.x[10 * index : 10 * index + 10], np.zeros(10)


def tf_dataset(x, *rest):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, *rest) if rest else x).batch(8)


def torch_loader(x):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.zeros(len(x)))
    return torch.utils.data.DataLoader(data, batch_size=8)


FORMS = {
    "array": lambda x: x,
    "float64": lambda x: x.astype("float64"),
    "tensor": keras.ops.convert_to_tensor,
    "dataset of x": tf_dataset,
    "dataset of (x, y)": lambda x: tf_dataset(x, np.zeros(30)),
    "dataset of (x, y, w)": lambda x: tf_dataset(x, np.zeros(30), np.ones(30)),
    "DataLoader": torch_loader,
    "PyDataset": Batches,
    "generator of x": lambda x: (x[i : i + 7] for i in range(0, 30, 7)),
    "generator of (x, y)": lambda x: ((x[i : i + 7], x[i : i + 7, :1]) for i in range(0, 30, 7)),
    "list of batches": lambda x: iter([x[:29], x[29:], x[:0]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form):
    model = sequential()
    x = normal(30, 4)
    report = ks.neuron_sparsity(model, FORMS[form](x))
    check(report.rows[0], relu(dense(x, model.layers[0])), 0)
    assert report.totals["samples"] == 30


def test_batches_are_forgotten():
    model = sequential()
    seen, alive = [], []

    def generate():
        for _ in range(20):
            batch = np.ones((4, 4), "float32")
            seen.append(weakref.ref(batch))
            alive.append(sum(ref() is not None for ref in seen))
            yield batch
            del batch

    assert ks.neuron_sparsity(model, generate()).totals["samples"] == 80
    assert max(alive) <= 3


def never_ending():
    return tf_dataset(np.ones((4, 4), "float32")).repeat()


BAD_DATA = {
    "tuple": (lambda: (np.ones((3, 4)),) * 4, ValueError, r"\(x, y, sample_weight\).*tuple of 4"),
    "targets": (lambda: (np.ones((3, 4)), np.ones(2)), ValueError, r"`x` and `y`.*Received: \[2, 3\]"),
    "layer": (lambda: keras.layers.ReLU(), TypeError, "must be an array.*ReLU"),
    "empty": (lambda: np.ones((0, 4)), ValueError, "no samples in `data`.*ndarray"),
    "empty list": (list, ValueError, "no samples in `data`.*list"),
    "empty generator": (lambda: iter(()), ValueError, "no samples in `data`"),
    "endless": (never_ending, ValueError, "never end: pass `data.take"),
    "shape": (lambda: np.ones((3, 5)), ValueError, r"inputs of shape \(None, 4\).*batch of shape \(3, 5\)"),
    "rank": (lambda: np.ones(4), ValueError, r"cannot run on `data`.*batch of shape \(4,\)"),
    "lengths": (lambda: [np.ones((3, 4)), np.ones((2, 4))], ValueError, r"same number of samples. Received: \[2, 3\]"),
    "number": (lambda: 3, TypeError, "must be an array.*Received: 3 of type int"),
    "string": (lambda: "x.npy", TypeError, "must be an array.*Received: 'x.npy' of type str"),
    "numbers": (lambda: [1.0, 2.0], TypeError, "list or dict of arrays.*1.0 of type float"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name):
    make, error, message = BAD_DATA[name]
    model = sequential()
    before = [dict(vars(layer)) for layer in model.layers]
    with pytest.raises(error, match=message):
        ks.neuron_sparsity(model, make())
    assert [set(vars(layer)) for layer in model.layers] == [set(attributes) for attributes in before]


def test_bad_arguments():
    x = np.ones((3, 4), "float32")
    with pytest.raises(ValueError, match="not built"):
        ks.neuron_sparsity(keras.Sequential([layers.Dense(3)]), x)
    with pytest.raises(TypeError, match="Expected a Keras 3 model. Received: 3"):
        ks.neuron_sparsity(3, x)
    for batch_size in (0, 2.5, True):
        with pytest.raises(ValueError, match="`batch_size` must be a whole number"):
            ks.neuron_sparsity(sequential(), x, batch_size=batch_size)


def test_no_units_is_no_error():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    report = ks.neuron_sparsity(model, np.ones((3, 4)))
    assert report.rows == [] and report.totals["neuron_sparsity"] is None
    assert "no hidden layer" in str(report)


# What is left alone


class Failing(layers.Layer):
    def call(self, x):
        raise RuntimeError("broken on purpose")


def test_state_is_left_as_it_was():
    inputs = keras.Input((5, 4), batch_size=8)
    x = layers.Dropout(0.5, seed=1)(inputs, training=True)  # Always on: it draws from its seed.
    model = keras.Model(inputs, layers.BatchNormalization()(layers.LSTM(3, stateful=True)(x)))
    x = normal(16, 5, 4)
    model.predict(x, batch_size=8, verbose=0)  # The recurrent state is not zero.
    values = [np.array(ks.selection.as_array(v)) for v in model.variables]
    assert ks.neuron_sparsity(model, x, batch_size=8).totals["samples"] == 16
    for variable, value in zip(model.variables, values, strict=True):
        np.testing.assert_array_equal(ks.selection.as_array(variable), value)


@pytest.mark.lengthy(0)
def test_training_goes_on_as_if_nothing_had_been():
    x, y = normal(16, 4), normal(16, 2)
    results = []
    for measure in (False, True):
        keras.utils.set_random_seed(1)
        model = sequential()
        model.compile("adam", "mse")
        model.fit(x, y, batch_size=8, verbose=0)
        functions = model.train_function, model.test_function, model.predict_function
        if measure:
            ks.neuron_sparsity(model, x)
        assert functions == (model.train_function, model.test_function, model.predict_function)
        assert not any("call" in vars(layer) for layer in (model, *model.layers))
        model.fit(x, y, batch_size=8, verbose=0)
        results.append(model.get_weights())
    for with_, without in zip(*results, strict=True):
        np.testing.assert_array_equal(with_, without)


def test_calls_are_put_back_after_an_error():
    model = keras.Sequential([layers.Dense(3), Failing()])
    model.layers[0].build((None, 4))
    model.built = True
    own = model.layers[0].call
    vars(model.layers[0])["call"] = own  # Someone else's.
    with pytest.raises(RuntimeError, match="broken on purpose"):
        ks.neuron_sparsity(model, np.ones((2, 4)))
    assert vars(model.layers[0])["call"] is own
    assert "call" not in vars(model.layers[1])


class NeedsNumbers(layers.Layer):
    """Looks at numbers, which a compiled function does not have."""

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return x if keras.ops.convert_to_numpy(x).shape == (3, 2) else None


def test_a_model_that_runs_eagerly():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, "relu"), NeedsNumbers()])
    model.compile("sgd", "mse", run_eagerly=True)
    assert ks.neuron_sparsity(model, np.ones((3, 4))).totals["units"] == 2
