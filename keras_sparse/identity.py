"""A dict by identity: its keys are objects themselves, such as variables, which compare element by element."""

from collections.abc import MutableMapping

__all__ = ["IdentityDict"]


class IdentityDict(MutableMapping):
    """A dict whose keys are told apart by `is`, and kept alive.

    Args:
        items: Pairs of a key and its value, or a mapping that has `items`.

    Example:

    >>> import keras
    >>> from keras_sparse.identity import IdentityDict
    >>> one, other = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    >>> found = IdentityDict([(one, "a")])
    >>> found[one], other in found, found.get(other, "none")
    ('a', False, 'none')
    """

    def __init__(self, items=()):
        self._items = {}
        for key, value in items.items() if hasattr(items, "items") else items:
            self[key] = value

    @classmethod
    def fromkeys(cls, keys, value=None):
        """A dict of the same value for all keys; as a set of objects, in order."""
        return cls((key, value) for key in keys)

    def __getitem__(self, key):
        try:
            return self._items[id(key)][1]
        except KeyError:
            raise KeyError(key) from None

    def __setitem__(self, key, value):
        self._items[id(key)] = key, value

    def __delitem__(self, key):
        del self._items[id(key)]

    def __contains__(self, key):
        return id(key) in self._items

    def __iter__(self):
        return (key for key, _ in self._items.values())

    def __len__(self):
        return len(self._items)
