"""A class of channels is what can only be removed together: labels that have been joined, and why some must stay."""

import numpy as np

__all__ = ["Classes"]


class Classes:
    """Labels, counted from 1, and which of them belong together (a union-find). Label 0 is no channel at all.

    Example:

    >>> from keras_sparse.graph.classes import Classes
    >>> classes = Classes()
    >>> left, right = classes.new(3), classes.new(3)
    >>> classes.join(left, right)
    >>> classes.find(right).tolist()
    [1, 2, 3]
    """

    def __init__(self):
        self._parents = np.zeros(1, "int64")
        self._reasons = []  # (labels, reason)

    def __len__(self):
        return len(self._parents)

    def new(self, count):
        """Return `count` new labels, a vector."""
        start = len(self._parents)
        labels = np.arange(start, start + count)
        self._parents = np.concatenate([self._parents, labels])
        return labels

    def find(self, labels):
        """The representative of each label: equal for those that were joined."""
        found = self._parents[labels]
        while True:
            above = self._parents[found]
            if np.array_equal(above, found):
                return found
            found = above

    def join(self, left, right):
        """Join two arrays of labels that broadcast to each other, element by element; label 0 joins nothing."""
        left, right = np.broadcast_arrays(left, right)
        present = (left != 0) & (right != 0)
        pairs = np.unique(np.stack([self.find(left[present]), self.find(right[present])], axis=-1), axis=0)
        for one, other in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
            low, high = sorted((self._root(one), self._root(other)))
            self._parents[high] = low

    def _root(self, label):
        while self._parents[label] != label:
            label = self._parents[label] = self._parents[self._parents[label]]
        return label

    def join_along(self, labels, axis):
        """Join what an array has at the same index of `axis`, and return one label for each: a vector."""
        rows = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
        highest = rows.max(axis=1)
        self.join(rows, highest[:, None])
        return highest

    def varying(self, labels):
        """The axes along which an array has more than one class."""
        found = self.find(labels)
        return [axis for axis, size in enumerate(found.shape) if size > 1 and (np.ptp(found, axis=axis) > 0).any()]

    def fix(self, labels, reason):
        """Say why the classes of these labels must stay; the first reason counts."""
        self._reasons.append((np.unique(labels), reason))

    def reasons(self):
        """Dict from the representative of each class that must stay to the reason."""
        found = {}
        for labels, reason in self._reasons:
            for root in np.unique(self.find(labels)).tolist():
                if root:
                    found.setdefault(root, reason)
        return found
