"""The small study, run once for all whole-run tests, and here in a copy that they may change."""

import shutil

import pytest

from pipeline.study import stages_run


@pytest.fixture(scope="session")
def study(finished, tmp_path_factory):
    original, output = finished
    folder = shutil.copytree(original, tmp_path_factory.mktemp("pipeline") / "study", symlinks=True)
    return folder, stages_run(output)
