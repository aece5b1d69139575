"""Lesson 4: sessions that stay with their worker against round robin.

A KV cache lives in one process. With several workers behind a load balancer,
a conversation's next turn finds its past only on the worker that computed it.

  bad   round robin: each request goes to the next worker
  good  session affinity: `session_id` decides, by rendezvous hashing. Every
        worker gets a score from a hash of session and worker, the best wins.
        Nothing is stored, all routers agree, and when a worker is lost only
        its own sessions move

Each arm sends the same sessions in the same order to the same vLLM workers,
each on cores of its own (on a GPU of its own where there are enough). The arms
take turns; within a turn all sessions send at once. What sessions share, the
system prompt, is primed once per worker. The order in which they arrive is
shuffled each turn: else six sessions on two workers would come back to the same
one each turn, and round robin would be sticky by accident. Order and lengths of
the sessions come from the printed seed.

Request n is turn n of a session, `--requests` the most turns of one. Turn 0
fills the cache and is left out of the comparison and the claims.

--deeper adds: the price of stickiness (a hot session that sends half of all
requests; bounded load and prefix-aware routing as ways out), and the loss of
a worker, computed for 5,000 sessions on eight, and live on these.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable

# What is not defined here stands below: questions (predict_first), instrument (Engine, ...), plumbing (Run, ...).

# --- the lesson: the same sessions sent to several vLLM workers, routed in two ways ---

INSTRUCTIONS = """\
You help engineers to read incident reports. Answer from the report that opens the conversation, in at most three
sentences. Quote times and names exactly. Say so when the report does not tell.
"""
PARTS = {
    "gateway": "takes requests from outside and passes them on; the first to show a fault, seldom its cause",
    "queue": "holds work until a worker is free; grows when workers are slow or lost",
    "scheduler": "decides which work is next and restarts what has stopped",
    "database": "keeps orders and accounts; one writer, two readers, a backup every night",
    "cache": "keeps answers for a minute; when it is empty, the database feels it",
    "billing job": "runs every hour and must not run twice at the same time",
    "search index": "is built anew on Sundays and read all week",
    "mail relay": "sends messages to customers, at most a thousand a minute",
}
SYSTEM = INSTRUCTIONS + "".join(f"{part}: {does}.\n" for part, does in PARTS.items())
EVENTS = (
    "reported a rising error rate",
    "was restarted by the agent on duty",
    "stopped answering health checks",
    "returned to normal latency",
    "was moved to another machine",
    "ran out of memory and was killed",
    "was rolled back to the release before",
)
QUESTIONS = (
    "What happened first?",
    "Which part failed longest, and who noticed?",
    "Was anything rolled back?",
    "Which step would you automate?",
    "Write one sentence for the status page.",
    "What is still open?",
)
ANSWER = "According to the report it began with the gateway; the times and the names are given in the lines above."


def report(session: str, tokens: int, count: Callable[[str], int]) -> str:
    """Return the incident report of one session, about `tokens` tokens as counted by `count`: its own long context."""
    dice, text = random.Random(session), f"{session}: incident report\n"
    while (missing := tokens - count(text)) > 0:
        for _ in range(1 + missing // 100):  # a line has less than 100 tokens: one too many at most
            at = f"{dice.randrange(24):02}:{dice.randrange(60):02}"
            part, event, requests = dice.choice(list(PARTS)), dice.choice(EVENTS), dice.randrange(100, 1000)
            text += f"{at} the {part} {event} ({requests} requests)\n"
    return text


def conversation(context: str, turn: int) -> list[dict]:
    """Return what a session sends in `turn`: all that was said before, and a question. Assistant turns are scripted."""
    said = [{"role": "system", "content": SYSTEM}]
    for n in range(turn + 1):
        question = QUESTIONS[n % len(QUESTIONS)]
        said.append({"role": "user", "content": f"{context}\n{question}" if n == 0 else question})
        said.append({"role": "assistant", "content": ANSWER})
    return said[:-1]


def schedule(lengths: dict[str, int], seed: int) -> list[list[str]]:
    """Return the sessions that send in each turn, in the order of their arrival."""
    dice, turns = random.Random(seed), range(max(lengths.values()))
    active = [[session for session, length in lengths.items() if turn < length] for turn in turns]
    return [dice.sample(sessions, len(sessions)) for sessions in active]


class RoundRobin:
    """Each request goes to the next worker."""

    def __init__(self, workers: int) -> None:
        self.next = itertools.cycle(range(workers))

    def route(self, session: str, ids: list[int]) -> int:
        return next(self.next)


def changes_workers(traffic: Traffic, workers: int) -> bool:
    """Say whether round robin takes any session to a second worker; with few sessions it may happen not to."""
    router, first_worker = RoundRobin(workers), {}
    for arrivals in traffic.arrivals:
        for session in arrivals:
            worker = router.route(session, [])
            if first_worker.setdefault(session, worker) != worker:
                return True
    return False


def rendezvous(session: str, workers: list[int]) -> list[int]:
    """Return the workers in a session's order of preference; to lose one changes nothing about the others."""

    def score(worker: int) -> bytes:
        return hashlib.sha256(f"{session}/{worker}".encode()).digest()

    return sorted(workers, key=score, reverse=True)


class Affinity:
    """A session goes where rendezvous hashing puts it."""

    def __init__(self, workers: int) -> None:
        self.workers = list(range(workers))

    def route(self, session: str, ids: list[int]) -> int:
        return rendezvous(session, self.workers)[0]


ARMS = {"bad": RoundRobin, "good": Affinity}


@dataclasses.dataclass
class Traffic:
    """What is sent: per session and turn the token ids of a prompt, and who arrives when."""

    prompts: dict[str, list[list[int]]]
    arrivals: list[list[str]]


async def send(
    workers: list[Engine], experiment: str, arm: str, turn: int, routed: list[tuple[str, int, list[int]]]
) -> None:
    """Send the requests of one turn at once, as session, worker and token ids.

    A session that sends several waits for each before the next.
    """
    queues: dict[str, list[tuple[int, list[int]]]] = {}
    for session, worker, ids in routed:
        queues.setdefault(session, []).append((worker, ids))

    async def send_in_order(session: str) -> None:
        for worker, ids in queues[session]:
            # The salt gives each arm a part of every worker's cache of its own.
            await workers[worker].ask(ids, experiment, arm, turn, session=session, salt=arm)

    await asyncio.gather(*map(send_in_order, queues))


def shared_prefixes(prompts: list[list[int]], block_size: int) -> list[list[int]]:
    """Return the leading blocks that prompts have in common, the shortest first."""
    shared = set()
    for one, other in itertools.pairwise(sorted(prompts)):  # those with most in common stand side by side
        blocks = common_prefix(one, other) // block_size
        shared.add(tuple(one[: blocks * block_size]))
    return sorted(map(list, shared - {()}), key=len)


async def prime(workers: list[Engine], arm: str, prompts: list[list[int]]) -> None:
    """Let every worker compute what sessions share, so that two that arrive together do not compute it twice."""
    for engine in workers:
        for ids in shared_prefixes(prompts, engine.block_size):
            await engine.ask(ids, "shared", arm, 0, salt=arm)


async def pair(run: Run, workers: list[Engine], traffic: Traffic) -> None:
    """Send turn after turn in both arms, and judge where the sessions found their past."""
    routers = {arm: router(len(workers)) for arm, router in ARMS.items()}
    for arm in ARMS:
        await prime(workers, arm, [prompts[0] for prompts in traffic.prompts.values()])
    lengths = sorted(map(len, traffic.prompts.values()))
    turns = f"{lengths[0]} to {lengths[-1]} turns"
    run.print(f"{len(lengths)} sessions of {turns}, shuffled every turn (seed {run.args.seed})")
    columns = f"{'cached / prompt':>17}{'hits':>6}{'TTFT':>10}"
    run.print(f"{'':13}[bold red]{'BAD: round robin':<36}[/][bold green]GOOD: session affinity")
    run.print(f"turn sessions{columns}{columns}")
    for turn, arrivals in enumerate(traffic.arrivals):
        for arm in in_turn(ARMS, turn):
            routed = []
            for session in arrivals:
                ids = traffic.prompts[session][turn]
                routed.append((session, routers[arm].route(session, ids), ids))
            await send(workers, "main", arm, turn, routed)
        row = f"{turn:<4}{len(arrivals):>9}"
        for arm in ARMS:
            sent = [m for m in run.measured("main", arm) if m.request == turn]
            counts = f"{sum(m.cached_tokens for m in sent):,} / {sum(m.prompt_tokens for m in sent):,}"
            row += f"{counts:>17}{hit_rate(sent):>6.0%}{milliseconds(median_ms(sent)):>10}"
        run.print(row)
    bad = [m for m in run.measured("main", "bad") if m.request > 0]
    good = [m for m in run.measured("main", "good") if m.request > 0]
    print_arms(run, bad, good, len(workers))
    claim_counts(run, traffic, bad, good)
    computed_bad, computed_good = (sum(m.computed_tokens for m in arm) for arm in (bad, good))
    run.print(
        f"\nThe same sessions, the same order: {computed_bad:,} tokens computed, {computed_good:,} with affinity."
    )
    run.result["verdict"] = [pair_verdict(pair_ratios(bad, good), sign_test=run.args.deeper)]
    run.print(*run.result["verdict"])


