"""Keyword spotting: a small convolutional network hears digits, is pruned to 85 %, and runs sparse on the phone.

Log-mel spectrograms of one second with their first and second differences in time are images of three channels, so
that the network fits XNNPACK's sparse kernels: a 3x3 convolution with stride 2, depthwise 3x3 and 1x1 convolutions,
global average pooling. It is trained, then pruned (1x1 convolutions only) and trained on. Accuracies are those of the
last epoch, of the .tflite files as they run, on the official test split (recordings 0 to 4 of each speaker and digit).

`--data` names `fsdd.npz` of the Free Spoken Digit Dataset: `pcm` (int16, 8 kHz, all recordings one after another),
`offset` (where each begins, and the end), `digit` and `index`.
"""

import argparse
import pathlib
import statistics
import tempfile

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from keras import layers

import keras_sparse as ks

SAMPLES, STRIDE, BINS = 8192, 128, 40


def spectrograms(path):
    """Return `(x, y, x_test, y_test)` with x of shape (n, 64, 40, 3), normalized by the training data."""
    with np.load(path) as file:
        offset, pcm, digits, index = (file[name] for name in ("offset", "pcm", "digit", "index"))
    waves = np.zeros((len(digits), SAMPLES), "float32")
    for wave, begin, end in zip(waves, offset[:-1], offset[1:], strict=True):
        heard = pcm[begin:end][:SAMPLES] / 32768
        start = (SAMPLES - len(heard)) // 2
        wave[start : start + len(heard)] = heard
    mel = layers.MelSpectrogram(
        fft_length=256, sequence_stride=STRIDE, sampling_rate=8000, num_mel_bins=BINS, min_freq=20, max_freq=4000
    )
    mels = [keras.ops.convert_to_numpy(mel(waves[i : i + 100])) for i in range(0, len(waves), 100)]
    x = np.concatenate(mels).transpose(0, 2, 1)[:, : SAMPLES // STRIDE]
    first = np.gradient(x, axis=1)
    x = np.stack([x, first, np.gradient(first, axis=1)], axis=-1).astype("float32")
    test = index < 5
    mean, std = x[~test].mean((0, 1, 2)), x[~test].std((0, 1, 2))
    x = (x - mean) / std
    return x[~test], digits[~test], x[test], digits[test]


class Shifted(keras.utils.PyDataset):
    """Batches in a new order each epoch, each recording shifted in time by up to a tenth of a second."""

    def __init__(self, x, y, seed, batch_size=64):
        super().__init__()
        self.x, self.y, self.batch_size, self.rng = x, y, batch_size, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, i):
        chosen = self.order[self.batch_size * i : self.batch_size * (i + 1)]
        shifts = self.rng.integers(-6, 7, len(chosen))
        images = [np.roll(self.x[j], shift, axis=0) for j, shift in zip(chosen, shifts, strict=True)]
        return np.stack(images), self.y[chosen]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.x))


def build():
    """Return the network."""

    def block(filters, strides=1):
        # Keras's "same" pads at stride 2 as XNNPACK's sparse kernels do not: pad by hand.
        padding = [layers.ZeroPadding2D(1)] if strides == 2 else []
        return [
            *padding,
            layers.DepthwiseConv2D(3, strides, "valid" if padding else "same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Conv2D(filters, 1, use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]

    stem = [layers.ZeroPadding2D(1), layers.Conv2D(32, 3, 2, use_bias=False), layers.BatchNormalization(momentum=0.9)]
    body = [*stem, layers.ReLU(), *block(64), *block(128), *block(192, 2), *block(192), *block(192)]
    end = [layers.GlobalAveragePooling2D(), layers.Dropout(0.2), layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((SAMPLES // STRIDE, BINS, 3)), *body, *end])


def fit(model, data, epochs, rate, callbacks=()):
    """Train with Adam and a cosine decay of the learning rate to 0."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(data))
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(data, epochs=epochs, verbose=0, callbacks=list(callbacks))


def pointwise(variable):
    """Whether a variable is the kernel of a 1x1 convolution."""
    return tuple(variable.shape[:2]) == (1, 1) and len(variable.shape) == 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="path of fsdd.npz")
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30, help="of training, and of pruning again")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring the time of each file")
    args = parser.parse_args()
    load, (x, y, x_test, y_test), rows, notes = result.load(), spectrograms(args.data), [], []
    missing = {name: reason for name, reason in ks.tflite.runtimes.available().items() if reason}
    runtimes = [name for name in ("native", "wasm", "arm64") if name not in missing]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = (pathlib.Path(folder) / f"{name}.tflite" for name in ("dense", "sparse"))
        for seed in args.seeds:
            keras.utils.set_random_seed(seed)
            data, model = Shifted(x, y, seed), build()
            fit(model, data, args.epochs, 3e-3)
            ks.tflite.export(model, dense, sparse=False)
            fit(model, data, args.epochs, 2e-3, [ks.callbacks.Pruning(args.sparsity, filters=pointwise, end=0.5)])
            report = ks.tflite.export(model, sparse, target="xnnpack")
            files = {"dense": dense, "sparse": sparse}
            table = ks.compare(files, x_test, y_test, seconds=0)
            ratios = {}
            for name in runtimes:
                timed = ks.tflite.benchmark(sparse, baseline=dense, runtime=name, seconds=args.seconds)
                ratios[name] = timed.rows[1]["ratio"]
            accuracy = [100 * row["accuracy"] for row in table.rows]
            sizes = [path.stat().st_size for path in (sparse, dense)]
            found.append((*accuracy, accuracy[1] - accuracy[0], sizes[0] / sizes[1], *ratios.values()))
            rows.append(
                [
                    str(seed),
                    *(f"{value:.2f} %" for value in accuracy),
                    f"{sizes[0]:,d} / {sizes[1]:,d} = {sizes[0] / sizes[1]:.3f}",
                    *(f"{ratio:.3f}" for ratio in ratios.values()),
                    report.encoding,
                ]
            )
            print(rows[-1], flush=True)
    means = [statistics.mean(values) for values in zip(*found, strict=True)]
    spread = statistics.stdev([values[2] for values in found]) if len(found) > 1 else 0.0
    notes += [f"Means: dense {means[0]:.2f} %, sparse {means[1]:.2f} %, change {means[2]:+.2f} ± {spread:.2f} points."]
    notes += [f"Ratios: {', '.join(f'{n} {m:.3f}' for n, m in zip(('file', *runtimes), means[3:], strict=True))}."]
    notes += [f"Not measured on {name}: {reason}" for name, reason in missing.items()]
    notes += [f"{len(x)} recordings to train with, {len(x_test)} to test with."]
    result.show(
        f"Spoken digits at {args.sparsity:.0%}, {args.epochs} + {args.epochs} epochs",
        ["seed", "dense", "sparse", "bytes", *(f"{name}, ratio" for name in runtimes), "encoding"],
        rows,
        notes,
        load,
    )


if __name__ == "__main__":
    main()
