"""Run the lessons and compare what they measured.

    python3 run_all_examples.py                all lessons
    python3 run_all_examples.py 1 3            these, in this order
    python3 run_all_examples.py 4 --workers 4  other options go to lessons
    python3 run_all_examples.py --list         what there is
    python3 run_all_examples.py --exercise 1   check exercises/exercise_1.py
    python3 run_all_examples.py --show FILE    summary of a run recorded as JSON
    python3 run_all_examples.py --compare A B  two recorded runs side by side
    python3 run_all_examples.py --report PATH  a page (HTML) about this run, or,
                                               with --show, a recorded one

Each lesson runs in a process of its own and prints its own tables; one summary
follows. Where this Python has no vLLM that can run here, an environment is set
up first, once, in .venv beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    from setup_and_test import STOPPING, end_on_signals, has_usable_vllm, prepare, run_command
except ModuleNotFoundError:
    sys.exit("run_all_examples.py: error: setup_and_test.py is not beside this script: copy the whole folder")

HERE = Path(__file__).resolve().parent


class Lesson(NamedTuple):
    name: str  # the script, without .py
    title: str


LESSONS = {
    1: Lesson("stable_prefix_vs_timestamp", "a stable prefix against a timestamp at the front"),
    2: Lesson("append_only_vs_inplace_edit", "an append-only context against a state edited in place"),
    3: Lesson("manual_cache_boundary", "an explicit boundary, and a store for engines without prefix caching"),
    4: Lesson("session_consistency", "sessions that stay with their worker against round robin"),
}
# What a file that is no recorded run can raise. ValueError: no UTF-8, no JSON, no samples; arithmetic: no tokens.
NO_RUN = AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError, ArithmeticError
REPLAYER = "replay_request_log"  # of going_further; its JSON can be shown, too
PRICE_INPUT, PRICE_CACHED = 3.00, 0.30  # an example, in $ per million prompt tokens; lesson 2 takes others


class Arm(NamedTuple):
    """One arm of a lesson's main experiment without request 0, which fills the cache."""

    prompt_tokens: int
    cached_tokens: int
    ttft_ms: list[float]

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ttft_ms)

    @property
    def dollars(self) -> float:
        return (self.computed_tokens * PRICE_INPUT + self.cached_tokens * PRICE_CACHED) / 1e6


class LessonRun(NamedTuple):
    number: int
    status: int
    seconds: float
    result: dict | None  # the lesson's JSON, None where it failed before it could write one


def read_arm(result: dict, arm: str) -> Arm:
    rows = [m for m in result["measurements"] if m["experiment"] == "main" and m["arm"] == arm and m["request"] > 0]
    return Arm(
        sum(m["prompt_tokens"] for m in rows),
        sum(m["cached_tokens"] for m in rows),
        [m["ttft_ms"] for m in rows if m["error"] is None],
    )


def pair_ratios(result: dict) -> list[float]:
    """Return, for every turn of every session, its TTFT in bad by that in good; nothing where there are no sessions.

    Turns are unlike requests: their ranges overlap however much faster each one is.
    """
    times: dict[str, dict] = {"bad": {}, "good": {}}
    for m in result["measurements"]:
        if m["experiment"] == "main" and m["request"] > 0 and m["session"] is not None and m["error"] is None:
            times[m["arm"]][m["session"], m["request"]] = m["ttft_ms"]
    return [times["bad"][turn] / times["good"][turn] for turn in times["bad"] if turn in times["good"]]


def speed_up(bad: Arm, good: Arm, ratios: list[float]) -> str:
    """Say how much faster the medians are, or the pairs where there are `ratios` of them, or why nothing is said."""
    if ratios:
        return f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} faster ({statistics.median(ratios):.1f}x)"
    if bad.median_ms <= good.median_ms:
        return "no speed-up"
    if min(bad.ttft_ms) <= max(good.ttft_ms):
        return "TTFT ranges overlap"
    return f"speed-up {bad.median_ms / good.median_ms:.1f}x"


def count_verdicts(verdicts: Counter) -> str:
    """Say how a student's predictions came out; `verdicts` are those of the lessons' JSON."""
    return ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("exact", "within one block", "off", "skipped"))