def print_arms(run: Run, bad: list[Measurement], good: list[Measurement], workers: int) -> None:
    """Print both arms side by side, and by turn what the same request took in both."""
    run.print_comparison(bad, good)
    row = "{:<36}{:>20}{:>20}"
    run.print(row.format("TTFT, p90", milliseconds(p90(bad)), milliseconds(p90(good))))
    requests = [per_worker(arm, workers, lambda m: 1) for arm in (bad, good)]
    run.print(row.format("requests per worker", *requests))
    computed = [per_worker(arm, workers, lambda m: m.computed_tokens) for arm in (bad, good)]
    run.print(row.format("computed tokens per worker", *computed))

    titles, faster, medians = "", "", ""
    for turn in sorted({m.request for m in bad})[:5]:
        ratios = pair_ratios([m for m in bad if m.request == turn], [m for m in good if m.request == turn])
        titles += f"{f'turn {turn}':>8}"
        faster += f"{f'{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}':>8}"
        medians += f"{f'{statistics.median(ratios):.1f}x':>8}"
    run.print(f"\n[bold]{'the same request, bad / good':<36}{titles}")
    run.print(f"{'faster with affinity':<36}{faster}\n{'median of the ratios':<36}{medians}")


def claim_counts(run: Run, traffic: Traffic, bad: list[Measurement], good: list[Measurement]) -> None:
    """Claim what the token counts must show: who found a session's past, and who could not."""
    kept, found_all = 0, True
    for m in good:
        turns = traffic.prompts[m.session]
        in_common = run.model.whole_blocks(common_prefix(turns[m.request - 1], turns[m.request]))
        kept += in_common
        found_all = found_all and m.cached_tokens >= in_common
    evidence = f"{sum(m.cached_tokens for m in good):,} tokens found, {kept:,} were there"
    run.claim("affinity: every turn finds its session's past", found_all, evidence)
    moved_bad, moved_good = moves(run.measured("main", "bad")), moves(run.measured("main", "good"))
    evidence = f"{moved_bad} and {moved_good} moves to a worker that is new to the session"
    run.claim("round robin changes workers, affinity does not", moved_bad > 0 and moved_good == 0, evidence)
    computed_bad, computed_good = (sum(m.computed_tokens for m in arm) for arm in (bad, good))
    evidence = f"{computed_good:,} of {computed_bad:,} tokens"
    run.claim("affinity computes fewer tokens", computed_good < computed_bad, evidence)


def moves(measured: list[Measurement]) -> int:
    """Count how often a session comes to a worker that is new to it; its first worker is no move."""
    pairs = {(m.session, m.worker) for m in measured}
    return len(pairs) - len({session for session, _ in pairs})


def pair_ratios(bad: list[Measurement], good: list[Measurement]) -> list[float]:
    """Return, for every turn of every session, its TTFT in `bad` by that in `good`: like is compared with like."""
    good_ttft = {(m.session, m.request): m.ttft_ms for m in good}
    return [m.ttft_ms / good_ttft[m.session, m.request] for m in bad]


def pair_verdict(ratios: list[float], sign_test: bool, cause: str = "affinity") -> str:
    """Say how many requests were faster with affinity, or another `cause`, and by how much.

    p is how probable so uneven a count would be if both arms were equally fast.
    """
    faster, count = sum(ratio > 1 for ratio in ratios), len(ratios)
    verdict = f"TTFT of the same request: {faster} of {count} faster with {cause}"
    if 2 * faster <= count:
        return f"{verdict}: no speed-up is shown."
    tail = sum(math.comb(count, n) for n in range(faster, count + 1)) / 2**count
    p = f"\n(sign test, two-sided: p = {min(1.0, 2 * tail):.1g})" if sign_test else ""
    return f"{verdict}, median ratio {statistics.median(ratios):.1f}.{p}"


def p90(arm: list[Measurement]) -> float:
    """Return the TTFT in ms that nine of ten requests do not exceed."""
    times = sorted(m.ttft_ms for m in arm)
    return times[math.ceil(0.9 * len(times)) - 1]


def per_worker(arm: list[Measurement], workers: int, value: Callable[[Measurement], int]) -> str:
    """Return the sum of a value for each worker; for many workers the least and the greatest."""
    sums = [sum(value(m) for m in arm if m.worker == worker) for worker in range(workers)]
    return " ".join(f"{n:,}" for n in sums) if workers < 4 else f"{min(sums):,} to {max(sums):,}"


def make_traffic(run: Run) -> Traffic:
    """Make the sessions' prompts and their order; LessonError where they do not fit, or would show nothing."""
    model, args, dice = run.model, run.args, random.Random(run.args.seed)
    lengths, prompts = {}, {}
    check_size(model, args)
    for n in range(args.sessions):
        lengths[f"session-{n:02}"] = dice.randint(max(2, args.requests - 2), args.requests)
    with run.timed(None, "Making prompts..."):
        for name, turns in lengths.items():
            context = report(name, args.prefix_tokens, model.count)
            prompts[name] = [model.encode(conversation(context, turn)) for turn in range(turns)]
    traffic = Traffic(prompts, schedule(lengths, args.seed))
    context = report("session-00", args.prefix_tokens, model.count)
    check_template(model, [conversation(context, turn) for turn in range(args.requests)])
    if not changes_workers(traffic, args.workers):
        accident = f"with --seed {args.seed} round robin takes each session to one worker only, by accident"
        raise UsageError(f"{accident}: choose another --seed, or more --sessions")
    run.environment |= {"workers": args.workers, "sessions": args.sessions, "seed": args.seed}
    return traffic


async def lesson(run: Run) -> None:
    """Make the traffic, start the workers, and send it in both ways."""
    model, args, traffic, hot = run.model, run.args, make_traffic(run), []
    if args.deeper:
        context = report("hot", args.prefix_tokens, model.count)
        requests = sum(map(len, traffic.prompts.values()))
        hot = [model.encode(conversation(context, turn)) for turn in range(requests)]
    longest = max(map(len, itertools.chain(hot, *traffic.prompts.values())))
    suffix = max(map(model.suffix, traffic.prompts.values()))
    length = longest + OUTPUT_TOKENS

    # Each worker is an AsyncLLMEngine with these of vLLM's arguments. `ask` predicts what its cache will find, sends
    # token ids with SamplingParams(max_tokens=1), times the first token, and reads what was found: num_cached_tokens.
    workers = await start_workers(
        run,
        enable_prefix_caching=not args.no_prefix_caching,
        max_model_len=length,
        max_num_batched_tokens=length,  # a prompt alone is computed in one step
        kv_cache_memory_bytes=model.kv_bytes(2 * args.sessions + 2, length),  # room for both arms: nothing is evicted
        graph_tokens=args.sessions * suffix,  # ours: on a GPU, steps this short are replayed as one CUDA graph
    )
    await run.warm_up(longest, suffix)
    questions = first_move_and_return(traffic, args.workers, model.block_size)
    answers = predict_first(run, questions)
    with run.timed("measuring"):
        await pair(run, workers, traffic)
        tell_score(run, questions, answers)
        if args.deeper:
            await hot_session(run, workers, traffic, hot)
            await lost_worker(run, workers, traffic)


