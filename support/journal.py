"""What test_view.py has done, picture by picture, in files beside the results: a run that was stopped goes on
after it, and several processes put their shares together.

    journal = Journal("results", key={"sha256": ...})
    journal.begin(fresh=True)
    journal.add(entry, scene.files)
    dict(journal.done())  # {name: Entry}, of all processes and runs of that key
"""

import json
import os
from pathlib import Path

from support import distributed
from support.gallery import Entry
from support.images import CannotWrite

FILES = ".done.*.jsonl"


class Journal:
    """out: the folder of the results. key: what a result depends on but its own picture, as plain values:
    what was done with another checkpoint or other options is not done.
    """

    def __init__(self, out, key):
        self.out = Path(out)
        self.key = json.dumps(key, sort_keys=True)

    def begin(self, fresh):
        """Before `add`, once all processes are here. fresh: without what was done before."""
        if fresh:
            distributed.from_main(self._forget)
        distributed.barrier()  # none writes while others still read
        self.file = self.out / FILES.replace("*", str(distributed.rank()))

    def _forget(self):
        for file in self.out.glob(FILES):
            file.unlink()

    def add(self, entry, sources):
        """A picture of the gallery is done, its files written. Raises CannotWrite."""
        files = {entry.file, *entry.thumbnails.values(), *entry.shown.values()}
        line = {"key": self.key, "entry": entry, "result": _stamps(self.out / file for file in sorted(files))}
        text = json.dumps(line | {"sources": _stamps(sources)}, default=str)
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"\n{text}\n")  # the line before may have been cut off
        except OSError as error:
            raise CannotWrite(f"{self.file}: cannot be written: {error.strerror}") from None

    def done(self):
        """(name, Entry) of each picture whose result is there, and whose files are as they were, in turn: a
        million entries take gigabytes. Of two of one name the last counts.
        """
        for line in self._lines():
            stamps = line["sources"] + line["result"]
            if line["key"] == self.key and stamps == _stamps(path for path, *_ in stamps):
                entry = _entry(*line["entry"])
                yield entry.row["name"], entry

    def last_number(self):
        """The largest number that is taken in the gallery, by what is done or by pictures of other data; 0
        without one.
        """
        data = json.loads(self.key).get("data")
        return max(
            (
                _entry(*line["entry"]).number
                for line in self._lines()
                if line["key"] == self.key or json.loads(line["key"]).get("data") != data
            ),
            default=0,
        )

    def _lines(self):
        for journal in sorted(self.out.glob(FILES)):
            with open(journal, encoding="utf-8") as lines:
                for text in lines:
                    try:
                        yield json.loads(text)
                    except ValueError:  # the run was killed within this line
                        continue


def _stamps(files):
    """[[file, bytes, time of change]], to tell whether one has changed; [] in all but the name where it is
    gone."""
    stamps = []
    for file in files:
        there = os.stat(file) if os.path.exists(file) else None
        stamps.append([str(file), *((there.st_size, there.st_mtime_ns) if there else ())])
    return stamps


def _entry(row, file, size, thumbnails, shown, number):
    paths = ({kind: Path(path) for kind, path in of.items()} for of in (thumbnails, shown))
    return Entry(row, Path(file), tuple(size), *paths, number)
