"""What a server found against what was predicted, on logs whose server is known: which reason is given, and its sum."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from going_further.common import CacheModel
from going_further.replay import logged
from going_further.replay.analysis import Options, analyse
from going_further.replay.caches import Arrival, PrefixCache
from going_further.replay.comparing import Row
from going_further.replay.logged import (
    COUNTED_OTHERWISE,
    EVICTED,
    LAYOUT,
    NEVER,
    NEW,
    REPLICA,
    TEMPLATE,
    Logged,
    explain,
)
from going_further.replay.rendering import Renderer

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "built_in_model" / "cpu"
FIELD = Path(__file__).parent / "field"
BLOCK = 16


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(str(BUILT_IN))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A model whose template writes an answer otherwise than it was generated."""
    path = tmp_path_factory.mktemp("models") / "qwen3-like"
    path.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(BUILT_IN / file, path)
    shutil.copy(FIELD / "models" / "qwen3-like.json", path / "tokenizer_config.json")
    return Renderer(str(path))


def rules(name: str, number: int = 20) -> str:
    """Return a text whose sentences are all of one name, so that two names have none in common."""
    return " ".join(
        f"Rule {n} of {name} is to be kind and to check {n} lamps and to name a price." for n in range(number)
    )


def asking(name: str, turns: int = 0) -> dict:
    """Return a request of a session, which shares nothing with any other session."""
    messages = [{"role": "system", "content": rules(name)}, {"role": "user", "content": f"Which lamp, {name}?"}]
    for n in range(turns):
        messages += [
            {"role": "assistant", "content": f"Lamp {n} of {name}. " * 4},
            {"role": "user", "content": f"{n}?"},
        ]
    return {"messages": messages}


def analysed(tmp_path: Path, renderer: Renderer, entries: Sequence[dict], **options: object):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return analyse(path, renderer, BLOCK, Options(**options), Console())


def served(rows: list[Row], arrivals: list[Arrival], caches: Sequence[PrefixCache], choose=lambda n: 0) -> list[Row]:
    """Return rows with what a server of these caches would have said of them."""
    return [
        dataclasses.replace(
            row, logged_prompt_tokens=row.prompt_tokens,
            logged_cached_tokens=caches[choose(n)].request(arrival.chain, arrival.tokens, arrival.time),
        )
        for n, (row, arrival) in enumerate(zip(rows, arrivals, strict=True))
    ]  # fmt: skip


def adds_up(found: Logged) -> bool:
    return sum(found.computed.values()) + found.found_tokens == found.sent_tokens


def reasons(found: Logged) -> dict[str, int]:
    return {reason: tokens for reason, tokens in found.computed.items() if tokens}


def missed(rows: list[Row]) -> int:
    return sum(row.predicted_cached_tokens - row.logged_cached_tokens for row in rows)


def test_a_server_that_finds_all_that_is_predicted_has_computed_what_is_new(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking(name, n) for n in range(3) for name in "ab"])
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK)])
    said = explain(rows, found.arrivals, BLOCK)
    assert reasons(said) == {NEW: said.sent_tokens - said.found_tokens}
    assert said.found_tokens == said.predicted_tokens == sum(row.predicted_cached_tokens for row in rows) > 0
    assert (said.requests, said.unreported, said.surplus_tokens) == (6, 0, 0)


def test_a_log_that_does_not_say_what_was_found_is_not_explained(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a"), asking("a") | {"usage": {"prompt_tokens": 500}}])
    assert found.rows[1].logged_prompt_tokens == 500
    assert explain(found.rows, found.arrivals, BLOCK) is None


def test_what_a_small_cache_has_lost_is_evicted(tmp_path: Path, renderer) -> None:
    names = [*"aab", *"cdefgh", "a", "h", "b"]
    found = analysed(tmp_path, renderer, [asking(name) for name in names])
    capacity = 3 * found.longest
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK, capacity)])
    said = explain(rows, found.arrivals, BLOCK)
    assert said.found_tokens > 0
    assert said.computed[EVICTED] == missed(rows) > 0
    assert said.affected[EVICTED] == 2
    assert said.computed[REPLICA] == 0
    assert adds_up(said)


