"""A calibration finds the range of each activation from samples: whether these are enough, others of them say."""

from dataclasses import replace

import numpy as np

from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.job import CALIBRATED
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.samples import MOST, in_batches_of

__all__ = ["calibrating", "doubts"]

_PART = 4  # one batch in so many is kept back
_FACTOR = 2  # that these may be farther off: the largest of a few errors is now larger, now smaller
_LITTLE = 0.05  # share of an output's magnitude that nobody has to be told of: another runtime may cost as much


def calibrating(samples, signature):
    """Representative data in the batches that calibrate: one sample at a time, where the batch size is open.

    Args:
        samples: List of flat lists of arrays, as `representative_batches` returns them.
        signature: The model's `Signature`.

    Raises:
        ValueError: If all samples are the same number.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.tflite.calibration import calibrating
    >>> from keras_sparse.tflite.signatures import signature
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> [batch[0].shape for batch in calibrating([[np.eye(4)]], signature(model))]
    [(1, 4), (1, 4), (1, 4), (1, 4)]
    """
    if all(np.ptp(np.concatenate(arrays, axis=None).astype("float64")) == 0 for arrays in zip(*samples, strict=True)):
        raise ValueError(
            "`representative_data` must be inputs as the model will meet them, for the range of each activation: pass "
            f"some of the training data. Received: nothing but {float(samples[0][0].flat[0]):g}"
        )
    samples = in_batches_of(signature.inputs[0].shape[0] or 1, samples)
    return [[a.astype(leaf.dtype) for a, leaf in zip(batch, signature.inputs, strict=True)] for batch in samples]


def doubts(job):
    """Say whether a file is likely to be farther off on other inputs than on those that calibrated it.

    Where there are fewer samples than would be used, the job is done again without some of them. If that file is right
    on what it was calibrated with and not on the others, the ranges are not known yet.

    Args:
        job: A `Job`.

    Returns:
        List of sentences for the report: one, or none.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.calibration import doubts
    >>> from keras_sparse.tflite.job import Job
    >>> doubts(Job(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])))
    []
    """
    count = sum(len(batch[0]) if batch[0].ndim else 1 for batch in job.samples)
    if job.quantize not in CALIBRATED or count >= MOST:
        return []
    more = f"Pass more of all kinds that the model will meet as `representative_data`; up to {MOST} are used."
    if len(job.samples) == 1:
        return [f"Calibrated with one batch: how far the file is off on others is not known. {more}"]
    part = min(_PART, len(job.samples))
    kept_back = job.samples[part - 1 :: part]
    used = [batch for number, batch in enumerate(job.samples) if number % part != part - 1]
    content = convert(replace(job, samples=used)).content
    seen, unseen = (
        Reference(job.model, job.signature, batches).compare_on("native", content).relative
        for batches in (used[: len(kept_back)], kept_back)
    )
    if unseen <= max(_FACTOR * seen, _LITTLE):
        return []
    return [
        f"Calibrated with too few samples, {count}: a file that was calibrated without {len(kept_back)} of its "
        f"{len(job.samples)} batches is {unseen:.1%} off on these, and {seen:.1%} on as many others. {more}"
    ]