def summarise(runs: list[LessonRun]) -> list[str]:
    """Return the lines that compare what the lessons measured, two rows a lesson and what they come to.

    `computed` counts tokens. The first line is the head of the table, the last one says what the columns are.
    """
    heads = f"{'hit rate':>10}{'TTFT':>11}{'computed':>11}{'cost':>9}"
    lines = [f"[bold]{'without request 0 (it fills the cache)':<39}{heads}"]
    score = Counter()
    for number, status, seconds, result in runs:
        name = f"{number} {LESSONS[number].name}"
        if result is None:
            lines += [name, f"  [bold red]no result[/]: exit status {status} after {seconds:.0f} s"]
            continue
        bad, good = (read_arm(result, arm) for arm in ("bad", "good"))
        length = f"  {result['environment']['prefix_tokens']:,} static tokens"
        for label, kind, arm in ((name, "bad", bad), (length, "good", good)):
            rate, ttft, cost = f"{arm.hit_rate:.1%}", milliseconds(arm.median_ms), f"${arm.dollars:.4f}"
            lines.append(f"{label:<33}{kind:<6}{rate:>10}{ttft:>11}{arm.computed_tokens:>11,}{cost:>9}")
        computed = good.computed_tokens / bad.computed_tokens - 1
        cost = good.dollars / bad.dollars - 1
        held = f"{sum(claim['holds'] for claim in result['claims'])} of {len(result['claims'])}"
        changes = f"computed {computed:+.0%}, cost {cost:+.0%}, {speed_up(bad, good, pair_ratios(result))}"
        lines.append(f"  {held} claims hold in {sum(result['seconds'].values()):.0f} s; {changes}")
        told = result.get("predictions", [])
        if told:
            score.update(row["verdict"] for row in told)
            lines.append(f"  you predicted: {count_verdicts(Counter(row['verdict'] for row in told))}")
    if score:
        lines.append(f"your score: {count_verdicts(score)}")
    prices = f"${PRICE_INPUT:.2f} per million tokens, cached ${PRICE_CACHED:.2f}"
    return [*lines, f"TTFT: median; example prices: {prices}"]


def print_summary(lines: list[str], title: str = "summary", markup: bool = True, soft_wrap: bool = True) -> None:
    from rich.console import Console

    console = Console(width=80, highlight=False, emoji=False)
    console.rule(title)
    for line in lines:
        console.print(line, markup=markup, soft_wrap=soft_wrap)


