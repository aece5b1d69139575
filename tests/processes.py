"""What a lesson may leave behind: processes that carry its mark, and its folder."""

from __future__ import annotations

import time
from pathlib import Path


def lesson_processes(folder: Path) -> list[int]:
    """Return the processes of lessons that keep their temporary files in `folder`: engine core, worker, helpers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"KV_LESSON={folder}/".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)


def left_behind(folder: Path, seconds: float = 10) -> list[int | Path]:
    """Wait up to `seconds` until those processes, and the folders in `folder`, are gone; return what is not."""
    end = time.monotonic() + seconds
    while True:
        left = [*lesson_processes(folder), *(path for path in folder.iterdir() if path.is_dir())]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)
