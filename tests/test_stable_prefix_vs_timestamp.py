"""Lesson 1's prompts: the arms carry the same text, equally long, and differ in the clock's place alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers.models import write_llama

from stable_prefix_vs_timestamp import (
    QUESTIONS,
    bad_messages,
    clock,
    common_prefix,
    good_messages,
    system_prompt,
    tool_definitions,
)  # fmt: skip

BUILT_IN = Path(__file__).parent.parent / "built_in_model" / "cpu"


@pytest.fixture(scope="module", params=["built-in", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = BUILT_IN if request.param == "built-in" else write_llama(tmp_path_factory.mktemp("llama"))
    return AutoTokenizer.from_pretrained(folder)


def words(messages: list[dict]) -> list[str]:
    return sorted(" ".join(message["content"] for message in messages).split())


@pytest.mark.parametrize("n", range(len(QUESTIONS) + 1))
def test_both_arms_carry_the_same_words(n: int) -> None:
    assert words(bad_messages("You are an agent.\n", n)) == words(good_messages("You are an agent.\n", n))


def test_no_two_requests_share_a_clock() -> None:
    times = [clock(n) for n in range(1000)]
    assert len(set(times)) == len(times)
    assert {len(time) for time in times} == {19}


def test_no_tool_is_defined_twice() -> None:
    names = [line.split("(")[0] for line in itertools.islice(tool_definitions(), 1000)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("tokens", [256, 2000])
def test_the_prompts_reach_their_length_and_are_equally_long_in_both_arms(tokenizer, tokens: int) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    system = system_prompt(tokens, count)
    assert tokens <= count(system) < tokens + 512
    for n in range(3):
        bad, good = (
            tokenizer.apply_chat_template(layout(system, n), add_generation_prompt=True, return_dict=False)
            for layout in (bad_messages, good_messages)
        )
        assert abs(len(bad) - len(good)) < 16, "the smallest block of all builds"


def test_bad_prompts_part_at_the_clock_and_good_ones_after_the_system_prompt(tokenizer) -> None:
    def encode(messages: list[dict]) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    system = "You are an agent. " * 50
    assert common_prefix(*(encode(bad_messages(system, n)) for n in (0, 1))) < 60
    assert common_prefix(*(encode(good_messages(system, n)) for n in (0, 1))) > len(tokenizer.encode(system)) - 5