def milliseconds(value: float) -> str:
    """Write a time given in ms with three digits, as the lessons do."""
    if value >= 1000:
        return f"{value / 1000:,.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def shown(text: str) -> str:
    """Return a text that is not ours as a terminal may have it: its control characters are seen, and do nothing."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def paired(first: list[LessonRun], second: list[LessonRun]) -> Iterator[tuple[int, dict | None, dict | None]]:
    """Yield the lessons of two recorded runs; where a run holds one several times, its first is held by the first."""
    for number in LESSONS:
        of_first, of_second = ([run.result for run in runs if run.number == number] for runs in (first, second))
        for a, b in itertools.zip_longest(of_first, of_second):
            yield number, a, b


def environment_differences(a: dict, b: dict) -> Iterator[tuple[str, str]]:
    """Yield the keys in which two environments differ, each with both values. When a run was started is no matter."""
    for key in dict.fromkeys([*a, *b]):
        if key != "started_at" and a.get(key, "-") != b.get(key, "-"):
            length = 12 if key.endswith("sha256") else None  # enough to tell two hashes apart
            yield shown(key), " | ".join(shown(str(environment.get(key, "-")))[:length] for environment in (a, b))


def count_difference(number: int, arm: str, a: dict, b: dict) -> str:
    """Name the token counts of an arm in which two results differ, nothing where they do not.

    Its sums, without request 0; where these are the same, how many single requests are not.
    """
    x, y = read_arm(a, arm), read_arm(b, arm)
    sums = (x.computed_tokens, y.computed_tokens, "tokens computed"), (x.cached_tokens, y.cached_tokens, "cached")
    named = [f"{of_a:,} and {of_b:,} {what}" for of_a, of_b, what in sums if of_a != of_b]
    if not named:
        of_a, of_b = (
            Counter(
                (m["request"], m["session"], m["prompt_tokens"], m["cached_tokens"])
                for m in result["measurements"]
                if m["experiment"] == "main" and m["arm"] == arm
            )
            for result in (a, b)
        )
        if others := max((of_a - of_b).total(), (of_b - of_a).total()):
            named = [f"the same sums, but {others} of {of_a.total()} requests are not the same"]
    return f"lesson {number}, {arm}: {', '.join(named)}" if named else ""


def compare(first: list[LessonRun], second: list[LessonRun]) -> list[str]:
    """Return the lines that hold two recorded runs against each other, last what else than times is not the same."""
    table = [
        f"{'':<7}{'hit rate':>14}{'TTFT, median':>28}{'tokens computed':>30}",
        f"{'':<7}{'A':>7}{'B':>7}{'A':>10}{'B':>10}{'B/A':>8}{'A':>11}{'B':>11}{'B/A':>8}",
    ]
    alone, counts, environments, compared = [], [], {}, 0
    for number, a, b in paired(first, second):
        name = f"{number} {LESSONS[number].name}"
        if a is None or b is None:
            again = f" with {(a or b)['environment']['prefix_tokens']:,} static tokens" if name in table else ""
            alone.append(f"{name}{again} is only in {'B' if a is None else 'A'}")
            continue
        compared += 1
        table.append(name)
        for arm in ("bad", "good"):
            x, y = read_arm(a, arm), read_arm(b, arm)
            rates = f"{x.hit_rate:>7.1%}{y.hit_rate:>7.1%}"
            times = f"{milliseconds(x.median_ms):>10}{milliseconds(y.median_ms):>10}{y.median_ms / x.median_ms:>7.2f}x"
            tokens = f"{x.computed_tokens:>11,}{y.computed_tokens:>11,}{y.computed_tokens / x.computed_tokens:>7.2f}x"
            table.append(f"  {arm:<5}{rates}{times}{tokens}")
            counts.append(count_difference(number, arm, a, b))
        held = [f"{sum(c['holds'] for c in result['claims'])} of {len(result['claims'])}" for result in (a, b)]
        counts.append(f"lesson {number}: {held[0]} and {held[1]} claims hold" if held[0] != held[1] else "")
        for difference in environment_differences(a["environment"], b["environment"]):
            environments.setdefault(difference, []).append(str(number))
    differing = []
    for (key, values), where in environments.items():
        lessons = "" if len(where) == compared else f" (lesson {', '.join(where)})"
        differing.append(f"  {key}{lessons}: {values}")
    counts = [f"  {line}" for line in counts if line]
    return [
        *table,
        "request 0, which fills the cache, is left out",
        *alone,
        *(["", "Environments differ:", *differing] if differing else ["", "The environments are the same."]),
        *(["", "Counts differ:", *counts] if counts else ["", "All counts of tokens and claims are the same."]),
    ]


def no_run(file: str, error: Exception) -> int:
    """Say that a file is no recorded run, and return the exit status for it."""
    fault = error.strerror if isinstance(error, OSError) else repr(error)
    print(f"run_all_examples.py: error: {file} is no run recorded with --json: {fault}", file=sys.stderr)
    return 2


def show(file: str, report: Path | None) -> int:
    """Print the summary of a recorded run; write the page about it where there is a path for one."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("lesson") == REPLAYER:
            title, lines = "replayed log", [replay_head(content)]
            lines += [] if report else ["What broke the prefixes, where, and at what cost: add --report PATH"]
            page = make_replay_report(content) if report else ""
        else:
            title, runs = "summary", lessons_of(content)
            lines, page = summarise(runs), make_report(runs) if report else ""
    except NO_RUN as error:
        return no_run(file, error)
    print_summary(lines, title)
    return write_or_say(report, page) if report else 0


def show_both(files: list[str]) -> int:
    """Print two recorded runs side by side."""
    runs = []
    for file in files:
        try:
            runs.append(read_run(Path(file)))
            compare(runs[-1], runs[-1])  # what one run lacks is said of that one
        except NO_RUN as error:
            return no_run(file, error)
    names = [f"{letter}: {shown(file)}" for letter, file in zip("AB", files, strict=True)]
    print_summary([*names, "", *compare(*runs)], "comparison", markup=False, soft_wrap=False)
    return 0


def make_report(runs: list[LessonRun]) -> str:
    import report  # brings matplotlib, which nothing else needs

    return report.page(runs)


