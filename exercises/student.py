"""The student's file: read, run and called, with every fault of it told in one line that names its place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from going_further.common import LessonError, UsageError, telling_line

ROLES = ("system", "user", "assistant")
MOST_CHARACTERS = 60_000  # of one prompt: several times what the agents send
SECONDS = 20  # that one call may take


@dataclasses.dataclass(frozen=True)
class Student:
    """One function of a student's file."""

    path: Path
    function: Callable

    def fault(self, line: int, text: str) -> LessonError:
        return LessonError(f"{self.path.name}, line {line}: {text}")

    @property
    def line(self) -> int:
        """Where the function begins."""
        return self.function.__code__.co_firstlineno

    def call(self, when: str, *arguments: object) -> object:
        """Return what the function returns; LessonError, which also says `when`, for whatever it raises."""
        try:
            with limited_time():
                return self.function(*arguments)
        except (Exception, SystemExit) as error:  # it is not our code; and exit() must not end the check as if solved
            line = line_of(error, self.path) or self.line
            raise self.fault(line, f"{type(error).__name__}: {telling_line(error)} ({when})") from None

    def messages(self, when: str, *arguments: object) -> list[dict]:
        """Return the messages that the function returns; LessonError for what is none."""
        returned = self.call(when, *arguments)
        if wrong := wrong_in_messages(returned):
            raise self.fault(self.line, f"{self.function.__name__} returns {wrong} ({when})")
        return [{"role": message["role"], "content": message["content"]} for message in returned]

    def all_messages(self, calls: dict[str, tuple]) -> list[list[dict]]:
        """Return the messages for all arguments, by `when`; LessonError where they depend on the calls before."""
        chats = [self.messages(when, *copy.deepcopy(arguments)) for when, arguments in calls.items()]
        for chat, (when, arguments) in zip(chats[::-1], [*calls.items()][::-1], strict=True):
            if self.messages(when, *copy.deepcopy(arguments)) != chat:
                text = f"asked again, {self.function.__name__} returns something else: it must depend on nothing but"
                raise self.fault(self.line, f"{text} its arguments ({when})")
        return chats


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Raise TimeoutError in what takes longer than SECONDS: a loop without an end is told with its line."""

    def end(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def line_of(error: BaseException, path: Path) -> int | None:
    """Return the line of a file in which an exception came up, the innermost one; None where it was not there."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return lines[-1] if lines else None


def load(path: Path, name: str) -> Student:
    """Run a student's file and return its function; LessonError where there is none to be had."""
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot read {path}: it is no regular file")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    module = types.ModuleType("exercise")
    module.__file__ = str(path)
    sys.modules["exercise"] = module  # dataclasses look their module up
    try:
        with limited_time():
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        raise LessonError(f"{path.name}, line {error.lineno or 1}: {type(error).__name__}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # as in Student.call
        line = line_of(error, path) or 1
        raise LessonError(f"{path.name}, line {line}: {type(error).__name__}: {telling_line(error)}") from None
    function = module.__dict__.get(name)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise LessonError(f"{path.name} has no function {name}: keep its name, and a plain def")
    return Student(path, function)


def wrong_in_messages(returned: object) -> str:
    """Say what is wrong with a list of messages, "" where nothing is."""
    if not isinstance(returned, list):
        return f"a value of type {type(returned).__name__}, not a list of messages"
    for n, message in enumerate(returned):
        if not isinstance(message, dict) or {"role", "content"} - message.keys():
            return f"no message at {n}: a message is a dict with role and content"
        if message["role"] not in ROLES:
            return f"a role that is none in message {n}: there are {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return f"a content of type {type(message['content']).__name__} in message {n}, not text"
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            return f"half of a surrogate pair in message {n}, which is no character"
    if not returned or returned[-1]["role"] != "user":
        return "messages of which the last one is not from the user"
    if (characters := sum(len(message["content"]) for message in returned)) > MOST_CHARACTERS:
        return f"a prompt of {characters:,} characters, {MOST_CHARACTERS:,} are enough"
    return ""
