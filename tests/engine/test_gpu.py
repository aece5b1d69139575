"""What a machine with an NVIDIA GPU must show: `pytest -m gpu`."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

HAS_GPU = shutil.which("nvidia-smi") is not None
pytestmark = [pytest.mark.gpu, pytest.mark.alone, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]
ROOT = Path(__file__).parent.parent.parent
LESSONS = (
    "stable_prefix_vs_timestamp", "append_only_vs_inplace_edit", "manual_cache_boundary", "session_consistency",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_once(run_script):
    """Return a function that runs a lesson with its defaults, once for all tests."""
    done = {}

    def run(lesson: str):
        if lesson not in done:
            done[lesson] = run_script(f"{lesson}.py")
        return done[lesson]

    return run


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_lesson_meets_every_prediction_and_claim(lesson: str, run_once, check_result) -> None:
    done = run_once(lesson)
    assert done.status == 0, done.out + done.err
    check_result(done.result, lesson)
    assert not done.result["environment"]["device"].startswith("CPU")
    assert f"{done.result['environment']['execution']}\n" in done.out


@pytest.mark.parametrize("lesson", LESSONS[:3])
def test_a_hit_is_at_least_twice_as_fast_as_a_miss(lesson: str, run_once) -> None:
    bad, good = run_once(lesson).rows("main", "bad")[1:], run_once(lesson).rows("main", "good")[1:]
    miss, hit = (statistics.median(m["ttft_ms"] for m in arm) for arm in (bad, good))
    assert hit < miss / 2


def test_the_pinned_scheduler_keeps_its_prefix_under_a_flood() -> None:
    command = [sys.executable, "-m", "going_further.pinned_system_prompt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
