"""Every test runs with the network off (loopback excepted) and on one thread."""

import importlib
import os
import socket
import sys
from types import ModuleType

# Before anything imports torch or the hub's client.
for key, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ[key] = value

import pytest  # noqa: E402
import torch  # noqa: E402
from browser import browser, opened  # noqa: E402, F401
from filelock import FileLock  # noqa: E402

LONGEST = ("tests/real/", "tests/pipeline/", "tests/test_readme.py", "tests/test_coverage.py", "tests/stages/")


def pytest_collection_modifyitems(items):
    """Files that take minutes first, so that no worker is left with one of them at the end, when the others have nothing."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: next((place[name] for name in LONGEST if item.nodeid.startswith(name)), len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def threads():
    """Sets torch's threads, and back to one at the end."""
    yield lambda n: torch.set_num_threads(n)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            pytest.fail(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def stage_module(tmp_path, monkeypatch):
    """The module of a stage by its name, not run, in an empty folder: for a test that calls its functions on what it gives."""

    def load(name: str) -> ModuleType:
        import stages

        monkeypatch.setattr(stages, "stage", lambda main, **_: None)
        monkeypatch.delitem(sys.modules, f"stages.{name}", raising=False)
        module = importlib.import_module(f"stages.{name}")
        monkeypatch.delitem(sys.modules, f"stages.{name}")
        monkeypatch.setattr(module, "STORE", tmp_path / ".refusal-store")
        monkeypatch.setattr(module, "use_transformers", lambda params: None)  # this process keeps the settings of its other tests
        monkeypatch.chdir(tmp_path)
        return module

    return load


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a small study that has run whole, in a Git repository of its own, and what `dvc repro` said. To be copied."""
    from pipeline.study import run, small

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # one for all workers
    folder, said = place / "finished/study", place / "finished/said"
    with FileLock(place / "finished.lock"):
        if not said.exists():
            said.write_text(run(small(folder), "dvc", "repro"))
    return folder, said.read_text()
