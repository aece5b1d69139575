"""Exercise 4, measured: who keeps a session, who moves when a worker is lost, and what a hot session costs.

The rules are checked on the router alone, with thousands of sessions; then two real workers get what it routes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from exercises.facts import about_tokens
from exercises.layouts import Claim, tell_hit_rate
from exercises.student import Student, load
from going_further.common import HERE, OUTPUT_TOKENS, CacheModel, LessonError, Run, conversation, report, start_workers

WORKERS = [f"worker-{n}" for n in range(8)]
LOST = WORKERS[0], WORKERS[3], WORKERS[7]  # one at a time
SESSIONS = [f"session-{n:04}" for n in range(5000)]
REQUESTS, HOT = 4000, "session-hot"
ENGINES, SENDERS, HOT_REQUESTS, ROUNDS = 2, 9, 3, 4  # of the measured run; a round: a turn of each, and the hot ones
CONTEXT_TOKENS = 700  # of a session, about


def cap(workers: dict[str, int]) -> int:
    """Return how many requests one worker may have when the next one is routed."""
    return math.ceil(1.25 * (sum(workers.values()) + 1) / len(workers))


def worker_of(student: Student, session: str, workers: dict[str, int]) -> str:
    """Return where the student's router sends a session; LessonError where that is no worker."""
    worker = student.call(f"{session}, {len(workers)} workers", session, dict(workers))
    if not isinstance(worker, str) or worker not in workers:
        kind = type(worker).__name__
        raise student.fault(student.line, f"route returns a value of type {kind} that names none of its workers")
    return worker


def homes(student: Student, sessions: list[str], workers: list[str]) -> dict[str, str]:
    """Return where each session goes while nobody has had a request."""
    idle = dict.fromkeys(workers, 0)
    return {session: worker_of(student, session, idle) for session in sessions}


