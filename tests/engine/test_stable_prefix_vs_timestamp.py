"""Lesson 1 on the real engine."""

from __future__ import annotations

import platform
import statistics
from pathlib import Path

import pytest
from helpers.models import write_llama

pytestmark = pytest.mark.alone  # it looks at times
SCRIPT = "stable_prefix_vs_timestamp.py"


@pytest.fixture(scope="module")
def done(run_script):
    return run_script(SCRIPT)


@pytest.mark.quick
def test_the_default_run_meets_every_prediction_and_claim(done, check_result) -> None:
    assert done.status == 0, done.out + done.err
    check_result(done.result, "stable_prefix_vs_timestamp")
    environment = done.result["environment"]
    assert (environment["model"], environment["weights"]) == ("built_in_model/cpu", "random")
    assert environment["block_size"] == 128


@pytest.mark.quick
def test_bad_finds_nothing_and_good_the_whole_static_prefix(done) -> None:
    bad, good = done.rows("main", "bad"), done.rows("main", "good")
    assert len(bad) == len(good) == 6
    assert [m["cached_tokens"] for m in bad] == [0] * 6, "the clock stands in the first block"
    assert good[0]["cached_tokens"] == 0, "request 0 fills the cache"
    for m in good[1:]:
        assert m["cached_tokens"] >= 4000 // 128 * 128 - 128
        assert m["prompt_tokens"] - m["cached_tokens"] < 256


@pytest.mark.quick
def test_the_output_tells_the_story_on_one_screen(done) -> None:
    assert len(done.out.splitlines()) <= 40
    for text in ("BAD", "GOOD", "random weights", "blocks of 128 tokens", "hit rate", "first differ at token", "TTFT"):
        assert text in done.out


@pytest.mark.quick
def test_the_clients_ttft_is_the_engines_within_a_millisecond_or_a_fiftieth(done) -> None:
    assert all(m["client_ms"] > 0 for m in done.result["measurements"]), "a client sees a token after it is made"
    measured = done.rows("main", "bad") + done.rows("main", "good")
    adds, ttft = (statistics.median(m[key] for m in measured) for key in ("client_ms", "ttft_ms"))
    assert adds <= max(1, 0.02 * ttft)


@pytest.mark.quick
def test_the_parts_of_a_ttft_add_up_to_it(done) -> None:
    for m in done.result["measurements"]:
        assert m["waiting_ms"] + m["step_ms"] == pytest.approx(m["engine_ttft_ms"])
        assert m["client_ms"] + m["waiting_ms"] + m["step_ms"] == pytest.approx(m["ttft_ms"])


@pytest.mark.quick
@pytest.mark.skipif("microsoft" in platform.release().lower(), reason="under WSL vLLM spawns its engine")
def test_an_engine_starts_in_less_time_than_vllm_is_imported_since_it_does_not_import_it_again(done) -> None:
    assert done.result["seconds"]["engine_start"] < done.result["seconds"]["imports"]


@pytest.mark.quick
def test_the_warm_up_ends_with_hits_as_long_as_the_lessons(done) -> None:
    first, *hits = done.rows("warm_up", "decoy")
    assert first["cached_tokens"] == 0
    assert 2 <= len(hits) <= 8
    longest = max(m["prompt_tokens"] - m["cached_tokens"] for m in done.rows("main", "good")[1:])
    computed = {m["prompt_tokens"] - m["cached_tokens"] for m in hits}
    assert all(longest <= tokens < longest + 128 for tokens in computed), "within a block"


def test_deeper_adds_all_further_experiments(run_script, check_result) -> None:
    done = run_script(SCRIPT, "--deeper", "--prefix-tokens", "2000")
    assert done.status == 0, done.out + done.err
    check_result(done.result, "stable_prefix_vs_timestamp")
    experiments = {m["experiment"] for m in done.result["measurements"]}
    assert experiments == {
        "warm_up",
        "main",
        "position",
        "user_data",
        *(f"length {n}" for n in (500, 1000, 2000, 4000)),
    }
    lost = [done.rows("position", f"{percent}%")[0]["cached_tokens"] for percent in (0, 25, 50, 75, 100)]
    assert lost == sorted(lost), "the later the change, the more is found"
    assert lost[0] == 0 < lost[1]
    table = done.out.split("Anatomy of a hit")[1].splitlines()[2:6]
    assert [line.split()[0] for line in table] == ["500", "1,000", "2,000", "4,000"]
    assert "hashing 4,000 tokens, in blocks of" in done.out
    for length in (500, 1000, 2000, 4000):
        hits = done.rows(f"length {length}", "hit")
        assert {m["cached_tokens"] for m in hits} == {(length - 1) // 128 * 128}
        assert all(m["tpot_ms"] > 0 for m in hits)


def test_without_prefix_caching_the_claims_fail_and_the_exit_status_is_1(run_script) -> None:
    done = run_script(SCRIPT, "--no-prefix-caching", "--prefix-tokens", "600", "--requests", "2")
    assert done.status == 1
    failed = [claim["claim"] for claim in done.result["claims"] if not claim["holds"]]
    assert "predicted = measured cached tokens on every request" in failed
    assert "a good request finds the whole static prefix" in failed
    assert "FAILED" in done.out
    assert {m["cached_tokens"] for m in done.result["measurements"]} == {0}


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_another_architecture_tokenizer_template_and_block_size(
    block_size: int, run_script, check_result, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "llama")
    sizes = ["--block-size", str(block_size), "--prefix-tokens", "1500", "--requests", "4"]
    done = run_script(SCRIPT, "--model", str(model), *sizes)
    assert done.status == 0, done.out + done.err
    check_result(done.result, "stable_prefix_vs_timestamp")
    assert done.result["environment"]["block_size"] == block_size
    shared = {m["cached_tokens"] for m in done.rows("main", "good")[1:]}
    assert all(cached >= 1500 - 2 * block_size and cached % block_size == 0 for cached in shared)


def test_layers_with_a_sliding_window_beside_full_ones_are_cached_like_those(
    run_script, check_result, tmp_path: Path
) -> None:
    gemma = dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", query_pre_attn_scalar=32)
    kinds = ["sliding_attention", "full_attention"]
    model = write_llama(tmp_path / "gemma", **gemma, sliding_window=256, layer_types=kinds)
    done = run_script(SCRIPT, "--model", str(model), "--prefix-tokens", "1500", "--requests", "3")
    assert done.status == 0, done.out + done.err
    check_result(done.result, "stable_prefix_vs_timestamp")
    assert min(m["cached_tokens"] for m in done.rows("main", "good")[1:]) > 256
