"""Lesson 3: the split, the prompts, and the rules of the prefix store."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import write_llama
from hypothesis import given
from hypothesis import strategies as st

from manual_cache_boundary import (
    MARKER,
    ExplicitEngine,
    PrefixStore,
    bad_messages,
    default_prompt,
    differences,
    find_boundary,
    good_messages,
    read_prompt,
    reader,
    split_at_boundary,
)

ROOT = Path(__file__).parent.parent


def test_the_marker_belongs_to_neither_part() -> None:
    assert split_at_boundary(f"static\n{MARKER}\ndynamic") == ("static\n", "dynamic")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("no marker at all", "0 markers"),
        (f"a {MARKER} b {MARKER} c", "2 markers"),
        (f" \n{MARKER} b", "nothing stands before"),
        ("", "0 markers"),
    ],
)
def test_a_prompt_without_one_clear_boundary_is_refused(prompt: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_at_boundary(prompt)


@given(st.text().filter(lambda text: MARKER not in text and text.strip()), st.text().filter(lambda t: MARKER not in t))
def test_splitting_loses_nothing_but_the_marker_and_space_around_the_suffix(prefix: str, suffix: str) -> None:
    if (prefix + MARKER + suffix).count(MARKER) == 1:
        assert split_at_boundary(prefix + MARKER + suffix) == (prefix, suffix.strip())


@pytest.mark.parametrize("n", range(4))
def test_both_arms_send_the_same_words_and_no_marker(n: int) -> None:
    prompt = default_prompt(300, len)
    words = [
        sorted(" ".join(m["content"] for m in messages(prompt, n)).split())
        for messages in (bad_messages, good_messages)
    ]
    assert words[0] == words[1]
    assert MARKER not in " ".join(words[0])


@pytest.mark.parametrize(
    "static", ["One. Two.\nThree.", "one two three " * 9, "你是图书馆的服务台" * 9, "x", "A sentence.\n"]
)
def test_in_bad_the_data_stands_inside_every_static_part_and_nothing_of_it_is_lost(static: str) -> None:
    inside = bad_messages(f"{static}{MARKER}Why?", 1)[0]["content"]
    before, after = inside.split(f"{reader(1)}\n")
    assert before + after == static
    assert len(before) <= len(static) / 2 + 1
    assert after


def test_in_good_the_system_message_is_the_same_for_every_reader() -> None:
    prompt = default_prompt(300, len)
    assert good_messages(prompt, 1)[0] == good_messages(prompt, 2)[0]
    assert bad_messages(prompt, 1)[0] != bad_messages(prompt, 2)[0]


def test_no_two_readers_are_the_same_and_all_are_described_at_the_same_length() -> None:
    readers = [reader(n) for n in range(500)]
    assert len(set(readers)) == len(readers)
    assert len({len(text) for text in readers}) == 1


def test_a_prompt_file_that_is_no_text_is_wrong_usage(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(argparse.ArgumentTypeError, match="decode"):
        read_prompt(str(path))


def test_a_prompt_file_keeps_the_line_ends_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"rules\r\nWhy?\n")
    assert read_prompt(str(path)) == "rules\r\nWhy?\n"


def test_a_prompt_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="No such file"):
        read_prompt(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt-file", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["--prompt-file", "prompt.txt", "--prefix-tokens", "500"], "leave --prefix-tokens out"),
        (["--prompt-file", "bare.txt"], "--prompt-file: the prompt has 0 markers"),
        (["--prompt-file", "bare.txt", "--prompt-file", "prompt.txt"], "searched for their boundary: leave"),
    ],
)
def test_a_prompt_file_that_cannot_be_taken_is_told_before_anything_is_imported(
    tmp_path: Path, options: list[str], says: str
) -> None:
    (tmp_path / "prompt.txt").write_text(f"Be brief. {MARKER} Why?")
    (tmp_path / "bare.txt").write_text("Be brief. Why?")
    program = "import sys; sys.modules['vllm'] = None; from manual_cache_boundary import main; main()"
    command = [sys.executable, "-c", program, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


# --- a boundary that is found ---

LINES = st.lists(st.sampled_from(["one", "two", "three"]), max_size=6).map("\n".join)


@given(st.lists(LINES, min_size=2, max_size=6), st.sampled_from([0.5, 0.75, 1.0]))
def test_so_many_prompts_agree_up_to_the_boundary_and_it_stands_at_the_end_of_a_line(
    texts: list[str], share: float
) -> None:
    needed = max(2, math.ceil(share * len(texts)))
    line_ends = {text[: newline.end()] for text in texts for newline in re.finditer("\n", text)}
    agreed = [line_end for line_end in line_ends if sum(text.startswith(line_end) for text in texts) >= needed]
    agreed += [text for text in texts if texts.count(text) >= needed]  # nothing differs
    assert find_boundary(texts, share) == max(map(len, agreed), default=0)


def test_a_boundary_moves_back_to_a_line_a_message_or_a_word() -> None:
    assert find_boundary(["rules\nat 09:30", "rules\nat 09:31"]) == len("rules\n")
    assert find_boundary(["rules[user]at 09:30", "rules[user]at 09:31"], places=[0, 11, 40]) == len("rules[user]")
    assert find_boundary(["be kind at 09:30", "be kind at 09:31"]) == len("be kind at ")
    assert find_boundary(["abc", "xyz"]) == 0
    assert find_boundary(["请回答。安娜问", "请回答。安德问"]) == len("请回答。安"), (
        "Chinese has no spaces between words"
    )
    assert find_boundary(["same", "same"]) == len("same")


def test_one_prompt_that_is_another_does_not_count_where_a_share_is_enough() -> None:
    texts = ["rules\none", "rules\ntwo", "rules\nthree", "quite another"]
    assert find_boundary(texts) == 0
    assert find_boundary(texts, share=0.75) == len("rules\n")


def test_the_furthest_boundary_is_not_where_most_characters_are_shared() -> None:
    assert find_boundary(["three", "one\na", "one\nb", "three\na"], share=0.5) == len("one\n")


@pytest.mark.parametrize(
    ("line", "other", "kind"),
    [
        ("Time: 2026-01-15 09:30", "Time: 2026-01-15 09:31", "clock"),
        ("now: 1768469400", "now: 1768469460", "clock"),
        ("User: bob", "User: eve", "user"),
        ("request 8f3a2b1c", "request 9f3a2b1d", "id"),
        ("Where is it?", "Why is it?", "text"),
    ],
)
def test_what_differs_is_named_by_its_kind(line: str, other: str, kind: str) -> None:
    found = differences(f"rules\n{line}\ntools", f"rules\n{other}\ntools")
    assert found == [(kind, line, other)]


def test_tools_in_another_order_are_called_so() -> None:
    assert differences("tool a\ntool b", "tool b\ntool a") == [("order", "tool a", "tool b")]
    assert differences("same", "same") == []
    assert differences("a", "a\nb") == [("text", "", "b")]


# --- the store; its KV is a real DynamicCache, so these need torch ---


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


BYTES_PER_TOKEN = 2 * 2 * 4 * 4  # keys and values, two heads, four numbers of four bytes


def kv_of(ids: list[int]):
    """Return the KV of one layer in which token `i` is the number `i`: what belongs to which prefix can be seen."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    values = torch.tensor(ids, dtype=torch.float32).reshape(1, 1, -1, 1).expand(1, 2, len(ids), 4).contiguous()
    kv = transformers.DynamicCache()
    kv.update(values, values.clone(), 0)
    return kv