def make_replay_report(content: dict) -> str:
    import replay_report

    return replay_report.page(content)


def read_run(path: Path) -> list[LessonRun]:
    """Return the lessons of a recorded run."""
    return lessons_of(json.loads(path.read_text(encoding="utf-8")))


def lessons_of(content: dict) -> list[LessonRun]:
    numbers = {lesson.name: number for number, lesson in LESSONS.items()}
    return [LessonRun(numbers[result["lesson"]], 0, 0.0, result) for result in content["lessons"]]


def whole(value: object) -> int:
    """Return a count that a file holds. ValueError where it cannot be one."""
    if type(value) is not int or not 0 <= value < 10**15:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def replay_head(content: dict) -> str:
    """Return what a replayed log comes to, as the replayer prints it."""
    rows = content["requests"]
    sent, found = (sum(whole(row[key]) for row in rows) for key in ("prompt_tokens", "predicted_cached_tokens"))
    requests = f"{len(rows):,} request{'s' if len(rows) != 1 else ''}"
    return f"{requests}, {sent:,} tokens, {found:,} cached ({found / sent:.1%}), {sent - found:,} computed"


class Stopped(Exception):
    """A signal came; `args[0]` is its number."""


def stop(signum: int, _: object) -> None:
    for other in STOPPING:
        signal.signal(other, lambda *_: None)  # once is enough: the lesson is being ended
    raise Stopped(signum)


