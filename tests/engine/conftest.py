"""Start the scripts as a learner does, on the real engine, and look at what they print, write and leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MEASUREMENT_KEYS = {
    "experiment": str, "arm": str, "request": int, "worker": int | None, "session": str | None,
    "prompt_tokens": int, "cached_tokens": int, "predicted_cached_tokens": int, "ttft_ms": float, "error": None,
    "engine_ttft_ms": float | None, "waiting_ms": float | None, "step_ms": float | None, "client_ms": float | None,
    "tpot_ms": float | None,
}  # fmt: skip
ENVIRONMENT_KEYS = {
    *("vllm", "torch", "transformers", "python", "device", "model", "weights", "dtype", "block_size", "execution"),
    *("kv_cache_tokens", "prefix_tokens", "requests", "started_at", "command"),
}
LESSON_KEYS = {"pinned_system_prompt": set(), "session_consistency": {"verdict"}}  # beside those of every result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@dataclass
class Done:
    status: int
    out: str
    err: str
    result: dict | None

    def rows(self, experiment: str, arm: str) -> list[dict]:
        return [m for m in self.result["measurements"] if (m["experiment"], m["arm"]) == (experiment, arm)]


@pytest.fixture(scope="module")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """Return a function that runs a script or module here with `--json`, and checks what every run must keep."""

    def run(script: str, *options: str, json_name: str = "out.json", answers: str | None = None) -> Done:
        path = tmp_path_factory.mktemp("run") / json_name
        what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
        command = [sys.executable, *what, *options, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, input=answers or "", cwd=ROOT)
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stdout, "no colour and no cursor movement in a pipe"
        assert max(map(len, done.stdout.splitlines()), default=0) <= 80, done.stdout
        return Done(done.returncode, done.stdout, done.stderr, json.loads(path.read_text()) if path.exists() else None)

    return run


@pytest.fixture(scope="session")
def check_result() -> Callable[[dict, str], None]:
    """Return a check of a lesson's JSON: its schema, that every prediction was met, and that every claim holds."""

    def check(result: dict, lesson: str) -> None:
        keys = {"schema", "lesson", "title", "environment", "seconds", "measurements", "claims"}
        assert set(result) - {"predictions"} == keys | LESSON_KEYS.get(lesson, {"verdict", "break"})
        assert (result["schema"], result["lesson"]) == (1, lesson)
        assert set(result["environment"]) >= ENVIRONMENT_KEYS
        assert set(result["seconds"]) == {"imports", "engine_start", "warm_up", "measuring"}
        assert all(value > 0 for value in result["seconds"].values())
        for row in result["measurements"]:
            assert set(row) == set(MEASUREMENT_KEYS)
            for key, kind in MEASUREMENT_KEYS.items():
                assert row[key] is None if kind is None else isinstance(row[key], kind), (key, row)
            assert row["cached_tokens"] == row["predicted_cached_tokens"], row
        assert [claim for claim in result["claims"] if not claim["holds"]] == []
        assert str(ROOT.parent) not in json.dumps(result), "no path of this machine"
        assert {m["arm"] for m in result["measurements"] if m["experiment"] == "main"} == {"bad", "good"}

    return check


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder in which the scripts of a test keep their temporary files; short, for the sake of sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("SPT_NOENV", "1")  # vLLM renames its processes; not over what they are found by
        yield Path(folder)
