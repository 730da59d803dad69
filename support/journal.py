"""What test_view.py has done, picture by picture, in files beside the results: so a run that was stopped can
go on from there, and several processes can put their shares together.

    journal = Journal("results", key={"sha256": ...})
    journal.lock()
    journal.begin(fresh=True)
    journal.add(entry, scene.files)
    dict(journal.done({name: scene.files}))  # {name: Entry}, of all processes and runs of that key
"""

import json
import os
import uuid
from contextlib import contextmanager
from pathlib import Path

from support import distributed
from support.errors import UserError
from support.gallery import Entry
from support.images import CannotWrite
from support.lock import lock_folder

FILES = ".done.*.jsonl"
LOCK = ".done.lock"
# What is raised by a line that a kill has cut off or a power cut has spoilt, or that is of no picture.
_NO_PICTURE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Journal:
    """out: the folder of the results. key: plain values on which a result depends, besides its own picture.
    What was done with another key, as with another checkpoint or other options, does not count as done.
    """

    def __init__(self, out, key):
        self.out = Path(out)
        self.key = json.dumps(key, sort_keys=True)
        self.run = distributed.agree(uuid.uuid4().hex)

    def is_there(self):
        """Whether the results of some run lie in the folder."""
        return any(file.stat().st_size for file in self.out.glob(FILES))

    def lock(self):
        """Keep other runs from the folder of the results: UserError where there is one."""
        distributed.from_main(self._lock)

    def _lock(self):
        self.out.mkdir(parents=True, exist_ok=True)
        self.handle = lock_folder(self.out, LOCK, "--result_path", self)

    def unlock(self):
        """Let others in again; a folder with no result in it is removed."""
        self.handle.close()
        if os.listdir(self.out) == [LOCK]:
            (self.out / LOCK).unlink()
            self.out.rmdir()

    def begin(self, fresh):
        """To be called before `add`; waits for all processes. fresh: what was done before is forgotten.

        Raises UserError where a journal cannot be removed for that, as another user's.
        """
        self.file = self.out / FILES.replace("*", str(distributed.rank()))
        if fresh:
            distributed.from_main(self._forget)
        distributed.barrier()  # none writes while others still read

    def _forget(self):
        """Forget all but that there were results, which may be replaced."""
        was_there = self.is_there()
        for file in self.out.glob(FILES):
            with _told(file, "removed", UserError):
                file.unlink()
        if was_there:
            self._write({"earlier": True})

    def add(self, entry, sources):
        """A picture of the gallery is done, its files written. Raises CannotWrite."""
        line = {"key": self.key, "run": self.run, "entry": entry}
        line |= {"result": self._results(entry), "sources": _sources(sources)}
        self._write(line)

    def add_video(self, name):
        """A video is done: all that is noted is that the folder holds results. Raises CannotWrite."""
        self._write({"video": name})

    def _write(self, line):
        text = json.dumps(line, default=str)
        with _told(self.file, "written", CannotWrite), open(self.file, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")  # the line before may have been cut off

    def done(self, sources):
        """Yield (name, Entry) of each picture that this run has done, and of each that an earlier one has, if
        its results and the files it came from have not changed. One by one, since a million entries take
        gigabytes; of two of one name the last counts. sources: {name: its files}; a result of other files, as
        from before there was a ground truth, does not count as done.
        """
        for line in self._lines():
            entry, name = line["entry"], line["name"]
            if line["key"] != self.key or name not in sources:
                continue
            stamps = line.get("sources"), line.get("result")
            if line.get("run") == self.run or stamps == (_sources(sources[name]), self._results(entry)):
                yield name, entry

    def _results(self, entry):
        """The stamps of what was written of a picture, by names that still hold when the folder has moved."""
        return _stamps(self.out, sorted({entry.file, *entry.thumbnails.values(), *entry.shown.values()}))

    def has_others(self):
        """Whether pictures were done of other data, with another network or other options."""
        return any(line["key"] != self.key for line in self._lines())

    def of_other_data(self):
        """{result: data} of what was done of other data than this run's; results as paths in the folder."""
        own, others = _data(self.key), {}
        for line in self._lines():
            if line["data"] == own:
                others.pop(line["entry"].file, None)  # written anew since then
            else:
                others[line["entry"].file] = line["data"]
        return others

    def last_number(self):
        """The largest number that is taken in the gallery, by what is done or by pictures of other data; 0
        without one.
        """
        own = _data(self.key)
        taken = (line for line in self._lines() if line["key"] == self.key or line["data"] != own)
        return max((line["entry"].number for line in taken), default=0)

    def _lines(self):
        """What the journals tell of pictures."""
        for journal in sorted(self.out.glob(FILES)):
            with _told(journal, "read", UserError), open(journal, "rb") as lines:
                for text in lines:
                    try:
                        line = json.loads(text)
                        line |= {"name": line["entry"][0]["name"], "entry": _entry(*line["entry"])}
                        line["data"] = _data(line["key"])
                    except _NO_PICTURE:
                        continue
                    yield line


def _data(key):
    """The data that a key of a journal is of."""
    return json.loads(key).get("data")


@contextmanager
def _told(file, what, kind):
    """Turns an OSError, such as on another user's file, into an exception of that kind, in one line."""
    try:
        yield
    except OSError as error:
        line = f"{file}: cannot be {what}: {error.strerror}; give another --result_path"
        raise kind(line) from error


def _stamps(folder, files):
    """[[file, bytes, time of change]], to tell whether one has changed; the name alone where it is gone."""
    stamps = []
    for file in files:
        path = os.path.join(folder, file)
        there = os.stat(path) if os.path.exists(path) else None
        stamps.append([str(file), *((there.st_size, there.st_mtime_ns) if there else ())])
    return stamps


def _sources(files):
    """The stamps of what a picture came of, by names that hold from any working folder."""
    return _stamps("", map(os.path.abspath, files))


def _entry(row, file, size, thumbnails, shown, number):
    paths = ({kind: Path(path) for kind, path in of.items()} for of in (thumbnails, shown))
    return Entry(row, Path(file), tuple(size), *paths, int(number))
