"""The run that another takes the place of: deleted once the new one stands, put back if that never does."""

from __future__ import annotations

import shutil
from pathlib import Path

STAYS = "engine*.log"  # of a start that failed: why


class ReplacedRun:
    """What lay in a run's directory, moved into a folder in it. Each step is safe to be killed in, and is ended later.

    ``.moving`` holds what is on its way in or out: all beside it is of the same run. ``.replaced`` holds a run
    whole, and what lies beside it is its successor's. What is in ``.deleted`` is nobody's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._moving, self._whole, self._deleted = (path / name for name in (".moving", ".replaced", ".deleted"))

    def set_aside(self) -> None:
        """Empty the directory for a new run."""
        self._moving.mkdir(exist_ok=True)
        for entry in self._entries():
            entry.rename(self._moving / entry.name)
        self._moving.rename(self._whole)

    def put_back(self) -> None:
        """The new run came to nothing: all is as it was, but for its engines' logs."""
        if self._whole.exists():
            for entry in self._entries():
                if not entry.match(STAYS):
                    _remove(entry)
            self._whole.rename(self._moving)
        self.recover()

    def delete(self) -> None:
        """The new run stands."""
        if self._whole.exists():
            self._whole.rename(self._deleted)
        self.recover()

    def recover(self) -> None:
        """End what a killed process had begun, but for a start that may be taken up: ``.replaced`` stays."""
        if self._moving.exists():
            for entry in self._moving.iterdir():
                if (self.path / entry.name).exists():  # a newer log
                    _remove(entry)
                else:
                    entry.rename(self.path / entry.name)
            self._moving.rmdir()
        if self._deleted.exists():
            shutil.rmtree(self._deleted)

    def _entries(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if not entry.name.startswith(".")]


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
