"""Lesson 4: traffic, routing, and what sessions share."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from session_consistency import (
    Affinity,
    BoundedAffinity,
    CacheModel,
    PrefixAware,
    RoundRobin,
    Traffic,
    UsageError,
    changes_workers,
    common_prefix,
    conversation,
    moved_share,
    p90,
    pair_ratios,
    pair_verdict,
    per_worker,
    rendezvous,
    report,
    schedule,
    shared_prefixes,
    worker_places,
)
from stable_prefix_vs_timestamp import Measurement

SESSIONS = [f"session-{n}" for n in range(4000)]


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_rendezvous_is_balanced_within_ten_percent(workers: int) -> None:
    loads = Counter(rendezvous(session, list(range(workers)))[0] for session in SESSIONS)
    assert set(loads) == set(range(workers))
    assert max(loads.values()) <= 1.1 * len(SESSIONS) / workers
    assert min(loads.values()) >= 0.9 * len(SESSIONS) / workers


@given(st.text(), st.integers(1, 9))
def test_rendezvous_is_stable_and_does_not_depend_on_the_order_of_the_workers(session: str, workers: int) -> None:
    names = list(range(workers))
    assert rendezvous(session, names) == rendezvous(session, names[::-1])
    assert sorted(rendezvous(session, names)) == names


@given(st.text(), st.integers(2, 9), st.data())
def test_losing_a_worker_moves_nobody_else(session: str, workers: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, workers - 1))
    left = [worker for worker in range(workers) if worker != lost]
    before, after = rendezvous(session, list(range(workers))), rendezvous(session, left)
    assert after == [worker for worker in before if worker != lost]


def test_rendezvous_moves_an_eighth_and_modulo_seven_eighths_of_the_sessions() -> None:
    share = moved_share(4000, 8, 7)
    assert share["rendezvous"] == pytest.approx(1 / 8, abs=0.02)
    assert share["modulo"] == pytest.approx(7 / 8, abs=0.02)


def test_round_robin_changes_workers_even_when_sessions_are_a_multiple_of_them() -> None:
    router, workers = RoundRobin(2), {}
    for arrivals in schedule(dict.fromkeys(SESSIONS[:6], 5), seed=0):
        for session in arrivals:
            workers.setdefault(session, set()).add(router.route(session, []))
    assert sum(len(seen) > 1 for seen in workers.values()) >= 4


def test_whether_round_robin_changes_workers_is_known_beforehand() -> None:
    def traffic(*turns: list[str]) -> Traffic:
        return Traffic({session: [[0]] * len(turns) for session in "ab"}, list(turns))

    assert not changes_workers(traffic(["a", "b"], ["a", "b"]), 2), "in lockstep"
    assert changes_workers(traffic(["a", "b"], ["b", "a"]), 2)
    assert changes_workers(traffic(["a", "b"], ["a", "b"]), 3)


def test_the_load_of_many_workers_fits_into_its_column() -> None:
    arm = [Measurement("main", "bad", 1, worker, "s", 10_000, 0, 0, 1.0, None) for worker in range(8)]
    assert per_worker(arm[:2], 2, lambda m: m.prompt_tokens) == "10,000 10,000"
    assert len(per_worker(arm, 8, lambda m: m.prompt_tokens)) < 20


def test_affinity_never_changes_a_worker() -> None:
    router = Affinity(3)
    assert all(len({router.route(session, []) for _ in range(3)}) == 1 for session in SESSIONS[:50])


@given(st.lists(st.sampled_from(SESSIONS[:5]), min_size=1, max_size=200), st.integers(2, 5))
def test_bounded_load_never_exceeds_its_bound(requests: list[str], workers: int) -> None:
    router = BoundedAffinity(workers, bound=1.25)
    for session in requests:
        router.route(session, [])
    assert sum(router.requests) == len(requests)
    assert max(router.requests) <= -(-1.25 * len(requests) // workers)


def test_bounded_load_keeps_a_session_where_affinity_puts_it_while_there_is_room() -> None:
    bounded, plain = BoundedAffinity(2, bound=2.0), Affinity(2)
    assert all(bounded.route(session, []) == plain.route(session, []) for session in SESSIONS[:100])


def test_prefix_aware_follows_the_longest_prefix_and_else_the_fewest_requests() -> None:
    shared = [9] * 4
    router = PrefixAware(2, 4, [shared])
    first = [*shared, 1, 1, 1, 1, 0]
    assert router.route("a", first) == 0
    assert router.route("b", [*shared, 2, 2, 2, 2, 0]) == 1, "what all workers hold draws nobody"
    assert router.route("a", [*first, 5, 5, 5, 5]) == 0


def test_turns_are_shuffled_reproducibly_and_sessions_end_at_their_length() -> None:
    lengths = {"a": 2, "b": 3, "c": 3, "d": 3}
    arrivals = schedule(lengths, seed=1)
    assert arrivals == schedule(lengths, seed=1) != schedule(lengths, seed=2)
    assert Counter(itertools.chain(*arrivals)) == lengths
    assert [sorted(turn) for turn in arrivals] == [["a", "b", "c", "d"]] * 2 + [["b", "c", "d"]]


def test_every_turn_begins_with_the_turn_before() -> None:
    for n in range(8):
        assert conversation("context", n + 1)[: 2 * n + 2] == conversation("context", n)


def test_reports_differ_between_sessions_from_their_first_word_on_and_reach_their_length() -> None:
    a, b = (report(session, 500, len) for session in ("session-01", "session-02"))
    assert common_prefix(list(a), list(b)) < len("session-01")
    assert 500 <= len(a) < 700
    assert report("session-01", 500, len) == a


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=2, max_size=6), st.integers(1, 4))
def test_after_priming_no_two_prompts_can_find_anything_in_each_other(prompts: list[list[int]], block: int) -> None:
    primed = CacheModel(block)
    for ids in shared_prefixes(prompts, block):
        primed.store(ids)
    for a, b in itertools.permutations(prompts, 2):
        with_other = CacheModel(block)
        with_other.blocks = set(primed.blocks)
        with_other.store(a)
        assert with_other.cached_tokens(b) == primed.cached_tokens(b)


def test_p90_is_a_measured_time_that_nine_of_ten_do_not_exceed() -> None:
    arm = [Measurement("main", "bad", 1, 0, "s", 10, 0, 0, float(ms), None) for ms in range(1, 11)]
    assert p90(arm) == 9.0
    assert p90(arm[:1]) == 1.0


def turn(session: str, request: int, ttft_ms: float) -> Measurement:
    return Measurement("main", "bad", request, 0, session, 100, 0, 0, ttft_ms, None)


def test_a_turn_is_compared_with_itself_in_the_other_arm_whatever_the_order() -> None:
    bad = [turn("a", 1, 100.0), turn("b", 1, 10.0)]
    good = [turn("b", 1, 20.0), turn("a", 1, 25.0)]
    assert pair_ratios(bad, good) == [4.0, 0.5]


def test_the_verdict_counts_the_pairs_and_claims_nothing_where_half_of_them_are_slower() -> None:
    assert "9 of 10 faster with affinity, median ratio 3.0." in pair_verdict([3.0] * 9 + [0.5], sign_test=False)
    assert pair_verdict([3.0, 0.5], sign_test=True).endswith("1 of 2 faster with affinity: no speed-up is shown.")


@given(st.lists(st.floats(0.01, 99.0), min_size=1, max_size=40))
def test_the_sign_test_is_the_binomial_one_and_the_line_fits_80_columns(ratios: list[float]) -> None:
    verdict = pair_verdict(ratios, sign_test=True)
    assert max(map(len, verdict.splitlines())) <= 80
    faster = sum(ratio > 1 for ratio in ratios)
    if 2 * faster > len(ratios):
        rows = itertools.product((0, 1), repeat=len(ratios)) if len(ratios) <= 12 else []
        if tails := [sum(row) >= faster for row in rows]:
            p = min(1.0, 2 * sum(tails) / len(tails))
            assert f"p = {p:.1g})" in verdict


def test_workers_without_a_gpu_have_cores_of_their_own_and_more_workers_than_cores_are_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    gpus, places = worker_places(False, cores)
    assert gpus == []
    assert len(set(itertools.chain(*places))) == cores
    with pytest.raises(UsageError, match="needs as many cores"):
        worker_places(False, cores + 1)
