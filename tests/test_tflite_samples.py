"""Samples: inputs as a model will meet them, in every form that people have them in, and what is wrong with some."""

import keras
import numpy as np
import pytest
from keras import layers
from tflite_models import mlp, nested, several

from keras_sparse.tflite.samples import in_batches_of, representative_batches
from keras_sparse.tflite.signatures import signature

IMAGE, AGE = np.ones((5, 8, 8, 1)), np.zeros((5, 1))


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": IMAGE, "age": AGE}, np.zeros(5)


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(({"image": IMAGE, "age": AGE}, np.zeros(5))).batch(2)


@pytest.mark.parametrize(
    "data",
    [
        {"image": IMAGE, "age": AGE},
        ({"image": IMAGE, "age": AGE}, np.zeros(5)),
        [AGE, IMAGE],  # in the order of the flattened structure: by key
        [{"image": IMAGE, "age": AGE}],
        [[AGE, IMAGE], [AGE, IMAGE]],
        lambda: ([AGE[:1], IMAGE[:1]] for _ in range(3)),
        Batches(workers=1),
        pytest.param(dataset, id="tf.data"),
    ],
)
def test_representative_data_of_several_inputs(data):
    data = dataset() if data is dataset else data
    batches = representative_batches(data, signature(several()))
    assert len(batches) >= 1
    for age, image in batches:
        assert age.shape == (len(image), 1) and image.shape[1:] == (8, 8, 1) and (image == 1).all()


@pytest.mark.parametrize(
    "data",
    [
        np.ones((5, 64)),
        [np.ones((5, 64))],
        (np.ones((5, 64)), np.zeros(5)),
        [np.ones(64) for _ in range(5)],
        [[np.ones(64)] for _ in range(5)],
        (np.ones((1, 64)) for _ in range(5)),
        [(np.ones((5, 64)), np.zeros(5))],
    ],
)
def test_representative_data_of_one_input(data):
    batches = representative_batches(data, signature(mlp()))
    assert sum(len(batch[0]) for batch in batches) == 5
    assert all(batch[0].shape[1:] == (64,) for batch in batches)
    assert [len(batch[0]) for batch in in_batches_of(1, batches)] == [1] * 5


def test_endless_generator():
    def endless():
        while True:
            yield np.ones((50, 64))

    assert sum(len(batch[0]) for batch in representative_batches(endless(), signature(mlp()))) == 128


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones((5, 63)), r"must fit the model's input 'pixels' of shape \(None, 64\)"),
        ([], "at least one sample"),
        (iter(()), "at least one sample"),
        (np.ones((0, 64)), "at least one sample"),
        ([(np.ones((2, 64)),) * 5], "must hold 1 arrays"),
        (7, "must be an array"),
        (np.where(np.eye(64) == 1, np.nan, 0.0), "must be finite.*64 such numbers for the input 'pixels'"),
        (np.full((2, 64), -np.inf), "must be finite"),
        (np.ones((2, 64), "complex64"), "real numbers.*complex64"),
        (np.full((2, 64), "a"), "real numbers.*<U1"),
        ([np.full((2, 64), None)], "real numbers.*object"),
    ],
)
def test_bad_representative_data(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        representative_batches(data, signature(mlp()))
    assert "Received" in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "values", "said"),
    [("uint8", [0.0, 0.25], "0.25"), ("uint8", [7, 256], "256"), ("int8", [7, 200], "200"), ("bool", [0, 2], "2"),
     ("int32", [2.0**40, 1.0], "1.09951e.12"), ("float32", [1.0, 1e300], "1e.300")],
)  # fmt: skip
def test_numbers_that_the_type_does_not_hold(dtype, values, said):
    called = signature(keras.Sequential([keras.Input((2,), dtype=dtype, name="x"), layers.Rescaling(1 / 255)]))
    with pytest.raises(ValueError, match=rf"numbers of the type {dtype} for the input 'x'.*with {said}$"):
        representative_batches(np.array([values]), called)
    assert representative_batches(np.array([[0.0, 1.0]]), called)[0][0].shape == (1, 2)  # whole numbers are


def test_tensors_of_torch_that_want_a_gradient():
    torch = pytest.importorskip("torch")
    called = signature(keras.Sequential([keras.Input((2,)), layers.Dense(3)]))
    [[found]] = representative_batches(torch.ones((5, 2), requires_grad=True), called)
    np.testing.assert_array_equal(found, np.ones((5, 2)))


@pytest.mark.parametrize(
    "data",
    [
        [np.ones((5, 64)), np.zeros(5)],
        [np.ones((5, 64)), np.zeros((5, 3))],
        [np.ones((5, 64)), np.zeros((5, 3)), np.ones(5)],
    ],
)
def test_targets_in_a_list(data):
    with pytest.raises(ValueError, match=rf"as a tuple, `\(x, y\)`. Received: a list of {len(data)} .*fit the model's"):
        representative_batches(data, signature(mlp()))
    assert sum(len(batch[0]) for batch in representative_batches(tuple(data), signature(mlp()))) == 5


def test_differing_batch_sizes():
    with pytest.raises(ValueError, match="same batch size"):
        representative_batches({"image": IMAGE, "age": AGE[:2]}, signature(several()))


@pytest.mark.parametrize("keys", [("image", "ages"), ("imag", "age"), ("x", "y")])
def test_misspelled_names_are_refused(keys):
    data = dict(zip(keys, (IMAGE, AGE), strict=True))
    with pytest.raises(ValueError, match=r"names as keys: \['age', 'image'\]. Received: \['.*'\]") as caught:
        representative_batches(data, signature(several()))
    assert all(key in str(caught.value) for key in keys)
    with pytest.raises(ValueError, match="names as keys"):
        representative_batches([(data, np.zeros(5))], signature(several()))


def test_keys_of_the_models_structure():
    """Dicts within are taken as they stand; with one input there is nothing to mistake."""
    a, b, c = (np.full((2, 16), n) for n in (1.0, 2.0, 3.0))
    (batch,) = representative_batches([[a, (b, {"c": c})]], signature(nested()))
    assert [array[0, 0] for array in batch] == [1, 2, 3]
    assert len(representative_batches({"any": np.ones((5, 64))}, signature(mlp()))) == 1


def test_columns_of_a_table_are_representative_data():
    """Arrays without the last axis of 1, which Keras adds to them wherever else they are data."""
    model = keras.Model(
        inputs := {name: keras.Input((1,), name=name) for name in ("area", "rooms")},
        layers.Dense(2)(layers.Concatenate()(list(inputs.values()))),
    )
    columns = {name: np.arange(5.0) + i for i, name in enumerate(inputs)}
    for data in (columns, (columns, np.zeros(5)), list(columns.values()), iter([columns])):
        [batch] = representative_batches(data, signature(model))
        for found, name in zip(batch, inputs, strict=True):
            np.testing.assert_array_equal(found, columns[name][:, None])
    image = signature(keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten()]))
    assert [b[0].shape for b in representative_batches(np.ones((7, 4, 4)), image)] == [(7, 4, 4, 1)]
    assert [b[0].shape for b in representative_batches(np.ones((4, 4, 1)), image)] == [(1, 4, 4, 1)]
    with pytest.raises(ValueError, match=r"Received: an array of shape \(7, 3, 4\)"):
        representative_batches(np.ones((7, 3, 4)), image)
