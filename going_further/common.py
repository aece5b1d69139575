"""The one door between the tools and the lessons: what a tool needs of a lesson it imports from here.

Beside that it holds what tools need and lessons do not: claims, and a command line that takes no empty value.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import sys
import tempfile
from pathlib import Path

from session_consistency import (
    ANSWER,
    HERE,
    INSTRUCTIONS,
    QUESTIONS,
    WEIGHT_FILES,
    EngineError,
    LessonError,
    UsageError,
    at_least,
    find_model,
    hit_rate,
    milliseconds,
    p90,
    report,
    root_cause,
    schedule,
    time_verdict,
    use_python_with_vllm,
    worker_places,
    write_json,
)

__all__ = [
    "ANSWER",
    "HERE",
    "INSTRUCTIONS",
    "QUESTIONS",
    "WEIGHT_FILES",
    "Claim",
    "EngineError",
    "LessonError",
    "Parser",
    "UsageError",
    "at_least",
    "find_model",
    "hit_rate",
    "json_path",
    "milliseconds",
    "p90",
    "report",
    "root_cause",
    "schedule",
    "time_verdict",
    "use_python_with_vllm",
    "worker_places",
    "write_json",
]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a run must show, and the numbers that it rests on."""

    claim: str
    holds: bool
    evidence: str


class Parser(argparse.ArgumentParser):
    """A command line that shows its `doc` as it is, and takes no empty value: an unset variable of a shell is one."""

    def __init__(self, doc: str, **options: object) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            is_empty_option = word.startswith("--") and word.endswith("=")
            if not word or is_empty_option:
                self.error("there is an empty value among the arguments")  # none is repeated: it may be a key
        return super().parse_known_args(args, namespace)


def json_path(name: str) -> Path:
    """Return the path of a file that can be written; argparse reports the error of any other."""
    path = Path(name)
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {error.strerror}") from error
    return path
