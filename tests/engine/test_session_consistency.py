"""Lesson 4 on real workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.processes import left_behind, lesson_processes

SCRIPT = "session_consistency.py"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def done(run_script):
    return run_script(SCRIPT)


def test_the_default_run_meets_every_prediction_and_claim(done, check_result) -> None:
    assert done.status == 0, done.out + done.err
    check_result(done.result, "session_consistency")
    assert len(done.out.splitlines()) <= 40
    assert (done.result["environment"]["workers"], done.result["environment"]["sessions"]) == (2, 6)


def test_both_arms_send_the_same_requests_to_two_workers(done) -> None:
    bad, good = done.rows("main", "bad"), done.rows("main", "good")
    sent = [sorted((m["session"], m["request"], m["prompt_tokens"]) for m in arm) for arm in (bad, good)]
    assert sent[0] == sent[1]
    assert {m["worker"] for m in bad} == {m["worker"] for m in good} == {0, 1}


def test_affinity_keeps_every_session_on_one_worker_and_finds_more(done) -> None:
    homes = {(m["session"], m["worker"]) for m in done.rows("main", "good")}
    assert len(homes) == 6
    bad, good = (sum(m["cached_tokens"] for m in done.rows("main", arm)) for arm in ("bad", "good"))
    assert good > bad


def test_deeper_shows_the_price_of_a_hot_session_and_the_loss_of_a_worker(run_script, check_result) -> None:
    done = run_script(SCRIPT, "--deeper", "--prefix-tokens", "1000", "--sessions", "4", "--requests", "4")
    assert done.status == 0, done.out + done.err
    check_result(done.result, "session_consistency")
    policies = {m["arm"] for m in done.result["measurements"] if m["experiment"] == "hot session"}
    assert policies == {"round robin", "affinity", "bounded load", "prefix-aware"}
    for policy in policies:
        sent = done.rows("hot session", policy)
        assert sum(m["session"] == "hot" for m in sent) * 2 == len(sent), "the hot session sends half of all requests"
    after = [m for m in done.rows("lost worker", "good") if m["request"] >= 2]
    assert len({m["worker"] for m in after}) == 1, "one of two workers is left"
    turns = [
        sorted((m["session"], m["request"]) for m in done.rows(*of))
        for of in (("lost worker", "good"), ("main", "good"))
    ]
    assert turns[0] == turns[1], "no request is lost"


def test_another_architecture_block_size_and_seed(run_script, check_result, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    options = ["--model", str(model), "--block-size", "32", "--prefix-tokens", "500", "--sessions", "3", "--seed", "7"]
    done = run_script(SCRIPT, *options, "--deeper")
    assert done.status == 0, done.out + done.err
    check_result(done.result, "session_consistency")


def test_a_seed_with_which_round_robin_is_sticky_by_accident_is_refused_before_an_engine_starts() -> None:
    command = [sys.executable, ROOT / SCRIPT, "--sessions", "2", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "by accident: choose another --seed" in done.stderr


def test_a_template_that_is_not_prefix_stable_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    moving = "{% for m in messages %}{% if loop.last %}{{ messages[0].content }}{% endif %}{{ m.content }}{% endfor %}"
    model = write_llama(tmp_path / "moving", template=moving)
    command = [sys.executable, ROOT / SCRIPT, "--model", model, "--prefix-tokens", "500"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "not prefix-stable, turn 1 departs from turn 0" in done.stderr


def test_a_session_too_short_to_see_the_loss_of_its_worker_does_no_harm(run_script) -> None:
    options = ["--sessions", "3", "--requests", "2", "--prefix-tokens", "400", "--deeper"]
    done = run_script(SCRIPT, *options)
    assert done.status == 0, done.out + done.err


@pytest.mark.parametrize("workers", ["1", str(len(os.sched_getaffinity(0)) + 1)])
def test_a_number_of_workers_that_cannot_be_is_wrong_usage(workers: str) -> None:
    done = subprocess.run([sys.executable, ROOT / SCRIPT, "--workers", workers], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.alone
def test_sessions_that_exceed_the_memory_are_refused_with_the_numbers_before_an_engine_starts(tmp_path: Path) -> None:
    huge = {"num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 256}
    model = write_llama(tmp_path / "huge", **huge)
    command = [sys.executable, ROOT / SCRIPT, "--model", model, "--prefix-tokens", "2000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "GiB are free: take fewer --workers or --sessions" in done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_signal_while_both_workers_start_leaves_nothing(sent: signal.Signals, temporary: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, ROOT / SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(lesson_processes(temporary)) < 3:  # the lesson and two engines
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=10)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert "Traceback" not in out + err
    assert left_behind(temporary, killed=sent == signal.SIGKILL) == []
