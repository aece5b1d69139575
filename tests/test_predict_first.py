"""The questions of --predict: what is shown, what is read, and how an answer is judged."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_prefix_vs_timestamp import Question, read_line, tell_score

STATIC = [n * 7 % 391 + 10 for n in range(400)]


def question(before: list[int], ids: list[int]) -> Question:
    return Question("", "bad", 1, before, ids)


@pytest.mark.parametrize(
    ("before", "ids", "layout"),
    [
        ([1, 2, *STATIC], [1, 3, 4, *STATIC], "1 the same, 2 new, 400 the same again: 403 tokens"),
        ([*STATIC, 1, 2], [*STATIC, 3, 4, 5], "400 the same, 3 new: 403 tokens"),
        ([], [*STATIC], "400 new: 400 tokens"),
        ([1, *STATIC, 2], [3, *STATIC, 4], "1 new, 400 the same again, 1 new: 402 tokens"),
        (STATIC, STATIC, "400 the same: 400 tokens"),
        ([1, 2, 3, *STATIC], [1, *STATIC, 4], "1 the same, 400 the same but moved up, 1 new: 402 tokens"),
        (STATIC, [1, 2, 3], "3 new: 3 tokens"),
    ],
)
def test_a_layout_tells_what_is_the_same_from_the_top(before: list[int], ids: list[int], layout: str) -> None:
    assert question(before, ids).layout() == layout


tokens = st.lists(st.integers(0, 3), max_size=200)


@given(tokens, tokens)
def test_the_parts_of_a_layout_add_up(before: list[int], ids: list[int]) -> None:
    told, _, total = question(before, ids).layout().rpartition(": ")
    parts = [int(part.split()[0]) for part in told.split(", ") if part]
    assert sum(parts) == int(total.split()[0]) == len(ids)


def test_a_line_is_read_and_no_byte_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b" 128 \n0\nrest")
    os.close(theirs)
    saved = os.dup(0)
    os.dup2(ours, 0)
    try:
        assert [read_line(), read_line(), os.read(0, 100)] == ["128", "0", b"rest"]
        assert read_line() == "", "the end of a pipe is no answer"
    finally:
        os.dup2(saved, 0)


class Paper:
    """What `tell_score` needs of a run: measurements, a block size, and paper to write on."""

    def __init__(self, cached_tokens: int) -> None:
        self.model, self.result, self.lines = SimpleNamespace(block_size=16), {}, []
        self.rows = [SimpleNamespace(request=1, session=None, cached_tokens=cached_tokens)]

    def measured(self, experiment: str, arm: str) -> list[SimpleNamespace]:
        return self.rows if (experiment, arm) == ("main", "bad") else []

    def print(self, text: str, **_: object) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [(32, "exact"), (16, "within one block"), (48, "within one block"), (49, "off"), (0, "off"), (None, "skipped")],
)
def test_an_answer_is_exact_or_within_a_block_or_off(answer: int | None, verdict: str) -> None:
    paper = Paper(cached_tokens=32)
    tell_score(paper, [question([1] * 40, [1] * 50)], [answer])
    [told] = paper.result["predictions"]
    assert (told["answer"], told["measured"], told["verdict"]) == (answer, 32, verdict)
    assert told["why"] == "40 are the same: 2 whole blocks"


def test_the_last_token_is_never_found() -> None:
    paper = Paper(cached_tokens=16)
    tell_score(paper, [question([1] * 32, [1] * 32)], [16])
    [told] = paper.result["predictions"]
    assert told["why"] == "31 are the same: 1 whole blocks"


def test_without_answers_nothing_is_told() -> None:
    paper = Paper(cached_tokens=0)
    tell_score(paper, [question([], [1])], [])
    assert (paper.lines, paper.result) == ([], {})
