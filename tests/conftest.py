import pytest

from tests.made import session


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder for a run; its log and signal handlers go when the test ends."""
    monkeypatch.chdir(tmp_path)
    with session():
        yield tmp_path
