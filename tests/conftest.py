import errno
import os
from pathlib import Path

import pytest

from tests.made import session


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder for a run; its log and signal handlers go when the test ends."""
    monkeypatch.chdir(tmp_path)
    with session():
        yield tmp_path


@pytest.fixture
def closed(monkeypatch):
    """Folders called `closed`, and the disk's own `lost+found`, cannot be read."""
    scandir = os.scandir

    def refused(path):
        if Path(path).name in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