def homes_elsewhere(path: Path, seed: int) -> dict[str, str]:
    """Return the homes as another process finds them, in which Python's own hashes have another seed."""
    command = [sys.executable, "-m", "exercises.routing", str(path)]
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise LessonError(f"{path.name} does not run in another process: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rules(student: Student) -> list[Claim]:
    """Return what the router must keep to, the even shares first."""
    home = homes(student, SESSIONS, WORKERS)
    claims = even(home), same_order(student, home), same_elsewhere(student, home), few_move(student, home)
    return [*claims, *under_load(student, home)]


def even(home: dict[str, str]) -> Claim:
    share = len(SESSIONS) / len(WORKERS)
    most_by_chance = share + 4 * math.sqrt(share)  # four standard deviations, and a little more
    [(fullest, most)] = Counter(home.values()).most_common(1)
    evidence = f"{fullest} has {most:,} of {len(SESSIONS):,}, an even share is {share:,.0f}"
    return "each worker has about the same share of the sessions", most <= most_by_chance, evidence


def same_order(student: Student, home: dict[str, str]) -> Claim:
    turned = homes(student, SESSIONS, WORKERS[::-1])
    moved = sum(home[session] != turned[session] for session in SESSIONS)
    evidence = f"{moved:,} of {len(SESSIONS):,} sessions move when the list is turned round"
    return "the order in which workers are listed decides nothing", moved == 0, evidence


def same_elsewhere(student: Student, home: dict[str, str]) -> Claim:
    others = [homes_elsewhere(student.path, seed) for seed in (1, 2)]
    apart = sum(any(other[session] != home[session] for other in others) for session in others[0])
    evidence = f"{apart} of {len(others[0])} sessions go elsewhere there"
    return "routers in other processes agree", apart == 0, evidence


def few_move(student: Student, home: dict[str, str]) -> Claim:
    """Claim that a lost worker's sessions move and no others; with even shares that is 1/N of all."""
    moved = {}
    for lost in LOST:
        left = homes(student, SESSIONS, [worker for worker in WORKERS if worker != lost])
        moved[lost] = sum(home[session] not in (lost, left[session]) for session in SESSIONS)
    worst = max(LOST, key=lambda worker: moved[worker])
    own = sum(worker == worst for worker in home.values())
    evidence = f"{worst} lost, with {own:,} of {len(SESSIONS):,} sessions: {moved[worst]:,} others move as well"
    return "when a worker is lost only its own sessions move", moved[worst] == 0, evidence


def under_load(student: Student, home: dict[str, str]) -> list[Claim]:
    """Claim that sessions stay with a worker that has room, and that one without gets no further request."""
    requests, over, first, away, dice = dict.fromkeys(WORKERS, 0), 0, "", 0, random.Random(4)
    home = home | homes(student, [HOT], WORKERS)
    for n in range(REQUESTS):
        session = HOT if n % 2 else dice.choice(SESSIONS[:200])
        worker, most = worker_of(student, session, requests), cap(requests)
        if requests[worker] >= most:
            over += 1
            first = first or f"; first request {n}, of {session}: {worker} has {requests[worker]}, {most} at most"
        away += worker != home[session] and requests[home[session]] < most
        requests[worker] += 1
    stay = f"{away:,} of {REQUESTS:,} requests go elsewhere though their worker has room"
    bound = f"{over:,} of {REQUESTS:,} requests too many{first}"
    return [
        ("a session comes back to its worker while that has room", away == 0, stay),
        ("a hot session overruns no worker", over == 0, bound),
    ]


# --- the measured run ---


@dataclasses.dataclass(frozen=True)
class Sent:
    """One request of the measured run."""

    session: str
    turn: int
    worker: int


def arrivals() -> list[tuple[str, int]]:
    """Return who sends when, as session and turn."""
    dice, turns, made = random.Random(6), Counter(), []
    for _ in range(ROUNDS):
        senders = [f"session-{n}" for n in range(SENDERS)] + [HOT] * HOT_REQUESTS
        for session in dice.sample(senders, len(senders)):
            made.append((session, turns[session]))
            turns[session] += 1
    return made


def routed(student: Student) -> list[Sent]:
    """Return where the student's router sends the measured requests."""
    requests, sent = {f"worker-{n}": 0 for n in range(ENGINES)}, []
    for session, turn in arrivals():
        worker = worker_of(student, session, requests)
        requests[worker] += 1
        sent.append(Sent(session, turn, list(requests).index(worker)))
    return sent


def homes_of_senders(student: Student) -> dict[str, int]:
    """Return the worker of each session of the measured run: where the student's router puts it."""
    names = [f"worker-{n}" for n in range(ENGINES)]
    home = homes(student, sorted({session for session, _ in arrivals()}), names)
    return {session: names.index(worker) for session, worker in home.items()}


def bounded(home: dict[str, int]) -> list[Sent]:
    """Return where requests go that stay at home, but for those that `cap` keeps out: they go to the other worker."""
    requests, sent = {str(n): 0 for n in range(ENGINES)}, []
    for session, turn in arrivals():
        worker = home[session] if requests[str(home[session])] < cap(requests) else 1 - home[session]
        requests[str(worker)] += 1
        sent.append(Sent(session, turn, worker))
    return sent


def found_tokens(sent: list[Sent], prompts: dict[tuple[str, int], list[int]], block_size: int) -> list[int]:
    """Return what the cache model finds of each request on its worker."""
    caches, found = [CacheModel(block_size) for _ in range(ENGINES)], []
    for request in sent:
        ids = prompts[request.session, request.turn]
        found.append(caches[request.worker].cached_tokens(ids))
        caches[request.worker].store(ids)
    return found


def needed_tokens(home: dict[str, int], prompts: dict[tuple[str, int], list[int]], block_size: int) -> int:
    """Return what must be found: what the homes allow under the bound, less a block for each session."""
    return sum(found_tokens(bounded(home), prompts, block_size)) - block_size * len(home)


def lost_by_moving(sent: list[Sent], cached: list[int], lengths: list[int], block_size: int) -> list[tuple[Sent, int]]:
    """Return the requests that came to another worker than the session's request before, and what they lost."""
    last: dict[str, int] = {}  # the session's latest request
    lost = []
    for n, request in enumerate(sent):
        before = last.get(request.session)
        if before is not None and sent[before].worker != request.worker:
            tokens = lengths[before] // block_size * block_size - cached[n]
            if tokens > 0:
                lost.append((request, tokens))
        last[request.session] = n
    return lost


def exercise_4(student: Student) -> Callable[[Run], Awaitable[None]]:
    claims, sent, home = rules(student), routed(student), homes_of_senders(student)
    _, is_even, _ = claims[0]
    if not is_even:  # a router that puts all sessions on one worker is held against one that does not
        home = {session: n % ENGINES for n, session in enumerate(home)}

    async def measure(run: Run) -> None:
        model, prompts = run.model, {}
        for session, turn in arrivals():
            prompts[session, turn] = model.encode(conversation(report(session, CONTEXT_TOKENS, about_tokens), turn))
        longest = max(map(len, prompts.values()))
        length, suffix = longest + OUTPUT_TOKENS, min(2 * model.block_size, longest // 2)
        workers = await start_workers(
            run,
            enable_prefix_caching=not run.args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=model.kv_bytes(len(sent) + 2, length),  # nothing is evicted
            graph_tokens=suffix,
        )
        await run.warm_up(longest, suffix)
        with run.timed("measuring"):
            for n, request in enumerate(sent):
                ids = prompts[request.session, request.turn]
                await workers[request.worker].ask(ids, "main", "student", n, session=request.session)
        tell(run, sent, needed_tokens(home, prompts, model.block_size))
        for claim, holds, evidence in claims:
            run.claim(claim, holds, evidence)

    return measure


def tell(run: Run, sent: list[Sent], needed: int) -> None:
    """Print who was found where and what is lost, and claim the hit rate."""
    measured = run.measured("main", "student")
    run.print(f"[bold]{'session':<14}{'requests':>9}{'per worker':>12}{'prompt':>9}{'cached':>9}{'hit rate':>10}")
    for session in sorted({request.session for request in sent}):
        rows = [m for m in measured if m.session == session]
        per_worker = " ".join(str(sum(m.worker == worker for m in rows)) for worker in range(ENGINES))
        prompt, cached = sum(m.prompt_tokens for m in rows), sum(m.cached_tokens for m in rows)
        run.print(f"{session:<14}{len(rows):>9}{per_worker:>12}{prompt:>9,}{cached:>9,}{cached / prompt:>10.1%}")
    cached, lengths = [m.cached_tokens for m in measured], [m.prompt_tokens for m in measured]
    tell_hit_rate(run, sum(lengths), sum(cached), needed)
    lost = lost_by_moving(sent, cached, lengths, run.model.block_size)
    if lost:
        total = sum(tokens for _, tokens in lost)
        run.print(
            f"[bold]Still lost[/] by {len(lost)} requests that did not come back to their worker: {total:,} tokens"
        )
    for request, tokens in sorted(lost, key=lambda item: -item[1])[:5]:
        run.print(f"  {request.session}, turn {request.turn}, sent to worker-{request.worker}: {tokens:,} tokens lost")


if __name__ == "__main__":  # the other process of `homes_elsewhere`
    # on a line of its own, whatever the student's function prints
    print("\n" + json.dumps(homes(load(Path(sys.argv[1]), "route"), SESSIONS[:200], WORKERS)))
