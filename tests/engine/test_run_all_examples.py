"""The runner with real lessons."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import left_behind, lesson_processes

pytestmark = pytest.mark.alone  # signals have ten seconds
ROOT = Path(__file__).parent.parent.parent
SMALL = ["--prefix-tokens", "600", "--requests", "3"]
LONG = ["--prefix-tokens", "300", "--requests", "200"]  # half a minute of requests, and the first ones come soon


def test_numbers_run_in_their_order_once_and_the_json_holds_every_lesson(tmp_path: Path, check_result) -> None:
    path = tmp_path / "all.json"
    command = [sys.executable, ROOT / "run_all_examples.py", "1", "1", *SMALL, "--json", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Example 1:") == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    content = json.loads(path.read_text())
    assert set(content) == {"schema", "lessons"}
    for result in content["lessons"]:
        check_result(result, "stable_prefix_vs_timestamp")
        assert (result["environment"]["prefix_tokens"], result["environment"]["requests"]) == (600, 3)
    assert "summary" in done.stdout

    again = subprocess.run([*command, "--append"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    kept, added = json.loads(path.read_text())["lessons"]
    assert kept == content["lessons"][0], "what was recorded stays as it was"
    assert added["environment"]["started_at"] > kept["environment"]["started_at"]


def test_a_failed_lesson_makes_the_exit_status_1_and_is_summarised() -> None:
    command = [sys.executable, ROOT / "run_all_examples.py", "1", *SMALL, "--no-prefix-caching"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "summary" in done.stdout


def test_wrong_usage_that_only_a_started_lesson_knows_is_wrong_usage() -> None:
    command = [sys.executable, ROOT / "run_all_examples.py", "1", "--prefix-tokens", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--prefix-tokens must be at least two blocks" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_the_lesson_too_and_leaves_nothing(sent: signal.Signals, temporary: Path) -> None:
    command = [sys.executable, str(ROOT / "run_all_examples.py"), "1", *LONG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("2 "):  # the lesson is measuring
            break
    begin = time.monotonic()
    process.send_signal(sent)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + sent
    assert "Traceback" not in out + err
    assert left_behind(temporary, 10 - (time.monotonic() - begin)) == []


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.5])
def test_a_second_interrupt_changes_nothing(wait: float, temporary: Path) -> None:
    command = [sys.executable, str(ROOT / "run_all_examples.py"), "1", *LONG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("2 "):
            break
    process.send_signal(signal.SIGINT)
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert left_behind(temporary) == []


def test_a_lesson_ends_with_a_runner_that_is_killed(temporary: Path) -> None:
    command = [sys.executable, str(ROOT / "run_all_examples.py"), "1", *LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while len(lesson_processes(temporary)) < 3:  # runner, lesson, engine
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.stdout.close()
    assert left_behind(temporary, killed=True) == []
    lesson = [sys.executable, ROOT / "stable_prefix_vs_timestamp.py", "--prefix-tokens", "300", "--requests", "2"]
    assert subprocess.run(lesson, capture_output=True).returncode == 0
    assert left_behind(temporary) == [], "the next lesson removes the folders of both"
