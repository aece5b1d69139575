"""The one door between the tools and the lessons: what a tool needs of a lesson it imports from here.

Beside that it holds what tools need and lessons do not: claims, and a command line that takes no empty value.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import locale
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from types import ModuleType

from append_only_vs_inplace_edit import price
from session_consistency import (
    ANSWER,
    BROKEN_FILES,
    HERE,
    INSTRUCTIONS,
    NOWHERE_TO_WRITE,
    OUTPUT_TOKENS,
    QUESTIONS,
    WEIGHT_FILES,
    Affinity,
    CacheCounters,
    CacheModel,
    Engine,
    EngineError,
    LessonError,
    Measurement,
    RoundRobin,
    Run,
    Traffic,
    UsageError,
    at_least,
    check_template,
    common_prefix,
    conversation,
    find_model,
    hit_rate,
    in_turn,
    json_path,
    lesson_parser,
    make_traffic,
    median_ms,
    milliseconds,
    p90,
    pair_ratios,
    pair_verdict,
    per_worker,
    prime,
    report,
    root_cause,
    run_lesson,
    schedule,
    send,
    sessions_parser,
    shown,
    start_workers,
    telling_line,
    time_verdict,
    use_python_with_vllm,
    worker_places,
    write_json,
)
from session_consistency import parse as parse_lesson
from stable_prefix_vs_timestamp import clock, good_messages, system_prompt

__all__ = [
    "ANSWER",
    "BROKEN_FILES",
    "HERE",
    "INSTRUCTIONS",
    "NOWHERE_TO_WRITE",
    "OUTPUT_TOKENS",
    "QUESTIONS",
    "WEIGHT_FILES",
    "Affinity",
    "CacheCounters",
    "CacheModel",
    "Claim",
    "Engine",
    "EngineError",
    "LessonError",
    "Measurement",
    "Parser",
    "RoundRobin",
    "Run",
    "Traffic",
    "UsageError",
    "at_least",
    "check_template",
    "clock",
    "common_prefix",
    "conversation",
    "engine_parser",
    "find_model",
    "free_ports",
    "good_messages",
    "hit_rate",
    "import_transformers",
    "in_turn",
    "json_path",
    "lesson_parser",
    "make_traffic",
    "median_ms",
    "milliseconds",
    "p90",
    "pair_ratios",
    "pair_verdict",
    "parse",
    "per_worker",
    "price",
    "prime",
    "report",
    "root_cause",
    "run_command",
    "run_lesson",
    "schedule",
    "send",
    "sessions_parser",
    "shown",
    "start_workers",
    "stop",
    "system_prompt",
    "telling_line",
    "time_verdict",
    "use_python_with_vllm",
    "use_utf8",
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
            if re.search(r"[\x00-\x1f\x7f-\x9f]", word):
                self.error("there is a control character among the arguments")
        return super().parse_known_args(args, namespace)


def engine_parser(doc: str) -> Parser:
    """Return the command line of a tool that starts one engine and brings prompts of its own."""
    parser = Parser(doc)
    # What lessons have options for: the prompts' length is their own, and so is their number.
    parser.set_defaults(workers=1, fleets=1, prefix_tokens=0, requests=None, deeper=False, check_options=False)
    add = parser.add_argument
    add("--model", help="a folder or a hub name (default: built_in_model, random weights, no download)")
    add("--block-size", type=at_least(1), help="tokens per block (default: 128 on a CPU, in steps of 32; 32 on a GPU)")
    add("--no-prefix-caching", action="store_true", help="the control: without the cache, claims must fail")
    add("--json", type=json_path, metavar="PATH", help="write every measurement to this file")
    add("--verbose", action="store_true", help="show the engine's own log")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the values of a lesson's command line that a tool has; no tool asks the questions of --predict."""
    args = parse_lesson(parser)
    if args.predict:
        parser.error("--predict asks about a lesson: take one of the four")
    return args


def use_utf8() -> None:
    """Go on in Python's UTF-8 mode where the locale is another: vLLM reads its own files in the locale's encoding.

    What is printed stays in the encoding that standard output has.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        encoding = {"PYTHONUTF8": "1", "PYTHONIOENCODING": sys.stdout.encoding}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | encoding)


def import_transformers() -> ModuleType:
    """Return the library; LessonError where the environment does not let it be imported."""
    try:
        import transformers
    except (ImportError, OSError, ValueError) as error:
        raise LessonError(f"cannot import transformers: {telling_line(error)}; is a variable odd?") from error
    return transformers


def free_ports(count: int) -> list[int]:
    """Return loopback ports that are free now."""
    ports = []
    with contextlib.ExitStack() as held:  # until all are found: else the same one could be found twice
        for _ in range(count):
            listener = held.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            _, port = listener.getsockname()
            ports.append(port)
    return ports


errors = 2  # descriptor of standard error; another one while that leads elsewhere


def stop(signum: int, _: object) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(errors, b"interrupted\n")
    os._exit(128 + signum)  # where servers were started, a watchdog ends them


def run_command(program: str, command: Callable[[], int]) -> int:
    """Run a command to its exit status: one line for a foreseeable fault, and an end at once for a signal."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit(f"{program}: error: standard output is closed: there is nowhere to print to")
    sys.stdout.reconfigure(errors="replace"), sys.stderr.reconfigure(errors="replace")  # no UTF-8 is no fault
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, stop)
    try:
        status = command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in NOWHERE_TO_WRITE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries once more, at its end
        print(f"{program}: error: cannot write: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    except LessonError as error:
        print(f"{program}: error: {shown(str(error))}", file=sys.stderr, flush=True)
        return error.status
    return status