def test_what_another_replica_holds_is_put_down_to_that(tmp_path: Path, renderer) -> None:
    names = [name for turn in range(4) for name in "abcde"]  # an odd number of them: round robin moves each
    entries = [asking("first"), *(asking(name, n // 5) for n, name in enumerate(names)), asking("first")]
    found = analysed(tmp_path, renderer, entries)
    caches = [PrefixCache(BLOCK), PrefixCache(BLOCK)]
    rows = served(found.rows, found.arrivals, caches, lambda n: 0 if n == len(entries) - 1 else n % 2)
    assert rows[-1].logged_cached_tokens > 0, "what is found so late was not evicted earlier"
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[REPLICA] == missed(rows) > 0
    assert said.computed[EVICTED] == 0
    assert adds_up(said)


def test_a_server_that_never_finds_anything_is_told_as_that(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a", n) for n in range(3)])
    rows = [dataclasses.replace(row, logged_prompt_tokens=row.prompt_tokens, logged_cached_tokens=0)
            for row in found.rows]  # fmt: skip
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[NEVER] == said.predicted_tokens > 0
    assert said.affected[NEVER] == 2
    assert (said.computed[EVICTED], said.computed[REPLICA]) == (0, 0)
    assert adds_up(said)


def test_another_number_of_prompt_tokens_is_another_prompt_or_tokenizer(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a", n) for n in range(3)])
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK)])
    tokens, cached = rows[2].prompt_tokens, rows[2].logged_cached_tokens
    for other, is_otherwise in ((tokens + 200, True), (tokens - 200, True), (tokens + 5, False), (tokens - 5, False)):
        rows[2] = dataclasses.replace(rows[2], logged_prompt_tokens=other, logged_cached_tokens=min(cached, other))
        said = explain(rows, found.arrivals, BLOCK)
        assert said.computed[COUNTED_OTHERWISE] == (other - rows[2].logged_cached_tokens if is_otherwise else 0)
        assert adds_up(said)


def test_blocks_of_another_size_are_no_miss(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a", n) for n in range(4)])
    rows = [dataclasses.replace(row, logged_prompt_tokens=row.prompt_tokens,
                                logged_cached_tokens=max(0, row.predicted_cached_tokens - 11))
            for row in found.rows]  # fmt: skip
    said = explain(rows, found.arrivals, BLOCK)
    assert reasons(said) == {NEW: said.sent_tokens - said.found_tokens}


def timed(entries: Sequence[tuple[float, dict]]) -> list[dict]:
    return [entry | {"timestamp": time} for time, entry in entries]


def test_what_a_hosted_cache_has_forgotten_is_too_old_and_says_how_old(tmp_path: Path, renderer) -> None:
    """Five minutes from the last use: other sessions go on meanwhile, and are found."""
    entries, turns = [], {}
    for time, name in [
        (0, "a"),
        (10, "b"),
        *((60 * n, "b") for n in range(1, 15)),
        (900, "a"),
        (960, "a"),
        (2000, "b"),
    ]:
        entries.append((time, asking(name, turns.get(name, 0))))
        turns[name] = turns.get(name, 0) + 1
    found = analysed(tmp_path, renderer, timed(entries))
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK, ttl=300)])
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[EVICTED] == missed(rows) > 0
    assert said.affected[EVICTED] == 2
    assert said.computed[REPLICA] == 0
    assert said.median_age(EVICTED) > 300 > said.median_age("found") > 0
    assert adds_up(said)


def test_what_is_found_after_much_work_but_not_after_a_long_time_is_too_old(tmp_path: Path, renderer) -> None:
    """Twenty sessions pass within three minutes, and the first one is found; then it waits, and nothing passes."""
    busy = [(n, asking(f"s{n}")) for n in range(1, 20)]
    entries = [(0, asking("a")), *busy, (200, asking("a", 1)), (1200, asking("a", 2)), (1210, asking("a", 3))]
    found = analysed(tmp_path, renderer, timed(entries))
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK, ttl=300)])
    assert [row.logged_cached_tokens > 0 for row in rows[-3:]] == [True, False, True]
    said = explain(rows, found.arrivals, BLOCK)
    assert (said.computed[EVICTED], said.computed[REPLICA]) == (missed(rows), 0)