@contextlib.contextmanager
def locked_folder() -> Iterator[Path]:
    """Yield a folder for the lessons' JSON, named and locked like theirs: if this is killed, the next removes it."""
    folder = Path(tempfile.mkdtemp(prefix="new-kv-lesson-"))  # not to be taken for an old one before it is locked
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    folder = folder.rename(folder.with_name(folder.name.removeprefix("new-")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def end_with_runner(runner: int) -> None:
    """Let the kernel end this process, a lesson, when the runner ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != runner:  # it was too late
        os._exit(1)


def run_lesson(number: int, options: list[str], folder: Path) -> LessonRun:
    """Run one lesson to its end, or end it and raise Stopped."""
    result, start = folder / f"{number}.json", time.perf_counter()
    command = [sys.executable, HERE / f"{LESSONS[number].name}.py", *options, "--json", result]
    process = subprocess.Popen(command, preexec_fn=functools.partial(end_with_runner, os.getpid()))
    try:
        status = process.wait()
    except Stopped as signalled:
        process.send_signal(signalled.args[0])
        process.wait()
        raise
    content = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    return LessonRun(number, status, time.perf_counter() - start, content)


def write_whole(path: Path, text: str) -> None:
    """Write all of `text` or nothing. OSError where that cannot be."""
    path = path.resolve()  # what a link points to is written, the link stays
    part = path.with_name(f"kv-{os.getpid()}.part")
    try:
        with part.open("x", encoding="utf-8") as file:  # anew: what a link there points to is not written
            file.write(text)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_or_say(path: Path, text: str) -> int:
    """Write all of `text` or say why not; return the exit status."""
    try:
        write_whole(path, text)
    except OSError as error:
        print(f"run_all_examples.py: error: cannot write {path}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def is_same_file(a: str | Path, b: str | Path) -> bool:
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def json_path(name: str) -> Path:
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
        tempfile.TemporaryFile(dir=Path(name).parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {error.strerror}") from error
    return Path(name)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[int], list[str]]:
    """Return the runner's own options, the numbers of the lessons, and what is handed on to these."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [N ...] [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options go to the lessons: python stable_prefix_vs_timestamp.py --help",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the examples and stop")
    parser.add_argument("--exercise", metavar="N", help="check exercises/exercise_N.py, or the FILE that follows")
    parser.add_argument(
        "--show", action="append", default=[], metavar="FILE", help="print the summary of a recorded run and stop"
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="the same as --show A --show B: side by side")
    parser.add_argument(
        "--report", type=json_path, metavar="PATH", help="write a page (HTML) about the run to this file"
    )
    parser.add_argument("--json", type=json_path, metavar="PATH", help="write every measurement to this file")
    parser.add_argument("--append", action="store_true", help="add to the run recorded in --json PATH, not write anew")
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in words):
        parser.error("there is an empty value among the arguments")
    if any(re.search(r"[\x00-\x1f\x7f-\x9f]", word) for word in words):
        parser.error("there is a control character among the arguments")
    args, others = parser.parse_known_args(words)
    if args.exercise:
        if args.list or args.show or args.compare or args.report or args.append:
            parser.error("--exercise takes no other option of the runner than --json")
        return args, [], [args.exercise, *others, *(["--json", str(args.json)] if args.json else [])]
    numbers = []
    while others and not others[0].startswith("-"):
        text = others.pop(0)
        if not (text.isascii() and text.isdigit() and int(text) in LESSONS):
            parser.error(f"there is no example {text!r}, there are {', '.join(map(str, LESSONS))}")
        numbers.append(int(text))
    if args.append and not args.json:
        parser.error("--append adds to a recorded run: name it with --json PATH")
    args.show += args.compare or []
    if len(args.show) > 2:
        parser.error("two recorded runs can be compared, not more")
    if args.report and len(args.show) == 2:
        parser.error("--report is about one run")
    given = [*args.show, *([args.json] if args.json else []), *(word.partition("=")[2] or word for word in others)]
    for name in given if args.report else ():
        if is_same_file(args.report, name):
            parser.error(f"--report would overwrite {name}")
    args.recorded = []
    if args.append and args.json.exists():
        try:
            args.recorded = read_run(args.json)
        except NO_RUN as error:
            parser.error(f"{args.json} is no run recorded with --json: {error!r}")
    return args, list(dict.fromkeys(numbers or LESSONS)), others


def main() -> int:
    args, numbers, options = parse(sys.argv[1:])
    if args.list:
        for number, lesson in LESSONS.items():
            print(f"{number}  {lesson.name:<28}{lesson.title}")
        return 0
    # -P: a folder of that name where the student is does not come before the one here
    check_exercise = [sys.executable, "-P", "-m", "exercises.check", *options]
    if args.exercise and sys.version_info >= (3, 11):  # an older one is told so further down
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        if status := subprocess.run([*check_exercise, "--check-options"]).returncode:
            return status
    if not args.show:
        for number in numbers:  # what a lesson does not take is refused before anything is installed or started
            check = [sys.executable, HERE / f"{LESSONS[number].name}.py", *options, "--check-options"]
            if status := subprocess.run(check).returncode:
                return status
    only_reads = args.show and importlib.util.find_spec("rich")  # that needs no engine
    if not only_reads and not has_usable_vllm():
        end_on_signals()
        print(f"{sys.executable} has no vLLM that can run here: going on with .venv beside this file.", flush=True)
        python = prepare()
        if python != Path(sys.executable):
            os.execv(python, [str(python), __file__, *sys.argv[1:]])
    if args.report and not all(map(importlib.util.find_spec, ("matplotlib", "jinja2"))):
        install = f"{sys.executable} -m pip install -r requirements-report.txt"
        print(f"run_all_examples.py: error: --report needs matplotlib and jinja2: {install}", file=sys.stderr)
        return 1
    if args.exercise:
        os.execv(sys.executable, check_exercise)
    if len(args.show) == 2:
        return show_both(args.show)
    if args.show:
        return show(args.show[0], args.report)

    for signum in STOPPING:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, stop)
    runs, status = [], 0
    with locked_folder() as folder:
        try:
            for number in numbers:
                print(f"\nExample {number}: {LESSONS[number].title}\n", flush=True)
                runs.append(run_lesson(number, options, folder))
        except Stopped as signalled:
            status = 128 + signalled.args[0]
        for signum in STOPPING:
            signal.signal(signum, signal.SIG_IGN)  # what is left takes no time
    if runs:
        print_summary(summarise(runs))
    everything = args.recorded + runs
    if args.json:
        content = {"schema": 1, "lessons": [run.result for run in everything if run.result]}
        status = max(status, write_or_say(args.json, json.dumps(content, indent=1) + "\n"))
    if args.report and everything:
        status = max(status, write_or_say(args.report, make_report(everything)))
    failed = {run.status for run in runs} - {0}
    return status or (2 if failed == {2} else int(bool(failed)))  # 2: no lesson took what it was told


if __name__ == "__main__":
    sys.exit(run_command("run_all_examples.py", main))
