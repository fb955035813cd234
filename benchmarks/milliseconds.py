"""How far the time that `ks.Budget(milliseconds=...)` promises is from the time that is measured, on three networks.

    python benchmarks/milliseconds.py [cnn resnet8 mobilenet]

Weights are random: time does not depend on them. Each network is pruned to two shares of its time. The measured time is
that of the removed model's file, run in turns with the dense one.
"""

import sys
import time

import keras

import keras_sparse as ks
from keras_sparse.tflite.benchmark import in_turns
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.runtimes import Worker

L = keras.layers


def cnn():
    x = keras.Input((32, 32, 3))
    y = x
    for filters in (32, 64, 128):
        y = L.MaxPooling2D()(L.Conv2D(filters, 3, padding="same", activation="relu")(y))
    return keras.Model(x, L.Dense(10)(L.Dense(128, "relu")(L.Flatten()(y))))


def resnet8():
    def conv(x, filters, size=3, strides=1):
        return L.BatchNormalization()(L.Conv2D(filters, size, strides, padding="same", use_bias=False)(x))

    x = keras.Input((32, 32, 3))
    y = L.ReLU()(conv(x, 16))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        z = conv(L.ReLU()(conv(y, filters, strides=strides)), filters)
        y = L.ReLU()(L.Add()([z, y if strides == 1 else conv(y, filters, 1, strides)]))
    return keras.Model(x, L.Dense(10)(L.GlobalAveragePooling2D()(y)))


def mobilenet():
    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=10)


def main():
    names = sys.argv[1:] or ["cnn", "resnet8", "mobilenet"]
    print("network    dense ms  asked ms  promised  measured  off by  seconds")
    for name in names:
        keras.utils.set_random_seed(0)
        model = {"cnn": cnn, "resnet8": resnet8, "mobilenet": mobilenet}[name]()
        weights, whole = model.get_weights(), dense(model)
        for share in (0.7, 0.45):
            model.set_weights(weights)
            start = time.perf_counter()
            budget = ks.Budget(milliseconds=share * whole, round_to=8)
            totals = ks.prune(model, budget, pattern="channel", allocation="global").totals
            asked, promised, measured = (totals[f"milliseconds_{k}"] for k in ("asked", "promised", "measured"))
            off, seconds = measured / promised - 1, time.perf_counter() - start
            row = f"{whole:8.3f}  {asked:8.3f}  {promised:8.3f}  {measured:8.3f}  {off:+6.1%}  {seconds:7.0f}"
            print(f"{name:10} {row}", flush=True)


def dense(model):
    """Milliseconds of the model as it is, the shortest round."""
    with Worker(convert(model).content) as worker:
        worker.feed()
        (times,) = in_turns([worker.time], 0.5)
    return 1e3 * float(times.min())


if __name__ == "__main__":
    main()
