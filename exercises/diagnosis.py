"""Exercise 5, measured: a log, its breaks as the replayer finds them, and what was named of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from exercises.layouts import start_engine
from exercises.student import Student
from going_further.common import HERE, LessonError, Run
from going_further.replay.analysis import Options, analyse
from going_further.replay.comparing import Row
from going_further.replay.rendering import Renderer

LOG, BREAKS = HERE / "exercises" / "agent_log.jsonl", 3
Break = tuple[int, str, str]  # line, kind, place


def named(student: Student) -> list[Break]:
    """Return the breaks that the student names; LessonError for what is no list of them."""
    returned = student.call("the answer", *())
    if not isinstance(returned, list):
        raise student.fault(student.line, f"breaks returns a value of type {type(returned).__name__}, not a list")
    for n, entry in enumerate(returned):
        kinds = [type(part) for part in entry] if isinstance(entry, tuple | list) else []
        if kinds != [int, str, str]:
            raise student.fault(student.line, f"breaks returns no line, kind and place as entry {n}")
    return [(line, " ".join(kind.split()), " ".join(place.split())) for line, kind, place in returned]


def verdict(entry: Break, rows: list[Row]) -> str:
    """Say what is to be said of one named break, and not what the right one is."""
    line, kind, place = entry
    row = next((row for row in rows if row.line == line), None)
    if row is None:
        return f"line {line}: the log has no such line"
    if row.lost_tokens == 0:
        return f"line {line}: nothing is lost there"
    if row.kind != kind:
        return f"line {line}: {row.lost_tokens:,} tokens are lost there, but not by that kind of break"
    if row.where.startswith(f"{place} "):
        return f"line {line}: {row.lost_tokens:,} tokens are lost in there: name the place as exactly as the replayer"
    if row.where != place:
        return f"line {line}: {row.lost_tokens:,} tokens are lost there, by that kind of break, in another place"
    return f"line {line}: yes, {row.lost_tokens:,} tokens are lost there"


def exercise_5(student: Student) -> Callable[[Run], Awaitable[None]]:
    entries = named(student)

    async def measure(run: Run) -> None:
        model = run.model
        options = Options(disable_hybrid_kv_cache_manager=True)  # as the engines of the lessons are started
        found = analyse(LOG, Renderer(model.name), model.block_size, options, run.console)
        rows = found.rows
        breaks = {(row.line, row.kind, row.where): row.lost_tokens for row in rows if row.lost_tokens}
        if len(breaks) != BREAKS:
            found_breaks = f"with this model's template and blocks the log has {len(breaks)} breaks, not {BREAKS}"
            raise LessonError(f"{found_breaks}: leave --model and --block-size out")
        prompts = [found.comparer.recall(number).ids for number in range(len(rows))]
        engine = await start_engine(run, prompts)
        with run.timed("measuring"):
            for row, ids in zip(rows, prompts, strict=True):
                await engine.ask(ids, "main", "log", row.line)
        measured = run.measured("main", "log")
        sent, found = sum(m.prompt_tokens for m in measured), sum(m.cached_tokens for m in measured)
        lost, right = sum(breaks.values()), {entry for entry in entries if entry in breaks}
        explained = sum(breaks[entry] for entry in right)
        run.print(
            f"{len(rows)} requests, {sent:,} tokens, {found:,} cached ({found / sent:.1%}), {lost:,} lost by breaks"
        )
        for entry in entries:
            run.print(f"  {verdict(entry, rows)}")
        run.print(f"{explained:,} of {lost:,} lost tokens are explained, {lost - explained:,} are not")
        run.result["exercise"] |= {"breaks": len(right), "explained": explained, "lost": lost}
        agree = sum(m.cached_tokens == row.predicted_cached_tokens for m, row in zip(measured, rows, strict=True))
        run.claim("the analysis and the engine agree", agree == len(rows), f"{agree} of {len(rows)} requests")
        evidence = f"{len(right)} of {BREAKS} are, {lost - explained:,} lost tokens are left"
        run.claim("the three breaks are named", len(right) == BREAKS, evidence)
        wrong = len(set(entries) - right)
        run.claim("nothing else is named", wrong == 0, f"{wrong} entries are no break of this log")

    return measure