def store(tokens: int, ttl_s: float = 100.0) -> tuple[PrefixStore, Clock]:
    clock = Clock()
    return PrefixStore(tokens * BYTES_PER_TOKEN, ttl_s, clock), clock


def held(prefixes: PrefixStore) -> list[int]:
    return [entry.length for entry in prefixes.entries.values()]


def test_the_longest_stored_prefix_wins_and_leaves_a_token_to_compute() -> None:
    prefixes, _ = store(100)
    for length in (2, 4, 6):
        prefixes.put(list(range(length)), kv_of(list(range(length))))
    assert prefixes.get(list(range(8)))[0] == 6
    assert prefixes.get(list(range(6)))[0] == 4, "a prompt that is stored whole still needs its last token computed"
    assert prefixes.get([0, 1, 9, 9, 9])[0] == 2
    assert prefixes.get([9, 1, 2, 3]) == (0, None)
    assert (prefixes.hits, prefixes.misses) == (3, 1)


def test_the_kv_that_comes_back_is_that_of_the_prefix() -> None:
    prefixes, _ = store(100)
    prefixes.put([5, 6, 7], kv_of([5, 6, 7]))
    _, kv = prefixes.get([5, 6, 7, 8])
    assert kv.layers[0].keys[0, 0, :, 0].tolist() == [5, 6, 7]


def test_a_request_can_corrupt_neither_an_entry_nor_what_was_put() -> None:
    prefixes, _ = store(100)
    original = kv_of([5, 6, 7])
    prefixes.put([5, 6, 7], original)
    original.layers[0].keys.zero_()
    prefixes.get([5, 6, 7, 8])[1].layers[0].keys.zero_()
    assert prefixes.get([5, 6, 7, 8])[1].layers[0].keys[0, 0, :, 0].tolist() == [5, 6, 7]


def test_the_least_recently_used_entry_leaves_first() -> None:
    prefixes, _ = store(6)
    for ids in ([1, 1], [2, 2], [3, 3]):
        prefixes.put(ids, kv_of(ids))
    prefixes.get([1, 1, 0])
    prefixes.put([4, 4], kv_of([4, 4]))
    assert prefixes.get([2, 2, 0])[0] == 0
    assert all(prefixes.get([n, n, 0])[0] == 2 for n in (1, 3, 4))
    assert prefixes.evictions == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.booleans()), max_size=30))
