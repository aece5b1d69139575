"""Lesson 2 on the real engine."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import write_llama

SCRIPT = "append_only_vs_inplace_edit.py"
ROOT = Path(__file__).parent.parent.parent
# As some published templates do: the system message is moved into the last user message.
MOVING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[user]{% if loop.last %}{{ messages[0].content }}{% endif %}{{ m.content }}[/user]"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def done(run_script):
    return run_script(SCRIPT)


def test_the_default_run_meets_every_prediction_and_claim(done, check_result) -> None:
    assert done.status == 0, done.out + done.err
    check_result(done.result, "append_only_vs_inplace_edit")
    assert len(done.out.splitlines()) <= 40


def test_in_place_computes_everything_each_turn_and_append_only_what_is_new(done) -> None:
    bad, good = done.rows("main", "bad"), done.rows("main", "good")
    assert len(bad) == len(good) == 10
    assert {m["cached_tokens"] for m in bad} == {0}, "the state stands in the first block"
    for before, after in itertools.pairwise(good):
        new = after["prompt_tokens"] - before["prompt_tokens"]
        assert after["prompt_tokens"] - after["cached_tokens"] < new + 128
    assert sum(m["prompt_tokens"] for m in good) > sum(m["prompt_tokens"] for m in bad), "append-only sends more"


def test_prices_change_the_bill_and_nothing_else(run_script) -> None:
    dear = run_script(SCRIPT, "--requests", "3", "--prefix-tokens", "600", "--price-input", "10", "--price-cached", "1")
    assert dear.status == 0, dear.out + dear.err
    computed = sum(m["prompt_tokens"] - m["cached_tokens"] for m in dear.rows("main", "bad"))
    cached = sum(m["cached_tokens"] for m in dear.rows("main", "bad"))
    assert f"${(computed * 10 + cached) / 1e6:.4f}" in dear.out


def test_deeper_adds_all_further_experiments(run_script, check_result) -> None:
    done = run_script(SCRIPT, "--deeper", "--prefix-tokens", "1000")
    assert done.status == 0, done.out + done.err
    check_result(done.result, "append_only_vs_inplace_edit")
    kept, shuffled = done.rows("main", "good"), done.rows("key_order", "bad_key_order")
    assert sum(m["cached_tokens"] for m in shuffled) < sum(m["cached_tokens"] for m in kept) / 2
    folded = done.rows("compaction", "good_compact")
    assert folded[5]["prompt_tokens"] < folded[4]["prompt_tokens"] < kept[5]["prompt_tokens"]
    assert folded[5]["cached_tokens"] == 0, "the turn of the fold is cold: the state stands in the first block"
    ids, text = (done.rows("generated", arm)[1] for arm in ("ids", "text"))
    assert ids["cached_tokens"] == text["cached_tokens"] + 128, "the block that the answer completed"
    assert "-82%, not -95%" in done.out
    assert "-74%, not -90%" in done.out
    [first, second], [cold] = (done.rows("course", arm) for arm in ("cache", "no cache"))
    assert (first["prompt_tokens"], second["prompt_tokens"], cold["cached_tokens"]) == (120, 190, 0)
    assert second["cached_tokens"] == 128, "the answer is found but for its last token, in whole blocks: 128 of 169"
    assert "$0.000370" in done.out, "the text's own figure"
    assert "$0.000748" in done.out, "62 new and 128 cached tokens at its prices"


@pytest.mark.parametrize("block_size", [32, 64])
def test_another_architecture_tokenizer_template_and_block_size(
    block_size: int, run_script, check_result, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = write_llama(tmp_path / "llama", vocab_size=700)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model)
    assert max(tokenizer.get_vocab().values()) == 700, "a token for which the model has no room: never generated"
    sizes = ["--block-size", str(block_size), "--prefix-tokens", "1000", "--requests", "5", "--deeper"]
    done = run_script(SCRIPT, "--model", str(model), *sizes)
    assert done.status == 0, done.out + done.err
    check_result(done.result, "append_only_vs_inplace_edit")
    assert done.rows("course", "cache")[1]["cached_tokens"] == 169 // block_size * block_size


@pytest.mark.alone
def test_a_template_that_is_not_prefix_stable_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "moving", template=MOVING_TEMPLATE)
    begin = time.monotonic()
    command = [sys.executable, ROOT / SCRIPT, "--model", model, "--prefix-tokens", "600"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "not prefix-stable, turn 1 departs from turn 0 at token" in done.stderr
    assert "choose a --model whose template" in done.stderr
    assert time.monotonic() - begin < 30


def test_without_prefix_caching_the_claims_fail(run_script) -> None:
    done = run_script(SCRIPT, "--no-prefix-caching", "--prefix-tokens", "600", "--requests", "2")
    assert done.status == 1
    failed = {claim["claim"] for claim in done.result["claims"] if not claim["holds"]}
    assert "append-only: every turn finds all whole blocks of the turn before" in failed
