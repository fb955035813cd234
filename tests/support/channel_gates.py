"""Models with gates on channels, some of them closed, and what must hold then.

Run as a program it tries many: `python tests/support/channel_gates.py 0 100`.
"""

import sys

import channel_graphs
import numpy as np

import keras_sparse as ks
from keras_sparse.graph import as_array


def close(gated, rng, share=0.5):
    """Close a share of the gates, and let the others be somewhere between; return which are closed."""
    (layer,) = ks.layers.gated_layers(gated)
    (log_alpha,) = layer.log_alphas
    closed = rng.random(log_alpha.shape) < share
    log_alpha.assign(np.where(closed, -4.6, rng.uniform(-2, 4.6, log_alpha.shape)))
    return closed


def leftovers(model, gated, baked):
    """Of how many channels with closed gates, and how many that stay all the same, but for the last of a layer."""
    (layer,) = ks.layers.gated_layers(gated)
    (gates,) = (as_array(layer.gate.expected_gate(x)) for x in layer.log_alphas)
    channels = ks.graph.Channels(baked)
    parts = {id(part.variable): part for _, part in channels.parts()}
    closed, stay = set(), set()
    for place in ks.layers.places.find_places(model, ks.selection.select(model).chosen)[0]:
        labels = parts[id(baked.weights[place.weight])].axes[place.axis]
        for number, label in zip(place.numbers, channels.roots[labels].tolist(), strict=True):
            if number and gates[number - 1] == 0:
                closed.add(label)
                if channels.kept(label) and "the last channel" not in channels.reasons.get(label, ""):
                    stay.add(label)
    return len(closed), len(stay)


def check_gated(model, x, seed):
    """Close gates, bake and shrink, and check that nothing is lost and nothing left; return how many were closed."""
    rng = np.random.default_rng(seed)
    gated = ks.add_l0(model, 1e-3, "channel", open_probability=1 - 1e-6)
    assert channel_graphs.difference(model, gated, x) < 1e-6
    close(gated, rng)
    baked = ks.bake(gated)
    assert channel_graphs.difference(gated, baked, x) < 1e-5
    closed, stay = leftovers(model, gated, baked)
    assert stay == 0
    small = ks.shrink(baked, verbose=0)
    assert channel_graphs.difference(baked, small, x) < 1e-5
    return closed


if __name__ == "__main__":
    total, refused = 0, 0
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            total += check_gated(*channel_graphs.graph_of(number, 4), number)
        except Exception as error:
            import traceback

            if "No channel can leave" in str(error):
                refused += 1
                continue
            print(number, type(error).__name__, str(error)[:300], traceback.format_exc().splitlines()[-4:-1])
    print(total, "closed", refused, "refused")
