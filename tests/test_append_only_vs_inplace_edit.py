"""Lesson 2's prompts: both arms carry the same facts at every turn, and only one of them leaves the past alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from append_only_vs_inplace_edit import (
    START,
    apply,
    bad_messages,
    changes,
    common_prefix,
    cost,
    dump,
    good_messages,
    instructions,
    price,
    read_state,
    state_at,
)
from stable_prefix_vs_timestamp import Measurement

BUILT_IN = Path(__file__).parent.parent / "built_in_model" / "cpu"
TURNS = range(25)


@pytest.mark.parametrize("turn", TURNS)
def test_both_arms_carry_the_same_facts_at_every_turn(turn: int) -> None:
    assert read_state(bad_messages("", turn)) == read_state(good_messages("", turn)) == state_at(turn)


@pytest.mark.parametrize("since", [1, 5, 12])
def test_a_compacted_log_carries_the_same_facts(since: int) -> None:
    for turn in range(since, since + 12):
        assert read_state(good_messages("", turn, since=since)) == state_at(turn)


def test_every_turn_changes_the_state() -> None:
    assert all(state_at(n) != state_at(n + 1) for n in TURNS)


def test_good_leaves_every_message_as_it_was_and_bad_edits_the_first_one() -> None:
    for n in TURNS[:-1]:
        assert good_messages("tools", n + 1)[: len(good_messages("tools", n))] == good_messages("tools", n)
        before, after = bad_messages("tools", n), bad_messages("tools", n + 1)
        assert before[0] != after[0]
        assert before[1:] == after[1 : len(before)]


def test_good_carries_what_bad_carries_and_the_log_entries_on_top() -> None:
    bad, good = bad_messages("", 9), good_messages("", 9)
    assert len(bad) == len(good)
    assert all(g["content"].endswith(b["content"]) for b, g in zip(bad[1:], good[1:], strict=True))


def test_a_change_leaves_the_state_it_was_made_to_alone() -> None:
    before = dump(START)
    apply(START, changes(3))
    assert dump(START) == before


@given(st.permutations(sorted(START)))
def test_an_equal_state_is_always_written_alike(keys: list[str]) -> None:
    assert dump({key: START[key] for key in keys}) == dump(START)


def test_the_built_in_template_is_prefix_stable_for_good_and_parts_early_for_bad() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN)

    def encode(messages: list[dict]) -> list[int]:
        return tokenizer.apply_chat_template(messages, return_dict=False)

    static = instructions(1000, lambda text: len(tokenizer.encode(text)))
    assert len(tokenizer.encode(static)) >= 1000
    for n in range(9):
        good = [encode(good_messages(static, turn)) for turn in (n, n + 1)]
        assert good[1][: len(good[0])] == good[0]
        assert common_prefix(*(encode(bad_messages(static, turn)) for turn in (n, n + 1))) < 40


def test_cost_follows_the_prices() -> None:
    arm = [Measurement("main", "bad", 0, None, None, 1000, 400, 400, 1.0, None)] * 2
    prices = argparse.Namespace(price_input=3.0, price_cached=0.5)
    assert cost(arm, prices) == pytest.approx((1200 * 3.0 + 800 * 0.5) / 1e6)


@pytest.mark.parametrize("text", ["", "-1", "free", "nan", "inf", "0", "1e3", "3,00", "9" * 300, "\uff13.00", "0.000"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        price(text)
