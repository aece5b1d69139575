"""--predict on the real engine: answers from a pipe, held against what was measured, by lessons and runner."""

from __future__ import annotations

import pytest

LESSONS = (
    "stable_prefix_vs_timestamp.py",
    "append_only_vs_inplace_edit.py",
    "manual_cache_boundary.py",
    "session_consistency.py",
)
SMALL = ("--prefix-tokens", "600", "--requests", "3")


@pytest.mark.parametrize("lesson", LESSONS)
def test_an_answer_in_whole_blocks_of_what_is_shown_is_exact(lesson: str, run_script, check_result) -> None:
    first = run_script(lesson, *SMALL, "--predict")  # the end of input skips every question
    check_result(first.result, lesson.removesuffix(".py"))
    told = first.result["predictions"]
    assert [row["verdict"] for row in told] == ["skipped"] * 3
    assert "0 exact, 0 within one block, 0 off" in first.out

    right, close = told[0]["measured"], told[1]["measured"] + 128
    done = run_script(lesson, *SMALL, "--predict", answers=f"{right}\nwhat?\n{close}\n1000000\n")
    assert [row["verdict"] for row in done.result["predictions"]] == ["exact", "within one block", "off"]
    assert [row["measured"] for row in done.result["predictions"]] == [row["measured"] for row in told]
    assert done.out.count("a whole number, or Enter") == 1
    assert "1 exact, 1 within one block, 1 off" in done.out
    assert done.status == 0, "a wrong answer is no failed claim"


def test_nonsense_is_asked_again_once(run_script) -> None:
    done = run_script(LESSONS[0], *SMALL, "--predict", answers="-1\nten\n0\n\n")
    assert [row["answer"] for row in done.result["predictions"]] == [None, 0, None]


def test_the_runner_hands_the_rest_of_a_pipe_to_the_next_lesson_and_sums_up(run_script) -> None:
    answers = "0\n640\n0\n0\n1000000\n\n"
    done = run_script("run_all_examples.py", "1", "2", *SMALL, "--predict", answers=answers)
    one, two = done.result["lessons"]
    assert [row["answer"] for row in one["predictions"] + two["predictions"]] == [0, 640, 0, 0, 1000000, None]
    verdicts = [row["verdict"] for row in one["predictions"] + two["predictions"]]
    exact, close, off = (verdicts.count(verdict) for verdict in ("exact", "within one block", "off"))
    assert f"your score: {exact} exact, {close} within one block, {off} off, 1 skipped" in done.out
    assert exact >= 3
    assert off >= 1


def test_without_the_option_nothing_is_asked(run_script) -> None:
    done = run_script(LESSONS[0], *SMALL)
    assert "Predict first" not in done.out
    assert "predictions" not in done.result
