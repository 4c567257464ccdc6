"""A disk that fills up."""

import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest


class Disk:
    """A file system in memory, of as many kilobytes as it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def __enter__(self) -> Self:
        self._mount("size=64m")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def _mount(self, options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", self.folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system can be mounted by root alone: {done.stderr.strip()}")

    def resize(self, kilobytes: int = 65536) -> None:
        self._mount(f"remount,size={kilobytes}k")

    def leave(self, kilobytes: int) -> None:
        """Room for so much besides what is there."""
        self.resize(shutil.disk_usage(self.folder).used // 1024 + kilobytes)