def test_without_times_there_are_no_ages(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a", n) for n in range(3)])
    said = explain(served(found.rows, found.arrivals, [PrefixCache(BLOCK)]), found.arrivals, BLOCK)
    assert (said.median_age("found"), said.median_age(EVICTED), said.median_age(REPLICA)) == (None, None, None)


def test_a_clock_in_front_is_the_layout(tmp_path: Path, renderer) -> None:
    entries = []
    for n in range(4):
        entry = asking("a", n)
        entry["messages"][0]["content"] = f"It is 09:1{n}. {rules('a')}"
        entries.append(entry)
    found = analysed(tmp_path, renderer, entries)
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK)])
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[LAYOUT] == sum(row.lost_tokens for row in rows) > 0
    assert said.affected[LAYOUT] == 3
    assert said.computed[TEMPLATE] == 0
    assert adds_up(said)


def test_what_the_template_wrote_anew_is_put_down_to_it(tmp_path: Path, dropping) -> None:
    lines = (FIELD / "42-agent-loop-then-question.jsonl").read_text().splitlines()
    found = analysed(tmp_path, dropping, [json.loads(line) for line in lines])
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK)])
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[TEMPLATE] == rows[-1].lost_tokens == 80
    assert said.affected[TEMPLATE] == 1
    assert said.computed[LAYOUT] == 0
    assert adds_up(said)


def test_what_was_known_before_the_log_is_a_surplus(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a"), asking("b"), asking("a", 1)])
    cache = PrefixCache(BLOCK)
    cache.request(found.arrivals[1].chain, found.arrivals[1].tokens)
    rows = served(found.rows, found.arrivals, [cache])
    said = explain(rows, found.arrivals, BLOCK)
    known = rows[1].logged_cached_tokens
    assert rows[1].predicted_cached_tokens == 0 < known
    assert known - BLOCK <= said.surplus_tokens <= known
    assert adds_up(said)


def test_an_answer_that_the_engine_wrote_itself_is_no_surplus(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a"), asking("a", 1)])
    row = found.rows[1]
    assert row.answer_tokens > BLOCK
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK)])
    rows[1] = dataclasses.replace(rows[1], logged_cached_tokens=row.predicted_cached_tokens + row.answer_tokens)
    said = explain(rows, found.arrivals, BLOCK)
    assert said.surplus_tokens == 0
    assert adds_up(said)


def test_requests_without_a_number_are_counted_and_left_out_of_the_sums(tmp_path: Path, renderer) -> None:
    found = analysed(tmp_path, renderer, [asking("a", n) for n in range(4)])
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK)])
    rows[1] = dataclasses.replace(rows[1], logged_cached_tokens=None)
    rows[2] = dataclasses.replace(rows[2], logged_prompt_tokens=None)
    said = explain(rows, found.arrivals, BLOCK)
    assert (said.requests, said.unreported) == (3, 1)
    assert said.sent_tokens == sum(row.prompt_tokens for row in rows) - rows[1].prompt_tokens
    assert adds_up(said)


def test_a_restart_of_the_server_is_no_eviction(tmp_path: Path, renderer) -> None:
    entries = [asking(name, turn) for turn in range(6) for name in "abc"]
    found = analysed(tmp_path, renderer, entries)
    caches = [PrefixCache(BLOCK), PrefixCache(BLOCK)]
    rows = served(found.rows, found.arrivals, caches, lambda n: n >= 9)
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[REPLICA] + said.computed[EVICTED] == missed(rows) > 0
    assert said.computed[REPLICA] > said.computed[EVICTED]
    assert adds_up(said)


