"""Sessions over HTTP: what is sent, what a fault is called, and what was found."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import socket
import ssl
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.sessions import KEPT, MOVED, row, rows

from going_further import http_sessions as tool
from stable_prefix_vs_timestamp import common_prefix

BUILT_IN = Path(__file__).parent.parent / "built_in_model" / "cpu"


# --- what is sent ---


@pytest.fixture(scope="module", params=["built-in", "llama"])
def encode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = BUILT_IN if request.param == "built-in" else write_llama(tmp_path_factory.mktemp("llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_turn_starts_with_all_tokens_of_the_turn_before_and_adds_more_than_two_blocks_of_a_cpu(encode) -> None:
    prompts = [encode(messages) for messages in tool.conversation("000-10482", 0, 300, 5)]
    for before, after in itertools.pairwise(prompts):
        assert common_prefix(before, after) == len(before)
        assert len(after) - len(before) > 2 * 128


def test_two_sessions_and_two_names_of_one_session_share_no_block(encode) -> None:
    first, *others = (
        encode(tool.conversation(name, session, 300, 2)[-1])
        for name, session in (("000-10482", 0), ("001-10482", 1), ("000-57110", 0))
    )
    for other in others:
        assert common_prefix(first, other) < 16, "the smallest block of all builds"


def test_under_another_name_a_session_says_the_same_at_the_same_length(encode) -> None:
    one, other = (tool.conversation(name, 3, 300, 4) for name in ("003-10482936", "003-57110482"))
    for a, b in zip(one, other, strict=True):
        assert [m["content"] for m in a[1:]] == [m["content"] for m in b[1:]]
        assert abs(len(encode(a)) - len(encode(b))) <= 16


def test_sessions_have_different_lengths_that_depend_on_the_seed_alone() -> None:
    args = argparse.Namespace(seed=0, sessions=50, requests=5)
    assert set(tool.session_lengths(args).values()) == {3, 4, 5}
    assert tool.session_lengths(args) == tool.session_lengths(args)
    assert set(tool.session_lengths(argparse.Namespace(seed=0, sessions=9, requests=2)).values()) == {2}


# --- what a fault is called ---


def test_an_unknown_host_and_a_failed_handshake_have_names_of_their_own() -> None:
    openai = pytest.importorskip("openai", reason="the client that is tested here")
    for cause, kind in ((socket.gaierror(-2, "?"), "unknown host"), (ssl.SSLError(1, "?"), "TLS failed")):
        fault = openai.APIConnectionError(request=None)
        fault.__cause__ = ExceptionGroup("all attempts failed", [cause])
        assert tool.describe(fault, keyed=False) == kind


# --- what was found ---


def test_a_reply_has_the_keys_of_a_lessons_measurement_and_its_round() -> None:
    reply = tool.Reply(experiment="main", arm="bad", session="000-10482", request=1, round=1)
    assert list(dataclasses.asdict(reply)) == [
        *("experiment", "arm", "request", "worker", "session", "prompt_tokens", "cached_tokens"),
        *("predicted_cached_tokens", "ttft_ms", "error"),
        *("engine_ttft_ms", "waiting_ms", "step_ms", "client_ms", "tpot_ms", "round"),
    ]
    assert reply.error == "no token"


@pytest.mark.parametrize(
    ("earlier", "cached", "block_size", "shared", "found"),
    [
        ([1000], 896, 128, 0, True),  # seven whole blocks of 128
        ([1000], 768, 128, 0, False),
        ([1000, 1500], 896, 128, 0, False),  # the turn before the last one
        ([1000, 1500], 1408, 128, 0, True),
        ([1000], 16, None, 0, True),  # blocks of unknown size
        ([1000], 0, None, 0, False),
        ([1000, 1500], 1000, None, 0, False),
        ([1000, 1500], 1008, None, 0, True),
        ([1000], 500, None, 500, False),  # what first turns find too
        ([1000, 1500], 1008, None, 1200, False),
    ],
)
def test_a_turn_finds_its_last_turn_when_no_earlier_one_could_have_left_as_much(
    earlier: list[int], cached: int, block_size: int | None, shared: int, found: bool
) -> None:
    reply = row("good", 0, len(earlier), 2000, cached)
    assert tool.finds_last_turn(earlier, reply, block_size, shared) is found


def test_a_turn_that_failed_is_passed_over_and_the_session_judged_by_the_turn_before_it() -> None:
    replies = rows(MOVED, KEPT)
    replies[6] = row("good", 0, 2, None, None, "HTTP 500 Internal Server Error: out of luck")
    good = tool.summarise(replies, 128)["good"]
    assert (good.found, len(good.later), good.faults) == (2, 2, {"HTTP 500 Internal Server Error": 1})
    assert [reply.request for reply in good.timed] == [1, 3]
