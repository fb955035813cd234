"""Dicts whose keys are variables."""

import keras
import pytest

from keras_sparse.graph import as_array
from keras_sparse.identity import IdentityDict


def test_keys_are_the_objects_themselves():
    one, other = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    found = IdentityDict([(one, 1)])
    found.setdefault(one, 2)
    found.setdefault(other, 3)
    assert [found[one], found[other], len(found)] == [1, 3, 2]
    assert all(a is b for a, b in zip(found, (one, other), strict=True))
    del found[one]
    assert one not in found and other in found and found.get(one) is None
    assert list(IdentityDict(found).values()) == [3]
    with pytest.raises(KeyError):
        found[one]


def test_keys_live_as_long_as_the_dict():
    found = IdentityDict((keras.Variable(float(i)), i) for i in range(50))
    assert len(found) == 50
    assert all(as_array(key) == value for key, value in found.items())
