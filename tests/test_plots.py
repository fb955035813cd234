"""Pictures of networks and of fits: what is drawn is what the network and the fit have."""

import math

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks

pytest.importorskip("matplotlib")


def network(name="net"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, name="wide")(inputs)
    x = layers.SeparableConv2D(8, 3, name="apart")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x)), name=name)


def bars(axes):
    """`{label: (height of the frame, height of what is alive, colour)}` of one picture."""
    pairs = zip(axes.containers[::2], axes.containers[1::2], strict=True)
    return {a.get_label(): (a[0].get_height(), b[0].get_height(), b[0].get_facecolor()) for a, b in pairs}


def test_heights_are_outputs_and_colours_are_zeros():
    model = network()
    kernel = keras.ops.convert_to_numpy(model.get_layer("wide").kernel)
    kernel[..., :4] = 0
    model.get_layer("wide").kernel.assign(kernel)
    figure = ks.plot_network(model)
    drawn = bars(figure.axes[0])
    expected = {
        "wide/kernel: 16 outputs, 25.0% zeros": (16, 12, 0.25),
        "apart/depthwise_kernel: 16 outputs, 0.0% zeros": (16, 16, 0.0),
        "apart/pointwise_kernel: 8 outputs, 0.0% zeros": (8, 8, 0.0),
        "head/kernel: 4 outputs, 0.0% zeros": (4, 4, 0.0),
    }
    assert list(drawn) == list(expected)
    scale = figure.axes[0].figure.axes[-1]._colorbar.mappable
    for label, (outputs, alive, zeros) in expected.items():
        frame, filled, color = drawn[label]
        assert frame == pytest.approx(math.sqrt(outputs)) and filled == pytest.approx(frame * alive / outputs)
        assert color == scale.to_rgba(zeros)
    assert [text.get_text() for text in figure.axes[0].texts] == ["16", "16", "8", "4"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["wide", "apart", "apart, 2", "head"]


def test_layers_keep_their_place_before_and_after():
    model = network()
    ks.prune(model, 0.5, pattern="channel", filters="wide|apart")
    small = ks.shrink(model, verbose=0)
    figure = ks.plot_network(model, small, network("other"))
    before, after, other = figure.axes[:3]
    assert (
        [p.get_x() for p in before.patches] == [p.get_x() for p in after.patches] == [p.get_x() for p in other.patches]
    )
    assert max(p.get_height() for p in after.patches) < max(p.get_height() for p in before.patches)
    assert before.get_ylim() == after.get_ylim() == other.get_ylim()
    assert before.get_title(loc="left").startswith("net: ") and other.get_title(loc="left").startswith("other: ")
    assert f"{small.count_params():,} parameters, 0%" in after.get_title(loc="left")
    width, _ = figure.get_size_inches() * figure.dpi
    assert width <= 800


def test_a_network_of_many_layers_has_room_for_its_names():
    inputs = x = keras.Input((4,))
    for number in range(90):
        x = layers.Dense(4, name=f"layer_{number}")(x)
    figure = ks.plot_network(keras.Model(inputs, x))
    assert len(figure.axes[0].patches) == 180 and 20 < len(figure.axes[0].get_xticks()) <= 40


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((), {}, ValueError, "at least one model"),
        ((keras.Sequential([keras.Input((2,)), layers.ReLU()], name="bare"),), {}, ValueError, "'bare' has no weights"),
        ((keras.Sequential([keras.Input((2,)), layers.PReLU()], name="flat"),), {}, ValueError, "has no kernels"),
        ((keras.Sequential([layers.Dense(2)]),), {}, ValueError, "not built"),
        (("model",), {}, TypeError, "Received"),
        ((network(), network()), {"titles": ["one"]}, ValueError, "each of the 2 models"),
        ((network(),), {"titles": "x"}, ValueError, "each of the 1 models"),
    ],
)
def test_what_cannot_be_drawn(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        ks.plot_network(*arguments, **keywords)


def test_history_of_a_fit():
    model = network()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = np.random.default_rng(0).random((32, 8, 8, 3), "float32"), np.arange(32) % 4
    pruning = ks.callbacks.Pruning(0.5)
    history = model.fit(x, y, epochs=3, validation_data=(x, y), verbose=0, callbacks=[pruning])
    left, right = ks.plot_history(history).axes
    assert left.get_ylabel() == "val_accuracy" and right.get_ylabel().startswith("sparsity")
    assert left.lines[0].get_ydata().tolist() == history.history["val_accuracy"]
    assert right.lines[0].get_ydata().tolist() == history.history["sparsity"]
    assert left.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert ks.plot_history(history.history, "loss").axes[0].get_ylabel() == "loss"


@pytest.mark.parametrize(
    ("values", "name", "count"),
    [
        ({"loss": [1.0], "val_loss": [2.0]}, "loss", 1),
        ({"loss": [1.0], "auc": [0.5], "learning_rate": [0.1]}, "auc", 1),
        ({"loss": [1.0], "learning_rate": [0.1], "val_auc": [0.5], "sparsity": [0.1]}, "val_auc", 2),
    ],
)
def test_which_metric_is_drawn(values, name, count):
    axes = ks.plot_history(values).axes
    assert axes[0].get_ylabel() == name and len(axes) == count


@pytest.mark.parametrize(
    ("values", "metric", "error", "message"),
    [
        ({}, None, ValueError, "none"),
        ({"loss": []}, None, ValueError, "none"),
        ({"sparsity": [0.1]}, None, ValueError, "none"),
        ({"loss": [1.0]}, "accuracy", ValueError, "loss. Received: metric='accuracy'"),
        ([1.0], None, TypeError, "dict"),
    ],
)
def test_no_history_to_draw(values, metric, error, message):
    with pytest.raises(error, match=message):
        ks.plot_history(values, metric)
