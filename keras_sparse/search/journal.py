"""A journal is a file that remembers evaluations line by line, so that a search that was killed goes on."""

import json
import os
import pathlib

import numpy as np

from keras_sparse import files

__all__ = ["Journal"]


class Journal:
    """Evaluations on disk: a line of JSON each, after a line that says which search they belong to.

    Args:
        path: The file; `None` remembers nothing beyond this process.
        header: Plain data that tells this search from others.

    Raises:
        ValueError: If the file belongs to another search or is damaged before its last line.

    Attributes:
        entries: `{number: entry}` of what was there.

    Example:

    >>> import os, tempfile
    >>> from keras_sparse.search.journal import Journal
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "journal.jsonl")
    ...     Journal(path, {"seed": 0}).write(0, {"point": [2], "values": {"loss": 1.5}})
    ...     Journal(path, {"seed": 0}).entries
    {0: {'point': [2], 'values': {'loss': 1.5}}}
    """

    def __init__(self, path, header):
        self.entries, self._path = {}, None if path is None else pathlib.Path(path)
        if self._path is None:
            return
        header = json.loads(json.dumps(header, default=lambda value: np.asarray(value).tolist()))
        # Each line ends with a newline: what comes behind the last one was being written when the search was killed.
        whole, _, unfinished = (self._path.read_bytes() if self._path.exists() else b"").rpartition(b"\n")
        if not whole:
            self._rewrite([json.dumps(header)])
            return
        try:
            lines = whole.decode("utf-8").split("\n")
            found = [json.loads(line) for line in lines]
            entries = {entry["number"]: {key: entry[key] for key in ("point", "values")} for entry in found[1:]}
            if not isinstance(found[0], dict) or not all(isinstance(e["values"], dict) for e in entries.values()):
                raise ValueError("these are no entries")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"The journal is damaged: remove it to begin anew. Received: {str(self._path)!r}"
            ) from error
        if found[0] != header:
            different = sorted(key for key in {*header, *found[0]} if header.get(key) != found[0].get(key))
            raise ValueError(
                "The journal is of another search: use another `directory`, or remove it to begin anew. "
                f"Received: {str(self._path)!r}, which differs in {different}"
            )
        self.entries = entries
        if unfinished:
            self._rewrite(lines)

    def _rewrite(self, lines):
        with files.replacing(self._path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def write(self, number, entry):
        """Remember an evaluation, a dict of its `point` and `values`; it is on disk when this returns."""
        self.entries[number] = entry
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"number": number} | entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