def test_what_the_bounded_prediction_evicts_is_put_down_to_eviction(tmp_path: Path, renderer) -> None:
    """With --cache-tokens the prediction is that of a cache of that size; what it loses is not new text."""
    entries = [asking(name) for name in "aabcdefa"]
    capacity = 3 * analysed(tmp_path, renderer, entries).longest
    found = analysed(tmp_path, renderer, entries, cache_tokens=capacity)
    evicted = sum(row.evicted_tokens for row in found.rows)
    rows = served(found.rows, found.arrivals, [PrefixCache(BLOCK, capacity)])
    assert [row.logged_cached_tokens for row in rows] == [row.predicted_cached_tokens for row in rows]
    said = explain(rows, found.arrivals, BLOCK)
    assert said.computed[EVICTED] == evicted > 0
    assert adds_up(said)


@pytest.mark.parametrize("seed", range(8))
def test_the_reasons_and_what_was_found_are_all_that_was_sent(tmp_path: Path, renderer, seed: int) -> None:
    dice = random.Random(seed)
    entries = []
    for n in range(30):
        entry = asking(dice.choice("abc"), dice.randrange(4))
        if dice.random() < 0.3:
            entry["messages"][0]["content"] = f"It is 09:{n}. {entry['messages'][0]['content']}"
        entries.append(entry)
    found = analysed(tmp_path, renderer, entries)
    caches = [PrefixCache(BLOCK, dice.choice([None, 4 * found.longest])) for _ in range(dice.randrange(1, 4))]
    for arrival in dice.sample(found.arrivals, dice.choice([0, 10])):  # what was there before the log
        dice.choice(caches).request(arrival.chain, arrival.tokens)
    rows = served(found.rows, found.arrivals, caches, lambda n: dice.randrange(len(caches)))
    said = explain(rows, found.arrivals, BLOCK)
    assert set(said.computed) <= set(logged.REASONS)
    assert min(said.computed.values()) >= 0
    assert sum(said.computed.values()) + said.found_tokens == said.sent_tokens


def test_the_reasons_add_up_where_a_broken_prefix_was_found_all_the_same(tmp_path: Path, renderer) -> None:
    """It was known from before the log: what was not computed is not lost."""
    entries = [asking("a"), asking("a")]
    for n, entry in enumerate(entries):
        entry["messages"][0]["content"] = f"It is 09:1{n}. {rules('a')}"
    found = analysed(tmp_path, renderer, entries)
    assert found.rows[1].lost_tokens > 0
    cache = PrefixCache(BLOCK)
    for arrival in found.arrivals:
        cache.request(arrival.chain, arrival.tokens)
    said = explain(served(found.rows, found.arrivals, [cache]), found.arrivals, BLOCK)
    assert adds_up(said)
    assert said.computed[LAYOUT] == 0


def test_usage_and_times_of_a_log_are_what_is_explained(tmp_path: Path, renderer) -> None:
    """From the file: OpenAI's usage, Anthropic's, and none."""
    entries = [
        asking("a") | {"usage": {"prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}, "timestamp": 100},
        {"request": asking("a"), "response": {"usage": {"input_tokens": 4, "cache_read_input_tokens": 320}}},
        asking("a"),
    ]
    found = analysed(tmp_path, renderer, entries)
    assert [row.logged_cached_tokens for row in found.rows] == [0, 320, None]
    assert [row.logged_prompt_tokens for row in found.rows] == [0, 324, None]
    assert found.arrivals[0].time == 100
    said = explain(found.rows, found.arrivals, BLOCK)
    assert (said.requests, said.unreported, said.found_tokens) == (2, 1, 320)


def test_the_age_of_a_block_is_what_others_have_computed_since() -> None:
    model, cache = CacheModel(BLOCK), PrefixCache(BLOCK)
    chains = [list(model.chain([n] * BLOCK * 3)) for n in range(3)]
    rows = [
        Row(n, 48, 0, None, "first request", "", 0, "", "", 0, logged_prompt_tokens=48, logged_cached_tokens=0)
        for n in range(4)
    ]
    arrivals = [Arrival(chain, 48, "s", 10.0 * n) for n, chain in enumerate([*chains, chains[0]])]
    missed = [missed for _, missed in logged.uses_of(rows, arrivals, BLOCK)]
    assert [use.blocks for use in missed] == [None, None, None, 6]
    assert [use.seconds for use in missed] == [None, None, None, 30]
    assert cache.age(1) is None
