"""The small study, run once for all whole-run tests."""

import pytest

from pipeline.study import copy, run, small, stages_run


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    folder = small(copy(tmp_path_factory.mktemp("study")))
    output = run(folder, "dvc", "repro")
    return folder, stages_run(output)