def test_the_budget_is_never_exceeded_and_pins_are_never_evicted(puts: list[tuple[int, int, bool]]) -> None:
    prefixes, _ = store(10)
    pinned: set[str] = set()
    for token, length, pin in puts:
        ids = [token] * length
        try:
            prefixes.put(ids, kv_of(ids), pinned=pin)
        except ValueError:
            continue
        if pin:
            pinned.add(prefixes.key(ids))
        assert prefixes.nbytes() <= 10 * BYTES_PER_TOKEN
        assert pinned <= set(prefixes.entries)


def test_the_time_to_live_ends_an_entry_and_no_pin() -> None:
    prefixes, clock = store(100, ttl_s=10)
    prefixes.put([1, 1], kv_of([1, 1]))
    prefixes.put([2, 2], kv_of([2, 2]), pinned=True)
    clock.now = 9.9
    assert prefixes.get([1, 1, 0])[0] == 2
    clock.now = 10.0
    assert prefixes.get([1, 1, 0])[0] == 0
    assert prefixes.get([2, 2, 0])[0] == 2


def test_what_cannot_or_must_not_be_kept_is_refused_and_changes_nothing() -> None:
    prefixes, _ = store(6)
    prefixes.put([1, 1], kv_of([1, 1]), pinned=True)
    with pytest.raises(ValueError, match="larger than the budget"):
        prefixes.put([2] * 7, kv_of([2] * 7))
    with pytest.raises(ValueError, match="no room"):
        prefixes.put([3] * 4, kv_of([3] * 4), pinned=True)
    with pytest.raises(ValueError, match="no room"):
        prefixes.put([3] * 5, kv_of([3] * 5))
    with pytest.raises(ValueError, match="does not belong to 3 token ids"):
        prefixes.put([4, 4, 4], kv_of([4, 4]))
    assert held(prefixes) == [2]


def test_putting_the_same_prefix_again_replaces_it() -> None:
    prefixes, _ = store(4)
    for _ in range(3):
        prefixes.put([1, 1, 1], kv_of([1, 1, 1]))
    assert held(prefixes) == [3]
    assert prefixes.evictions == 0


def test_a_pin_stays_when_its_prefix_is_put_again_and_leaves_when_it_is_unpinned() -> None:
    prefixes, clock = store(100, ttl_s=10)
    prefixes.put([1, 1], kv_of([1, 1]), pinned=True)
    prefixes.put([1, 1], kv_of([1, 1]))
    clock.now = 20.0
    assert prefixes.get([1, 1, 0])[0] == 2
    prefixes.unpin([1, 1])
    assert prefixes.get([1, 1, 0])[0] == 0
    with pytest.raises(KeyError):
        prefixes.unpin([1, 1])


@pytest.fixture(scope="module")
def explicit(tmp_path_factory: pytest.TempPathFactory) -> ExplicitEngine:
    pytest.importorskip("torch")
    engine = ExplicitEngine(str(write_llama(tmp_path_factory.mktemp("llama"))), device="cpu", memory=2**30, kv_bytes=0)
    engine.load(8)
    return engine


IDS = list(range(5, 65))


@pytest.mark.parametrize("boundaries", [[20, 40], [40, 20], [20, 40, 60, 99]])
def test_a_prompt_may_have_several_boundaries_in_any_order(explicit: ExplicitEngine, boundaries: list[int]) -> None:
    prefixes = PrefixStore(2**30, 100.0, Clock())
    cached, _, logits = explicit.ask(IDS, boundaries, prefixes)
    assert (cached, held(prefixes)) == (0, [20, 40]), "a boundary at the end leaves no token to compute: not stored"
    uncached = explicit.ask(IDS, [], None)[2]
    other = [*IDS[:30], *IDS[:30]]
    assert explicit.ask(IDS, boundaries, prefixes)[0] == 40
    assert explicit.ask(other, [], prefixes)[0] == 20
    assert float((logits - uncached).abs().max()) <= explicit.tolerance


def test_a_prefix_that_the_store_has_no_room_for_is_answered_all_the_same(explicit: ExplicitEngine) -> None:
    prefixes = PrefixStore(10, 100.0, Clock())
    cached, _, logits = explicit.ask(IDS, [20], prefixes)
    assert (cached, held(prefixes)) == (0, [])
    assert float((logits - explicit.ask(IDS, [], None)[2]).abs().max()) <= explicit.tolerance


def test_the_key_is_the_sha_256_of_the_token_ids() -> None:
    import hashlib
    import struct

    ids = [1, 2, 151_935]
    assert PrefixStore.key(ids) == hashlib.sha256(struct.pack("=3q", *ids)).hexdigest()
    assert PrefixStore.key([1, 23]) != PrefixStore.key([12, 3])