def first_move_and_return(traffic: Traffic, workers: int, block_size: int) -> list[Question]:
    """Ask about the first request that round robin takes to a worker new to its session, and about the next return."""
    shared = max(shared_prefixes([turns[0] for turns in traffic.prompts.values()], block_size), key=len, default=[])
    router, visits, questions = RoundRobin(workers), {}, []
    for turn, arrivals in enumerate(traffic.arrivals):
        for session in arrivals:
            worker, ids = router.route(session, []), traffic.prompts[session]
            last_turn = visits.get((session, worker))  # on this worker
            if turn and last_turn is None and not questions:
                new = f"ROUND ROBIN, {session}, turn {turn}, on a worker that is new to it"
                same = f"AFFINITY, the same request, on the worker of turn {turn - 1}"
                questions.append(Question(new, "bad", turn, shared, ids[turn], session))
                questions.append(Question(same, "good", turn, ids[turn - 1], ids[turn], session))
            elif len(questions) == 2 and last_turn is not None:
                back = f"ROUND ROBIN, {session}, turn {turn}, where it was in turn {last_turn}"
                questions.append(Question(back, "bad", turn, ids[last_turn], ids[turn], session))
            visits[session, worker] = turn
    return questions


def check_template(model: Model, turns: list[list[dict]]) -> None:
    """Raise LessonError unless the template renders each turn as a prefix of the next, token for token."""
    for n, (before, after) in enumerate(itertools.pairwise(turns)):
        ids, longer = model.encode(before, answer=False), model.encode(after)
        at = common_prefix(ids, longer)
        if at < len(ids):
            raise LessonError(
                f"the model's chat template is not prefix-stable, turn {n + 1} departs from turn {n} at token {at} "
                f"({model.tokenizer.decode(ids[at : at + 8])!r}): no turn finds the one before it; choose a --model "
                "whose template leaves old messages as they were"
            )


def sessions_parser(doc: str) -> argparse.ArgumentParser:
    parser = lesson_parser(doc, requests=5)
    add = parser.add_argument
    add("--workers", type=at_least(2), default=2, help="vLLM engines (default: 2)")
    add("--sessions", type=at_least(2, 1000), default=6, help="conversations at the same time (default: 6)")
    add("--seed", type=at_least(0), default=0, help="of arrival order and session lengths (default: 0)")
    return parser


def main() -> int:
    return run_lesson(parse(sessions_parser(__doc__)), lesson)


# --- the lesson, --deeper: further experiments ---


class BoundedAffinity:
    """Affinity, but no worker takes more than `bound` times its share of the requests so far; the next best does."""

    def __init__(self, workers: int, bound: float = 1.25) -> None:
        self.requests, self.bound = [0] * workers, bound

    def route(self, session: str, ids: list[int]) -> int:
        most = math.ceil(self.bound * (sum(self.requests) + 1) / len(self.requests))
        workers = rendezvous(session, list(range(len(self.requests))))
        worker = next(worker for worker in workers if self.requests[worker] < most)
        self.requests[worker] += 1
        return worker


class PrefixAware:
    """The worker that was sent the longest prefix of a prompt gets it; among equals the one with fewest requests."""

    def __init__(self, workers: int, block_size: int, everywhere: list[list[int]]) -> None:
        self.known, self.requests = [CacheModel(block_size) for _ in range(workers)], [0] * workers
        for known, ids in itertools.product(self.known, everywhere):
            known.store(ids)  # all workers hold this; not knowing that, new sessions would all follow the first one

    def route(self, session: str, ids: list[int]) -> int:
        worker = max(range(len(self.known)), key=lambda w: (self.known[w].cached_tokens(ids), -self.requests[w]))
        self.known[worker].store(ids)
        self.requests[worker] += 1
        return worker


async def hot_session(run: Run, workers: list[Engine], traffic: Traffic, hot: list[list[int]]) -> None:
    """One session sends half of all requests: what stickiness costs, and what bounded load gives back of it."""
    count = len(workers)
    first_prompts = [prompts[0] for prompts in traffic.prompts.values()] + hot[:1]
    everywhere = shared_prefixes(first_prompts, run.model.block_size)
    policies = {
        "round robin": RoundRobin(count),
        "affinity": Affinity(count),
        "bounded load": BoundedAffinity(count),
        "prefix-aware": PrefixAware(count, run.model.block_size, everywhere),
    }
    run.print("\n[bold]A hot session[/] sends half of all requests: stickiness has a price")
    run.print("policy         hit rate  TTFT median       p90   requests per worker  max / mean")
    rates, busiest = {}, {}
    for policy, router in policies.items():
        for engine in workers:
            await engine.reset()
        await prime(workers, policy, first_prompts)
        hot_prompts = iter(hot)
        for turn, arrivals in enumerate(traffic.arrivals):
            senders = arrivals + ["hot"] * len(arrivals)
            routed = []
            for session in random.Random(run.args.seed + turn).sample(senders, k=len(senders)):
                ids = next(hot_prompts) if session == "hot" else traffic.prompts[session][turn]
                routed.append((session, router.route(session, ids), ids))
            await send(workers, "hot session", policy, turn, routed)
        sent = run.measured("hot session", policy)
        rates[policy], busiest[policy] = hit_rate(sent), max(Counter(m.worker for m in sent).values())
        spread = busiest[policy] * count / len(sent)
        times = f"{milliseconds(median_ms(sent)):>13}{milliseconds(p90(sent)):>10}"
        requests = per_worker(sent, count, lambda m: 1)
        run.print(f"{policy:<14}{rates[policy]:>9.1%}{times}{requests:>22}{spread:>12.2f}")
    evidence = f"{rates['affinity']:.1%} and {rates['round robin']:.1%}"
    run.claim("with a hot session too affinity finds more", rates["affinity"] > rates["round robin"], evidence)
    no_worse = busiest["bounded load"] <= busiest["affinity"]
    evidence = f"at most {busiest['bounded load']} and {busiest['affinity']} on one worker"
    run.claim("bounded load spreads the requests no worse than affinity", no_worse, evidence)


def moved_share(sessions: int, before: int, after: int) -> dict[str, float]:
    """Return which share of sessions changes workers when only the first `after` of `before` are left."""
    moved = {"rendezvous": 0, "modulo": 0}
    for n in range(sessions):
        name = f"session-{n}"
        order = rendezvous(name, list(range(before)))
        best_left = next(worker for worker in order if worker < after)
        moved["rendezvous"] += best_left != order[0]
        value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
        moved["modulo"] += value % before != value % after
    return {hashing: count / sessions for hashing, count in moved.items()}


async def lost_worker(run: Run, workers: list[Engine], traffic: Traffic) -> None:
    """Shut a worker down in the middle: its sessions move once, pay one cold turn, and go on."""
    share = moved_share(5000, 8, 7)
    shares = f"rendezvous moves {share['rendezvous']:.1%}, modulo {share['modulo']:.1%} of 5,000 sessions"
    run.print(f"\n[bold]A worker of 8 is lost[/]: {shares}")
    for engine in workers:
        await engine.reset()
    await prime(workers, "good", [prompts[0] for prompts in traffic.prompts.values()])
    router, middle = Affinity(len(workers)), min(map(len, traffic.prompts.values())) // 2  # all are there still
    homes = {session: router.route(session, []) for session in traffic.prompts}
    [(lost, _)] = Counter(homes.values()).most_common(1)
    for turn, arrivals in enumerate(traffic.arrivals):
        if turn == middle:
            run.end_engine(workers[lost])
            router.workers.remove(lost)
        routed = [(session, router.route(session, []), traffic.prompts[session][turn]) for session in arrivals]
        await send(workers, "lost worker", "good", turn, routed)
    sent = run.measured("lost worker", "good")
    run.print(f"live: worker {lost} of {len(workers)} is shut down before turn {middle}")
    turns = range(len(traffic.arrivals))[:7]
    run.print(f"{'hit rate in turn':<18}" + "".join(f"{turn:>8}" for turn in turns))
    run.print(f"{'its sessions':<18}{hit_rates([m for m in sent if homes[m.session] == lost], turns)}")
    run.print(f"{'the others':<18}{hit_rates([m for m in sent if homes[m.session] != lost], turns)}")

    moved = [m for m in sent if m.worker != homes[m.session]]
    only_its_own = all(homes[m.session] == lost for m in moved)
    evidence = f"{len({m.session for m in moved})} of {len(homes)} sessions moved"
    run.claim("only the sessions of the lost worker move", only_its_own, evidence)
    cold, later = [m for m in moved if m.request == middle], [m for m in moved if m.request > middle]
    if later:  # the shortest run ends with the cold turn
        best_cold = max(m.cached_tokens / m.prompt_tokens for m in cold)
        least_later = min(m.cached_tokens / m.prompt_tokens for m in later)
        evidence = f"at most {best_cold:.0%} found in turn {middle}, at least {least_later:.0%} later"
        run.claim("they pay one cold turn", best_cold < least_later, evidence)
    run.print(f"{len(sent)} of {sum(map(len, traffic.arrivals))} requests answered")


