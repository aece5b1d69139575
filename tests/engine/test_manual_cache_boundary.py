"""Lesson 3 on the real engine, and on a transformers model with the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import write_llama

SCRIPT = "manual_cache_boundary.py"


@pytest.fixture(scope="module")
def done(run_script):
    return run_script(SCRIPT)


def test_the_default_run_meets_every_prediction_and_claim(done, check_result) -> None:
    assert done.status == 0, done.out + done.err
    check_result(done.result, "manual_cache_boundary")
    assert len(done.out.splitlines()) <= 45, "two engines, two tables"


def test_split_at_the_marker_even_the_first_user_hits(done) -> None:
    assert done.rows("main", "good")[1]["cached_tokens"] >= 4000 // 128 * 128 - 128
    assert {m["cached_tokens"] for m in done.rows("main", "bad")} == {0}


def test_the_store_finds_the_marked_prefix_token_for_token(done) -> None:
    bad, good = done.rows("explicit_store", "bad"), done.rows("explicit_store", "good")
    assert {m["cached_tokens"] for m in bad} == {0}
    assert good[0]["cached_tokens"] == 0
    assert len({m["cached_tokens"] for m in good[1:]}) == 1
    assert good[1]["cached_tokens"] >= 4000


def test_the_stored_kv_gives_the_same_answer_and_corrupted_kv_another_one(done) -> None:
    claims = {claim["claim"]: claim["holds"] for claim in done.result["claims"]}
    assert claims["logits from stored KV are those of a full prefill"]
    assert claims["the next token is the same"]
    assert claims["corrupted KV does change the logits"]


def test_deeper_shows_the_boundary_in_three_wrong_places(run_script, check_result) -> None:
    done = run_script(SCRIPT, "--deeper", "--prefix-tokens", "2000")
    assert done.status == 0, done.out + done.err
    check_result(done.result, "manual_cache_boundary")
    on_vllm = {name: done.rows("boundary", name)[0]["cached_tokens"] for name in ("right", "too early", "too late")}
    assert on_vllm["too early"] < on_vllm["right"] <= on_vllm["too late"]
    assert done.rows("boundary_store", "too late")[0]["cached_tokens"] == 0
    assert done.rows("boundary_store", "inside a token")[0]["cached_tokens"] == 0
    kept, not_kept = (done.rows("kv_cache", arm) for arm in ("kept", "not kept"))
    assert [m["prompt_tokens"] for m in kept] == [m["prompt_tokens"] for m in not_kept]
    longest = -1
    assert not_kept[longest]["tpot_ms"] > 3 * kept[longest]["tpot_ms"], "a thousand tokens computed for one, and one"
    assert "with the KV kept each token is computed once" in {claim["claim"] for claim in done.result["claims"]}


@pytest.mark.parametrize(
    "static",
    [
        "Du bist ein Übersetzer.\n" + "Antworte knapp und höflich. " * 60,
        "one long line without an end " * 40,  # no sentence ends, no line does
        "你是图书馆的服务台帮助读者" * 12,  # no space between words either
    ],
    ids=["sentences", "words", "characters"],
)
def test_a_prompt_file_of_ones_own_runs_with_another_architecture(
    static: str, run_script, check_result, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"{static}// __CACHE_END__ Was heißt 猫?", encoding="utf-8")
    model = write_llama(tmp_path / "llama", max_position_embeddings=2048)  # less than the built-in prompt takes
    options = ["--prompt-file", str(prompt), "--model", str(model), "--block-size", "32", "--requests", "3", "--deeper"]
    done = run_script(SCRIPT, *options)
    assert done.status == 0, done.out + done.err
    check_result(done.result, "manual_cache_boundary")


def test_a_prefix_shorter_than_a_block_is_refused_before_an_engine_starts(run_script, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be kind.\n// __CACHE_END__\nHello?")
    done = run_script(SCRIPT, "--prompt-file", str(prompt))
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert "tokens, too few to lose a block of 128: write more before the marker" in done.err


def test_a_model_too_large_for_the_second_engine_is_refused_before_the_first_one_starts(
    run_script, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "huge", hidden_size=8192, intermediate_size=32768, num_hidden_layers=80)
    done = run_script(SCRIPT, "--model", str(model), "--prefix-tokens", "600")
    assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert "this model in float32 needs" in done.err


def test_a_prompt_file_without_marker_is_refused_before_anything_starts(run_script, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be kind. Hello?")
    done = run_script(SCRIPT, "--prompt-file", str(prompt))
    assert (done.status, done.out) == (2, "")
    assert "0 markers" in done.err


def test_the_boundary_of_ones_own_prompts_is_found_shown_and_used(run_script, tmp_path: Path) -> None:
    rules = "".join(f"Rule {n}: be brief and name the order.\n" for n in range(40))
    tools = "".join(f"Tool find_{n}(id) finds things of kind {n}.\n" for n in range(40))
    options = []
    for n in range(3):
        prompt = tmp_path / f"{n}.txt"
        prompt.write_text(f"{rules}Time: 2026-01-15 09:3{n}\n{tools}Where is order 77{n}?\n")
        options += ["--prompt-file", str(prompt)]
    done = run_script(SCRIPT, *options, "--requests", "3")
    assert done.status == 0, done.out + done.err
    found = done.result["found_boundary"]
    assert found["characters"] == len(rules)
    assert [kind for kind, _, _ in found["differences"]] == ["clock", "text"]
    assert found["shared_behind"] > 128, "the tools stand behind the clock"
    assert found["marked_prompt"].startswith(rules + "// __CACHE_END__\nTime: ")
    assert "  | // __CACHE_END__\n  | Time: 2026-01-15 09:30\n" in done.out
    first_user = done.rows("main", "good")[1]
    assert first_user["cached_tokens"] == found["tokens"] // 128 * 128 or (
        first_user["cached_tokens"] == (found["tokens"] // 128 + 1) * 128
    ), "the template's own tokens stand before it"


def test_prompts_without_a_common_beginning_are_told_what_to_move(run_script, tmp_path: Path) -> None:
    options = []
    for n in range(2):
        prompt = tmp_path / f"{n}.txt"
        prompt.write_text(f"{n}: 2026-01-15 09:3{n}\n" + "Be brief.\n" * 200)
        options += ["--prompt-file", str(prompt)]
    done = run_script(SCRIPT, *options)
    assert (done.status, len(done.err.splitlines())) == (1, 1), done.err
    assert "no beginning in common: move what differs to their end (clock: '0: 2026-01-15 09:30')" in done.err
