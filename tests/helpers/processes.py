"""What a run may leave behind: processes, and whatever it has put into the temporary folder or shared memory."""

from __future__ import annotations

import time
from pathlib import Path


def lesson_processes(folder: Path) -> list[int]:
    """Return the processes of runs that keep their temporary files in `folder`: lesson, engines, servers, helpers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if any(entry.startswith(f"TMPDIR={folder}".encode()) for entry in environment):
            found.append(int(process.name))
    return sorted(found)


def left_behind(folder: Path, seconds: float = 10, killed: bool = False) -> list[int | Path]:
    """Wait up to `seconds` until those processes, and the folders in `folder`, are gone; return what is not.

    A run that was `killed` had no time to remove its folder: the next one does.
    """
    end = time.monotonic() + seconds
    while True:
        folders = [] if killed else [path for path in folder.iterdir() if path.is_dir()]
        left = [*lesson_processes(folder), *folders]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