def hit_rates(measured: list[Measurement], turns: range) -> str:
    """Return the hit rate of each turn, as the cells of a row."""
    cells = ""
    for turn in turns:
        group = [m for m in measured if m.request == turn]
        cells += f"{f'{hit_rate(group):.0%}' if group else '-':>8}"
    return cells


# --- the lesson, its workers: where each runs, and whether they fit ---


async def start_workers(run: Run, **arguments: object) -> list[Engine]:
    """Start all workers together, each on its own cores, or on its own GPU where there are enough."""
    count = run.args.workers
    gpus, cores = worker_places(run.model.on_gpu, count)
    check_memory(run.model, arguments["kv_cache_memory_bytes"], sharing=1 if gpus else count)

    def start_one(worker: int) -> Engine:
        os.sched_setaffinity(0, cores[worker])  # of this thread, and of the engine that it makes
        return run.start_engine(worker=worker, **arguments)

    with run.timed("engine_start", f"Starting {count} vLLM workers..."):
        starting = []
        for worker in range(count):
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker]  # an engine inherits it when it is made
            before = len(multiprocessing.active_children())
            starting.append(asyncio.create_task(asyncio.to_thread(start_one, worker)))
            # Until its process is there: it inherits this thread's GPU, and the next one's is set then.
            while len(multiprocessing.active_children()) == before and not starting[-1].done():
                await asyncio.sleep(0.05)
        workers = await asyncio.gather(*starting)
    run.engines.sort(key=lambda engine: engine.worker)
    return workers


def check_size(model: Model, args: argparse.Namespace) -> None:
    """Raise LessonError where the longest prompt, or the KV of all, does not fit, before they are made."""
    longest = len(model.encode(conversation(report("session-00", args.prefix_tokens, model.count), args.requests - 1)))
    model.check_length(longest)
    gpus, _ = worker_places(model.on_gpu, args.workers)
    sharing = args.fleets * (1 if gpus else args.workers)
    check_memory(model, model.kv_bytes(2 * args.sessions, longest), sharing)


def worker_places(on_gpu: bool, count: int) -> tuple[list[str], list[list[int]]]:
    """Return a GPU for each worker, or none where they must share one, and the cores of each."""
    cores = sorted(os.sched_getaffinity(0))
    if on_gpu:
        import torch

        every = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        enough = len(gpus) >= count
        return gpus[:count] if enough else [], [cores] * count
    if count > len(cores):
        raise UsageError(f"--workers {count} needs as many cores, {len(cores)} are here")
    each = len(cores) // count
    return [], [cores[worker * each : (worker + 1) * each] for worker in range(count)]


def check_memory(model: Model, kv_bytes: int, sharing: int) -> None:
    """Raise LessonError unless `sharing` workers with so large a KV cache fit into what memory is free."""
    import psutil  # comes with vLLM
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.name, trust_remote_code=False)
        with torch.device("meta"):  # shapes without numbers
            shapes = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (*BROKEN_FILES, ImportError) as error:
        raise LessonError(f"the size of the model in {model.name} is not to be found: {telling_line(error)}") from error
    weights = sum(parameter.numel() for parameter in shapes.parameters()) * model.dtype.itemsize
    have = model.gpu_memory or psutil.virtual_memory().available
    need = sharing * (weights + kv_bytes + 2**30)  # and what an engine takes besides
    if need > have:
        sizes = f"{sharing} workers need {need / 2**30:.1f} GiB ({kv_bytes / 2**30:.1f} GiB of KV cache each)"
        advice = "take fewer --workers or --sessions, or a smaller --prefix-tokens"
        there = "there" if model.on_gpu else "free"
        raise LessonError(f"{sizes}, {have / 2**30:.1f} GiB are {there}: {advice}")


# --- the questions: predict first; the same in all four lessons ---

from typing import NamedTuple


class Question(NamedTuple):
    """How many tokens of `ids` does a request of the main experiment find, when `before` is what was sent before it?"""

    text: str
    arm: str
    request: int
    before: list[int]
    ids: list[int]
    session: str | None = None

    def layout(self) -> str:
        """Tell from the top what is the same as before and what is new, and what of the rest is the same again."""
        before, now = ("".join(map(chr, ids)) for ids in (self.before, self.ids))  # texts can be searched
        front = common_prefix(before, now)
        again = common_prefix(before[front:][::-1], now[front:][::-1])  # at the end
        middle, new = (front + len(now)) // 2, len(now) - front - again
        at = before.find(now[middle : middle + 64])
        if at >= 0:  # or around the middle
            left = common_prefix(before[:at][::-1], now[front:middle][::-1])
            right = common_prefix(before[at:], now[middle:])
            again, new = max((again, new), (left + right, middle - left - front))
        again_is = "the same again" if new else "the same but moved up"  # nothing is new before it: something is gone
        parts = (front, "the same"), (new, "new"), (again, again_is), (len(now) - front - new - again, "new")
        return f"{', '.join(f'{tokens:,} {what}' for tokens, what in parts if tokens)}: {len(now):,} tokens"


def read_line() -> str:
    """Read one line byte by byte: what a pipe holds behind it is for the next question, or the next lesson."""
    line = b""
    while len(line) < 80 and (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace").strip()


def predict_first(run: Run, questions: list[Question]) -> list[int | None]:
    """With --predict let the student say, before anything is measured, what each request finds; None: no answer."""
    answers: list[int | None] = []
    if not run.args.predict:
        return answers
    run.print(f"[bold]Predict first:[/] how many tokens are found, in blocks of {run.model.block_size}? (Enter skips)")
    for number, question in enumerate(questions, 1):
        run.print(f"{number}. {question.text}:\n   {question.layout()}", markup=False)
        for again in ("", "a whole number, or Enter "):
            run.print(f"   {again}> ", end="")
            line = read_line()
            is_number = line.isascii() and line.isdigit()
            run.print("" if os.isatty(0) else shown(line), markup=False)  # a terminal shows it by itself
            if is_number or not line:
                break
        answers.append(int(line) if is_number else None)
    run.print("")
    return answers


def tell_score(run: Run, questions: list[Question], answers: list[int | None]) -> None:
    """Hold each answer against what was measured, with the reason, and keep all of it for the JSON."""
    size, told, verdicts = run.model.block_size, [], ["exact", "within one block", "off"]
    for question, answer in zip(questions, answers, strict=False):
        of_session = [m for m in run.measured("main", question.arm) if m.session == question.session]
        [m] = [m for m in of_session if m.request == question.request]
        same, verdict = common_prefix(question.before, question.ids[:-1]), "skipped"
        if answer is not None:
            off = abs(answer - m.cached_tokens)
            verdict = verdicts[0 if off == 0 else 1 if off <= size else 2]
        why = f"{same:,} are the same: {same // size:,} whole blocks"
        told.append(dict(question=question.text, answer=answer, measured=m.cached_tokens, verdict=verdict, why=why))
        said = "-" if answer is None else f"{answer:,}"
        run.print("" if len(told) > 1 else f"\n[bold]{'you said':>10}{'found':>9}\n", end="")
        run.print(f"{said:>10}{m.cached_tokens:>9,}  {verdict:<18}{why}")
    if told:
        counts = [sum(row["verdict"] == verdict for row in told) for verdict in verdicts]
        run.print("{} exact, {} within one block, {} off".format(*counts))
        run.result["predictions"] = told


# --- the instrument: how it is measured; the same in all four lessons ---

import dataclasses
import itertools
import statistics
import time
import uuid
from collections.abc import Iterable, Iterator

OUTPUT_TOKENS = 64  # the most that a lesson lets a request generate


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One request: what was sent, what was predicted, what vLLM reported, and what the client's clock showed.

    TTFT is the time from the call to the first streamed output. It has three parts: `client_ms` (tokens in, hashed by
    block, and out), `waiting_ms` (queued until scheduled), and `step_ms` (the blocks found, and one forward pass). The
    last two are vLLM's own time stamps.
    """

    experiment: str
    arm: str
    request: int
    worker: int | None
    session: str | None
    prompt_tokens: int
    cached_tokens: int  # vLLM's num_cached_tokens
    predicted_cached_tokens: int
    ttft_ms: float
    error: None = None  # a request over HTTP may have one; one that fails here ends the lesson
    engine_ttft_ms: float | None = None
    waiting_ms: float | None = None
    step_ms: float | None = None
    client_ms: float | None = None
    tpot_ms: float | None = None  # decoding: first token to last, per token

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class CacheModel:
    """vLLM's prefix cache: a full block is found by the hash of its own tokens and of all blocks before it."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.blocks = block_size, set()

    def chain(self, ids: list[int], salt: str | None = None) -> Iterator[int]:
        parent = hash(salt)
        for end in range(self.block_size, len(ids) + 1, self.block_size):
            parent = hash((parent, *ids[end - self.block_size : end]))
            yield parent

    def cached_tokens(self, ids: list[int], salt: str | None = None) -> int:
        """Return how many leading tokens need no prefill. The last one always does: it gives the first output."""
        found = itertools.takewhile(self.blocks.__contains__, self.chain(ids[:-1], salt))
        return self.block_size * sum(1 for _ in found)

    def store(self, ids: list[int], salt: str | None = None) -> None:
        self.blocks.update(self.chain(ids, salt))


class CacheCounters:
    """vLLM's own `prefix_cache_queries` and `prefix_cache_hits`, in tokens, received as one of its stat loggers."""

    def __init__(self) -> None:
        self.queries = self.hits = 0

    def record(self, scheduler_stats=None, *_: object, **__: object) -> None:
        if scheduler_stats is not None:
            self.queries += scheduler_stats.prefix_cache_stats.queries
            self.hits += scheduler_stats.prefix_cache_stats.hits

    def log(self, *_: object) -> None:
        """vLLM calls this, under its three names, when a logger should print; there is nothing to print."""

    log_engine_initialized = record_sleep_state = log


class Engine:
    """vLLM's AsyncLLMEngine with the cache model beside it: token ids go in, measurements come out."""

    def __init__(self, vllm_engine, counters: CacheCounters, all_measured: list[Measurement], worker: int | None):
        cache = vllm_engine.vllm_config.cache_config
        self.vllm_engine, self.counters, self.all_measured, self.worker = vllm_engine, counters, all_measured, worker
        self.block_size: int = cache.block_size
        self.kv_cache_tokens: int = cache.num_gpu_blocks * cache.block_size
        self.cache_model = CacheModel(self.block_size)
        self.prompt_tokens = self.cached_tokens = 0  # of all requests, to be held against vLLM's counters
        self.output = None  # vLLM's RequestOutput of the latest request

    async def ask(
        self, ids: list[int], experiment: str, arm: str, request: int, *, session: str | None = None,
        salt: str | None = None, **sampling: object,
    ) -> Measurement:  # fmt: skip
        """Predict, send one prompt, read its stream to the end, and return both.

        A `salt` keeps equal prompts of different arms apart in the cache. `sampling` are fields of vLLM's
        SamplingParams beside these: one token, the likeliest, not made into text, which nobody reads here.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        predicted, first, output = self.cache_model.cached_tokens(ids, salt), None, None
        defaults = dict(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        prompt, params = tokens_input(ids, cache_salt=salt), SamplingParams(**defaults | sampling)
        sent = time.perf_counter()
        try:
            async for output in self.vllm_engine.generate(prompt, params, str(uuid.uuid4())):  # noqa: B007, read below
                first = first or time.perf_counter()
        except EngineDeadError as error:
            raise EngineError("the engine died") from error
        if first is None or output is None:
            raise EngineError(f"{experiment}, {arm}, request {request}: the stream ended without a token")
        self.output, written = output, output.outputs[0].token_ids
        self.cache_model.store([*ids, *written[:-1]], salt)  # nothing followed the last token, so it has no KV yet
        self.prompt_tokens += len(ids)
        self.cached_tokens += output.num_cached_tokens
        stats, ttft = output.metrics, first - sent
        engine_ttft, decoding = stats.first_token_ts - stats.queued_ts, stats.last_token_ts - stats.first_token_ts
        self.all_measured.append(
            Measurement(
                *(experiment, arm, request, self.worker, session, len(ids), output.num_cached_tokens, predicted),
                ttft_ms=ttft * 1000,
                engine_ttft_ms=engine_ttft * 1000,
                waiting_ms=(stats.scheduled_ts - stats.queued_ts) * 1000,
                step_ms=(stats.first_token_ts - stats.scheduled_ts) * 1000,
                client_ms=(ttft - engine_ttft) * 1000,
                tpot_ms=decoding * 1000 / (len(written) - 1) if len(written) > 1 else None,
            )
        )
        return self.all_measured[-1]

    async def reset(self) -> None:
        """Empty the prefix cache, and the model of it."""
        if not await self.vllm_engine.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache: a block is still in use")
        self.cache_model = CacheModel(self.block_size)

    async def warm_up(self, length: int, suffix: int) -> None:
        """Send unrelated tokens: `length` new ones, then hits of which `suffix` are new, and forget them.

        There are hits until two in a row take equally long, within a tenth, and eight at most.
        """
        times = [(await self.ask([6] * length, "warm_up", "decoy", 0)).ttft_ms]
        while len(times) < 3 or (len(times) < 9 and abs(times[-1] - times[-2]) > times[-2] / 10):
            ids = [6] * (length - suffix) + [6 + len(times)] * suffix
            times.append((await self.ask(ids, "warm_up", "decoy", len(times))).ttft_ms)
        await self.reset()


def in_turn(arms: Iterable, n: int) -> list:
    """Return the arms in the order of round n: bad good, good bad, ..., so that a drifting machine favours neither."""
    return list(arms) if n % 2 == 0 else list(arms)[::-1]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many leading tokens two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def hit_rate(measured: list[Measurement]) -> float:
    return sum(m.cached_tokens for m in measured) / sum(m.prompt_tokens for m in measured)


def median_ms(measured: list[Measurement], what: str = "ttft_ms") -> float:
    return statistics.median(getattr(m, what) for m in measured)


def time_verdict(bad: list[Measurement], good: list[Measurement], alone: bool = True) -> str:
    """Say what TTFT did and no more: a speed-up only where the two ranges lie apart.

    The bound is what computing fewer tokens can give at most. Requests that are not `alone` also wait, so have none.
    """
    slow, fast = median_ms(bad), median_ms(good)
    change = f"{milliseconds(slow)} to {milliseconds(fast)}"
    if slow <= fast:
        return f"TTFT did not improve ({change}): nothing gained at this prompt length."
    if min(m.ttft_ms for m in bad) <= max(m.ttft_ms for m in good):
        return f"TTFT went from {change}, but the ranges overlap: no speed-up is shown."
    bound = sum(m.computed_tokens for m in bad) / sum(m.computed_tokens for m in good)
    limit = f"of at most {bound:.0f}x" if slow / fast <= bound else f"with {bound:.0f}x fewer"
    return f"TTFT fell from {change}: {slow / fast:.1f}x" + (f" {limit} (tokens computed)." if alone else ".")


# --- the plumbing: skip this; the same in all four lessons ---

import argparse
import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
GRAPH_TOKENS = 2048  # the longest step that is captured as a CUDA graph: each size takes memory and time
BROKEN_FILES = ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError  # by readers of a model's
NOWHERE_TO_WRITE = errno.EIO, errno.ENOSPC, errno.EPIPE  # a terminal, a disk, or a reader is gone
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


class LessonError(Exception):
    """A foreseeable fault, told in one line that says what to do; `status` is 2 for wrong usage."""

    status = 1


class UsageError(LessonError):
    status = 2


class EngineError(LessonError):
    """vLLM failed; the root cause is in its log."""


class Model:
    """What is known of a model, and of the machine, before an engine is started. Nothing of it changes."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform

        if not current_platform.device_type:
            raise LessonError("this vLLM was built for a GPU that does not answer: run `python3 setup_and_test.py`")
        self.on_gpu: bool = not current_platform.is_cpu()
        self.gpu_memory: int = current_platform.get_device_total_memory() if self.on_gpu else 0  # bytes, of one GPU
        self.name = name if args.model else built_in_model(self.gpu_memory // (args.workers * args.fleets))
        folder = Path(self.name)
        is_folder = args.model is None or Path(args.model).is_dir()
        self.label = f"{folder.parent.name}/{folder.name}" if is_folder else args.model
        self.has_weights = not folder.is_dir() or any(list(folder.glob(kind)) for kind in WEIGHT_FILES)
        # Blocks of 32 on a GPU: of 16 twice as many are hashed, of 128 a hit computes more. "uni": in the engine's own
        # process. The cache's size is given, the utilization but a check. A hybrid manager drops what windows left.
        self.engine_args = dict(
            model=self.name, trust_remote_code=False, load_format="auto" if self.has_weights else "dummy",
            block_size=args.block_size or (32 if self.on_gpu else None), distributed_executor_backend="uni",
            gpu_memory_utilization=0.1, max_num_seqs=16, disable_hybrid_kv_cache_manager=True,
            worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
        )  # fmt: skip
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, mistral_format=False, trust_remote_code=False)
            config = AsyncEngineArgs(**self.engine_args, enforce_eager=True).create_engine_config()
        except (*BROKEN_FILES, StrictDataclassError) as error:
            fault = EngineError if "the logs" in str(error) else LessonError  # the log is shown with an EngineError
            raise fault(f"vLLM cannot use the model in {self.name}: {telling_line(error)}") from error
        if not self.count("one two three"):
            raise LessonError(f"{self.name} has no tokenizer that makes tokens of a text")
        shape, parallel = config.model_config, config.parallel_config
        if shape.is_hybrid or shape.is_attention_free or shape.is_encoder_decoder or shape.runner_type != "generate":
            raise LessonError(f"{self.name} is not a full-attention model that writes; no hits can be predicted here")
        self.block_size: int = config.cache_config.block_size
        self.hash_algo: str = config.cache_config.prefix_caching_hash_algo
        self.dtype, self.vocabulary, self.max_model_len = shape.dtype, shape.get_vocab_size(), shape.max_model_len
        full = "full_attention" in (shape.hf_text_config.to_dict().get("layer_types") or ())
        self.window: int | None = None if full else shape.get_sliding_window() or shape.attention_chunk_size
        numbers = 2 * shape.get_num_layers(parallel) * shape.get_num_kv_heads(parallel) * shape.get_head_size()
        self.kv_bytes_per_token: int = numbers * shape.dtype.itemsize

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        return len(self.tokens(text))

    def render(self, messages: list[dict], answer: bool = True) -> str:
        """Return a chat as the template writes it, to where the answer begins or the last message ends."""
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
        except (*BROKEN_FILES, RecursionError, TemplateError) as error:
            raise LessonError(f"the model's chat template does not take this prompt: {telling_line(error)}") from error
        for message in messages:
            lines = [line.strip() for line in message["content"].splitlines() if line.strip()]
            if text and lines and not any(line in text for line in lines):
                raise LessonError(f"the chat template leaves {message['role']} messages out: choose another --model")
        return text

    def encode(self, messages: list[dict], answer: bool = True) -> list[int]:
        """Return the token ids of a chat; the template writes the special tokens itself."""
        ids = self.tokens(self.render(messages, answer))
        if not 0 <= max(ids, default=-1) < self.vocabulary:
            fault = "knows no tokens of" if ids else "writes nothing of"
            raise LessonError(f"the model in {self.name} {fault} this prompt: its files do not fit together")
        return ids

    def whole_blocks(self, tokens: int) -> int:
        return tokens // self.block_size * self.block_size

    def kv_bytes(self, prompts: int, tokens: int) -> int:
        """Return the size of the KV of so many prompts of so many tokens each, in whole blocks."""
        return prompts * self.whole_blocks(tokens + self.block_size - 1) * self.kv_bytes_per_token

    def suffix(self, prompts: list[list[int]]) -> int:
        """Return the most tokens that are computed of a prompt that comes after the one before it."""
        pairs = itertools.pairwise(prompts)
        return max(len(after) - self.whole_blocks(common_prefix(before, after)) for before, after in pairs)

    def check_length(self, tokens: int) -> None:
        """Raise UsageError where the model takes no prompt and answer of so many tokens, or looks not back so far."""
        limit = f"prompt and answer need {tokens:,} tokens, the model takes {self.max_model_len:,}"
        if self.window and self.window < self.max_model_len:
            limit = f"every layer of this model has a sliding window, of {self.window:,} tokens"
        if tokens > min(self.window or tokens, self.max_model_len):
            raise UsageError(f"{limit}: choose a shorter prompt (--prefix-tokens), or another --model")


class WorkerExtension:
    """What vLLM's worker is asked beyond its own methods: it alone knows what its attention backend takes."""

    def execution(self) -> str:
        """Say how prefill steps run: kernels replayed as one CUDA graph, or launched one by one."""
        return "CUDA graphs" if str(self.vllm_config.compilation_config.cudagraph_mode) == "FULL" else "eager"


class Run:
    """One run of a lesson: its model and engines, and all that it prints, claims and writes."""

    def __init__(self, args: argparse.Namespace, terminal) -> None:
        from rich.console import Console

        self.args, self.console = args, Console(file=terminal, width=80, highlight=False, soft_wrap=True)
        self.print = self.console.print  # a row stays one row, so that tests see it where it has more than 80 columns
        self.engines: list[Engine] = []
        self.measurements: list[Measurement] = []  # in the order of time
        self.claims: list[dict] = []
        self.seconds = dict.fromkeys(("imports", "engine_start", "warm_up", "measuring"), 0.0)
        try:
            name = find_model(args.model) if args.model else built_in_model(0)  # is it there? that costs no import
            with self.timed("imports", "Importing vLLM..."):
                gc.disable()  # imports leave no garbage; to look for it takes a quarter of their time
                import torch
                import transformers
                import vllm
                from vllm import AsyncLLMEngine  # noqa: F401, the engine is imported here, too
                from vllm.platforms import current_platform

                gc.freeze(), gc.enable()
        except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            raise LessonError(f"cannot import vLLM: {telling_line(error)}; is a library or memory missing?") from error
        self.model = model = Model(args, name)
        if args.prefix_tokens is None:
            args.prefix_tokens = 8000 if model.on_gpu else 4000
        if 0 < args.prefix_tokens < 2 * model.block_size:
            raise UsageError(f"--prefix-tokens must be at least two blocks, {2 * model.block_size} tokens here")
        model.check_length(args.prefix_tokens + OUTPUT_TOKENS)
        cores = len(os.sched_getaffinity(0))
        command = [re.sub(r"(^|=)/(?:\S*/)?", r"\1", word) for word in sys.orig_argv[1:]]  # no path of this machine
        script, config = Path(sys.argv[0]).stem, Path(model.name) / "config.json"
        title, *_ = (sys.modules["__main__"].__doc__ or script).splitlines()  # under -OO there is no docstring
        self.environment = {
            "vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": sys.version.split()[0], "model": model.label,
            "device": current_platform.get_device_name() if model.on_gpu else f"CPU ({cores} cores)",
            "weights": "real" if model.has_weights else "random", "dtype": str(model.dtype).removeprefix("torch."),
            "block_size": model.block_size, "prefix_caching_hash_algo": model.hash_algo,
            "prefix_tokens": args.prefix_tokens, "requests": args.requests,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(["python", *command]),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None,
        }  # fmt: skip
        self.result = {
            "schema": 1, "lesson": script, "title": title, "environment": self.environment,
            "seconds": self.seconds, "measurements": self.measurements, "claims": self.claims,
        }  # fmt: skip

    def measured(self, experiment: str, arm: str) -> list[Measurement]:
        return [m for m in self.measurements if (m.experiment, m.arm) == (experiment, arm)]

    def claim(self, claim: str, holds: bool, evidence: str) -> None:
        self.claims.append({"claim": claim, "holds": holds, "evidence": evidence})

    @contextlib.contextmanager
    def timed(self, what: str | None, label: str = "") -> Iterator[None]:
        """Add the seconds that pass inside to `seconds[what]`; a terminal shows the label and counts along."""
        from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

        began, hidden = time.perf_counter(), not (label and self.console.is_terminal)
        hide = dict(disable=hidden, redirect_stdout=False, redirect_stderr=False)  # else a forked engine prints here
        with Progress(SpinnerColumn(), label, TimeElapsedColumn(), console=self.console, transient=True, **hide) as bar:
            bar.add_task(label)
            yield
        if what:
            self.seconds[what] += time.perf_counter() - began

    def start_engine(self, graph_tokens: int, worker: int | None = None, **arguments: object) -> Engine:
        """Start vLLM with these of its AsyncEngineArgs beside those of all lessons; UsageError, or EngineError.

        On a GPU a step of up to `graph_tokens` is one replay of a CUDA graph where vLLM can capture one, else eager.
        """
        from vllm import AsyncEngineArgs, AsyncLLMEngine
        from vllm.platforms import current_platform

        self.model.check_length(arguments["max_model_len"])
        counters, capture, eager = CacheCounters(), graph_sizes(graph_tokens), {"enforce_eager": True}
        graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": capture}}
        for way in [graphs, eager] if current_platform.is_cuda_alike() else [eager]:
            try:
                config = AsyncEngineArgs(**self.model.engine_args | arguments | way).create_engine_config()
                if arguments["enable_prefix_caching"] and not config.cache_config.enable_prefix_caching:
                    raise LessonError(f"vLLM has no prefix caching for {self.model.name} here: choose another --model")
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # what is imported here need not be once more
                vllm_engine = AsyncLLMEngine.from_vllm_config(config, stat_loggers=[lambda *_: counters])
                break
            except (MemoryError, OSError, RuntimeError, ValueError) as error:
                if way is eager:
                    raise EngineError("vLLM did not start") from error
        engine = Engine(vllm_engine, counters, self.measurements, worker)
        self.engines.append(engine)
        if engine.block_size != self.model.block_size:  # some backends decide only once the engine is there
            raise UsageError(f"this device wants other blocks: add --block-size {engine.block_size}")
        return engine

    def end_engine(self, engine: Engine) -> None:
        """End vLLM's processes at once, which have nothing left to save, and wait until their memory is free."""
        processes = engine.vllm_engine.engine_core.resources.engine_manager.processes
        engine.vllm_engine.shutdown(timeout=0)
        for process in processes:
            process.join()

    async def warm_up(self, length: int, suffix: int) -> None:
        """Warm up all engines at once, and print what the numbers will depend on."""
        with self.timed("warm_up", "Warming up..."):
            await asyncio.gather(*(engine.warm_up(length, suffix) for engine in self.engines))
        [execution] = await self.engines[0].vllm_engine.collective_rpc("execution")
        self.environment |= {"kv_cache_tokens": self.engines[0].kv_cache_tokens, "execution": execution}
        banner = (
            "vLLM {vllm} on {device}, {model} with {weights} weights, {dtype}\n"
            "blocks of {block_size} tokens ({prefix_caching_hash_algo}), KV cache of {kv_cache_tokens:,} tokens, "
            "{execution}\nimports {imports:.1f} s, engine start {engine_start:.1f} s, warm-up {warm_up:.1f} s\n"
        ).format_map(self.environment | self.seconds)
        self.print("\n".join(map(shown, banner.split("\n"))), markup=False, soft_wrap=False)  # names may be long

    def bar(self, share: float, width: int) -> str:
        return ("\u2588" if self.console.encoding.startswith("utf") else "#") * round(width * share)

    def print_pair_head(self, bad: str, good: str) -> None:
        columns = f"{'TTFT':>8}{'cached / prompt':>17}{'predicted':>10}"
        self.print(f"{'':7}[bold red]{'BAD: ' + bad:<37}[bold green]GOOD: {good}")
        self.print(f"{'':7}{columns}  {columns}")

    def print_pair(self, request: int, *measured: Measurement) -> None:
        row = f"{request:<3}{'' if request else 'fill':4}"
        for m in measured:
            counts = f"{m.cached_tokens:>8,} / {m.prompt_tokens:<6,}{m.predicted_cached_tokens:>10,}"
            row += f"{milliseconds(m.ttft_ms):>8}{counts}  "
        self.print(row.rstrip())

    def print_comparison(self, *arms: list[Measurement]) -> None:
        rows = {
            "hit rate (cached / prompt tokens)": [f"{hit_rate(arm):.1%}" for arm in arms],
            "tokens computed": [f"{sum(m.computed_tokens for m in arm):,}" for arm in arms],
            "TTFT, median": [milliseconds(median_ms(arm)) for arm in arms],
            "TTFT, range": [ttft_range(arm) for arm in arms],
        }
        self.print(f"\n[bold]{'without request 0':<36}{'bad':>20}{'good':>20}")
        for name, (bad, good) in rows.items():
            self.print(f"{name:<36}{bad:>20}{good:>20}")

    def print_break(self, which: str, before: list[int], after: list[int]) -> None:
        """Show where two prompts first differ, and which blocks that costs."""
        at, blocks = common_prefix(before, after), len(after) // self.model.block_size
        lost = blocks - at // self.model.block_size
        self.print(f"\n{which} first differ at token {at:,} of {len(after):,}: {lost} of {blocks} blocks lost")
        texts = [self.model.tokenizer.decode(ids[max(0, at - 24) : at + 6]) for ids in (before, after)]
        self.result["break"] = dict(token=at, of=len(after), blocks_lost=lost, blocks=blocks, texts=texts)
        for text in map(repr, texts):
            most = 78 if text.isascii() else 39  # others may take two columns each
            self.print(f"  {text if len(text) <= most else f'...{text[3 - most :]}'}", markup=False)

    def finish(self) -> int:
        """Check every prediction, print the failed claims, write the JSON, and return the exit status."""
        wrong = [m for m in self.measurements if m.cached_tokens != m.predicted_cached_tokens]
        evidence = f"{len(self.measurements) - len(wrong)} of {len(self.measurements)} requests"
        for m in wrong[:1]:
            evidence += f"; first in {m.experiment}, {m.arm}, request {m.request}: "
            evidence += f"{m.cached_tokens:,} cached, {m.predicted_cached_tokens:,} predicted"
        self.claim("predicted = measured cached tokens on every request", not wrong, evidence)
        counted = sum(e.counters.hits for e in self.engines), sum(e.counters.queries for e in self.engines)
        summed = sum(e.cached_tokens for e in self.engines), sum(e.prompt_tokens for e in self.engines)
        evidence = "hits / queries {:,} / {:,}; requests {:,} / {:,}".format(*counted, *summed)
        self.claim("vLLM's own counters agree with the requests", counted == summed, evidence)
        failed = [claim for claim in self.claims if not claim["holds"]]
        for claim in failed:
            self.print(f"\n[bold red]FAILED[/]: {claim['claim']}\n  {claim['evidence']}", soft_wrap=False)
        held = f"{len(self.claims) - len(failed)} of {len(self.claims)} claims about token counts hold"
        control = "\nthe control, without the cache: claims are meant to fail" if self.args.no_prefix_caching else ""
        self.print(f"\n{held}; measuring took {self.seconds['measuring']:.1f} s{control}")
        if self.args.json:
            write_json(self.args.json, self.result)
        return 1 if failed else 0


def milliseconds(value: float) -> str:
    """Write a time given in ms with three digits."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def ttft_range(measured: list[Measurement]) -> str:
    return " - ".join(milliseconds(end(m.ttft_ms for m in measured)) for end in (min, max))


def built_in_model(gpu_memory: int) -> str:
    """Return the folder of the largest built-in model for so many bytes of a GPU, with room to spare; 0: for a CPU."""
    gib = gpu_memory / 2**30  # cards of 40 and 12 GiB have a little less to show
    shape = "7b" if gib >= 39 else "1.5b" if gib >= 11 else "0.5b" if gib else "cpu"
    if not (HERE / "built_in_model").is_dir():
        raise LessonError("the built-in model is not beside this script: give --model a folder or a hub name")
    return str(HERE / "built_in_model" / shape)


def graph_sizes(longest: int) -> list[int]:
    """Return the batch sizes, in tokens, that are captured: a step is padded to the next one, by half at most."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < min(longest, GRAPH_TOKENS):
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return sizes


def find_model(name: str) -> str:
    """Return a folder, or a hub name that can be had; LessonError for all else."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise LessonError(f"{name} holds no config.json: give --model the folder of a model")
        return str(Path(name).resolve())
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise LessonError(f"no model in {name}: give --model a folder, or a hub name like Qwen/Qwen2.5-1.5B-Instruct")
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, snapshot_download

    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]  # httpx, under the name that the hub's client has
    try:  # what asks the hub later takes a minute to find out that it is not there
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return name
    except errors.HFValidationError as error:
        raise LessonError(f"{name} is no name that the hub takes: {telling_line(error)}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error, errors.HfHubHTTPError) and (code := error.response.status_code) < 500:
            raise LessonError(f"the hub answers {code} for {name}: check the name, or run `hf auth login`") from error
        try:
            return snapshot_download(name, local_files_only=True)
        except OSError:
            raise LessonError(f"{name}: no folder, not downloaded, and the hub is out of reach") from error
    except (ImportError, OSError, ValueError, http.InvalidURL) as error:
        raise LessonError(f"cannot ask the hub: {telling_line(error)}; check HF_*, SSL_CERT_FILE, proxies") from error


def shown(text: str) -> str:
    """Return a text that is not ours as a terminal may have it: its control characters are seen, and do nothing."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def telling_line(error: BaseException) -> str:
    """Return the line of a message that says what is wrong; in pydantic's it is not the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next(filter(re.compile("Value ?[Ee]rror|TypeError: |Input should|Assertion").match, lines), lines[0])
    return line.partition(" [type=")[0][:250]


def root_cause(error: EngineError, log: str) -> str:
    """Return the first exception in an engine's log that does not just pass on another one."""
    causes = re.findall(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    causes += re.findall(r"^.*\] +(assert .+)$", log, re.MULTILINE)  # one that says no more
    causes += [telling_line(error.__cause__ or error), "its process ended without a word, as one that is killed"]
    return next(cause for cause in causes if not re.search("root cause|exit status|Error raised in", cause))


def write_json(path: Path, content: dict) -> None:
    """Write all of `content` or nothing."""
    path = path.resolve()  # what a link points to is written, the link stays
    part = path.with_name(f"kv-{os.getpid()}.part")
    try:
        with part.open("x", encoding="utf-8") as file:  # anew: what a link there points to is not written
            file.write(json.dumps(content, indent=1, default=dataclasses.asdict) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LessonError(f"cannot write {path}: {error.strerror}") from error


def json_path(name: str) -> Path:
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise OSError(0, "it is no regular file")
        tempfile.TemporaryFile(dir=Path(name).parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {error.strerror}") from error
    return Path(name)


def at_least(minimum: int, most: int = 10**18) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not minimum <= int(text) <= most:
            limit = f", {most:,} at most" if most < 10**18 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}{limit}")
        return int(text)

    return parse_number


def lesson_parser(doc: str, requests: int) -> argparse.ArgumentParser:
    """Return the command line that all lessons share; `requests` is this lesson's default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(workers=1, fleets=1)  # engines at the same time; `fleets` of so many workers
    add = parser.add_argument
    add("--model", help="a folder or a hub name (default: built_in_model, random weights, no download)")
    add("--prefix-tokens", type=at_least(1), help="length of the static prompt (default: 4000, on a GPU 8000)")
    text = f"requests per arm; 0 fills the cache (default: {requests})"
    add("--requests", type=at_least(2, 1_000), default=requests, help=text)
    add("--block-size", type=at_least(1), help="tokens per block (default: 128 on a CPU, in steps of 32; 32 on a GPU)")
    add("--no-prefix-caching", action="store_true", help="the control: without the cache, claims must fail")
    add("--deeper", action="store_true", help="add this lesson's further experiments")
    add("--predict", action="store_true", help="in a lesson: say first how much will be found")
    add("--json", type=json_path, metavar="PATH", help="write every measurement to this file")
    add("--verbose", action="store_true", help="show the engine's own log")
    add("--check-options", action="store_true", help=argparse.SUPPRESS)  # by the runner, which knows none of them
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the values of the command line. An empty one is refused: an unset variable of a shell is one."""
    for word in sys.argv[1:]:  # none is repeated: it may be a key
        if not word or (word.startswith("--") and word.endswith("=")):
            parser.error("there is an empty value among the arguments")
        if re.search(r"[\x00-\x1f\x7f-\x9f]", word):
            parser.error("there is a control character among the arguments")
    args = parser.parse_args()
    files = [os.path.realpath(word.rpartition("=")[2]) for word in sys.argv[1:]]
    if args.json and args.json.exists() and files.count(os.path.realpath(args.json)) > 1:
        parser.error("--json names a file that is read, and would be lost")
    return args


def use_python_with_vllm() -> None:
    """Go on in the .venv beside the lesson where this Python has no vLLM."""
    script = Path(sys.argv[0]).name
    if sys.version_info < (3, 11):
        sys.exit(f"{script}: error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    venv = HERE / ".venv"
    if importlib.util.find_spec("vllm") is None:
        if not (venv / "complete").is_file() or Path(sys.prefix).resolve() == venv.resolve():
            sys.exit(f"{script}: error: no vLLM in {sys.executable}: run `python3 setup_and_test.py` first")
        os.execv(venv / "bin" / "python", [str(venv / "bin" / "python"), *sys.orig_argv[1:]])


def end_with_parent(parent: int, libc: ctypes.CDLL) -> None:
    """Let the kernel end this process with the thread that made it (prctl(2)): asyncio's threads live long enough."""
    libc.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was too late
        os._exit(1)


def prepare_process(engines: int) -> Path:
    """Make this process fit to start `engines` engines, which end with it; return its folder, which a lock protects."""
    base = tempfile.gettempdir()
    base = base if len(base) <= 50 else "/tmp"  # a socket's path has 107 bytes at most, and vLLM adds 37
    for left in Path(base).glob("kv-lesson-*/"):  # of runs that were killed
        with contextlib.suppress(OSError):  # another user's, in use, or gone by now
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
    folder = Path(tempfile.mkdtemp(prefix="new-kv-lesson-", dir=base))  # "new": not old, and not yet locked
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    folder = folder.rename(folder.with_name(folder.name.removeprefix("new-")))
    libc, forked_by = ctypes.CDLL(None), []  # an engine may fork in its turn
    os.register_at_fork(before=lambda: forked_by.append(os.getpid()))
    os.register_at_fork(after_in_child=lambda: end_with_parent(forked_by[-1], libc))
    # Several engines share the cores; one alone leaves one to the client, as vLLM does where it binds threads itself.
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores - 1 if engines == 1 else cores // engines)
    # Without vLLM's multiprocessing of its own the CPU platform, too, lets the model run in the engine's process.
    os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_ENABLE_V1_MULTIPROCESSING="0", TMPDIR=str(folder))
    os.environ.update(VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false", VLLM_HOST_IP="127.0.0.1")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # like VLLM_HOST_IP: whatever this host is called
    tempfile.tempdir = str(folder)
    return folder


def run_lesson(args: argparse.Namespace, measure: Callable[[Run], Awaitable[None]]) -> int:
    """Run a lesson with its engines' output in a log file, and return the exit status."""
    if args.check_options:
        return 0
    if sys.stdout is None or sys.stderr is None:
        sys.exit(f"{Path(sys.argv[0]).name}: error: standard output is closed: there is nowhere to print to")
    use_python_with_vllm()
    pid, folder = os.getpid(), None
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    err = os.fdopen(os.dup(2), "w", 1, encoding=sys.stderr.encoding, errors="replace")  # by lines: nobody flushes it

    def leave() -> None:
        for engine in multiprocessing.active_children():  # they write into the folder
            engine.kill(), engine.join()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def stop(signum: int, _: object) -> None:
        signal.signal(signum, lambda *_: None)  # once is enough
        if os.getpid() == pid:  # an engine that is just being made has this handler, too
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(err.fileno(), b"\x1b[?25h\ninterrupted\n" if err.isatty() else b"interrupted\n")
            leave()
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, stop)
    folder = prepare_process(args.workers)
    log = folder / "engine.log"
    with log.open("wb") as file:
        if not args.verbose:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.excepthook = lambda *bug: traceback.print_exception(*bug, file=err)  # shown all the same

    async def measure_and_finish(run: Run) -> int:
        try:
            await measure(run)
            return run.finish()
        finally:
            for engine in run.engines:
                run.end_engine(engine)

    try:
        told, status = "", asyncio.run(measure_and_finish(Run(args, out)))
        out.flush()
    except OSError as error:
        if error.errno not in NOWHERE_TO_WRITE:
            raise
        told, status = f"cannot write: {error.strerror}", 1
    except LessonError as error:
        told, status = str(error), error.status
        if isinstance(error, EngineError):
            told += f": {root_cause(error, log.read_text(errors='replace'))}"
            told += "" if args.verbose else f" (the engine's log: {shutil.copy(log, folder.with_suffix('.log'))})"
    finally:
        leave()
    if told:
        print(f"{Path(sys.argv[0]).name}: error: {shown(told)}", file=err)
    os._exit(status)  # all is written; to take an interpreter with vLLM in it apart takes two seconds


if "__mp_main__" in sys.modules:  # an engine's process that was not forked but spawned
    end_with_parent(os.getppid(), ctypes.CDLL(None))
if __name__ == "__main__":
    sys.exit(main())
