"""The README: short, and with no figure that a recorded run does not hold."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from going_further.replay.readers import read_log
from setup_and_test import SIZES
from stable_prefix_vs_timestamp import Measurement, Run, time_verdict

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = "\n".join([README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))])
RESULTS = sorted((ROOT / "results").glob("*.json"))


def block(kind: str, path: Path) -> str:
    """Return the code block that follows a marker in the README, or in docs/."""
    found = re.search(rf"<!-- {kind} results/{path.name} -->\n+```\n(.*?)```", TEXTS, re.DOTALL)
    assert found, f"neither the README nor docs/ show the {kind} of {path.name}"
    return found[1]


def test_it_is_no_longer_than_170_lines() -> None:
    assert len(README.splitlines()) <= 170


def test_the_first_25_lines_show_a_result_and_say_how_to_get_it_and_where_to_start() -> None:
    first = README.splitlines()[:25]
    assert "python3 run_all_examples.py" in first
    for text in ("BAD:", "TTFT fell from", "4 GiB of free memory", "**student**", "**instructor**", "**engineer**"):
        assert any(text in line for line in first), text


def test_the_table_at_the_top_is_lesson_1_as_it_was_recorded() -> None:
    path = ROOT / "results" / "cpu.json"
    lesson = json.loads(path.read_text(encoding="utf-8"))["lessons"][0]
    assert lesson["lesson"] == "stable_prefix_vs_timestamp"
    arms: dict[str, list[Measurement]] = {"bad": [], "good": []}
    for row in lesson["measurements"]:
        if row["experiment"] == "main":
            arms[row["arm"]].append(Measurement(**row))
    printed: list[str] = []
    to_list = SimpleNamespace(print=printed.append)
    Run.print_pair_head(to_list, "the clock opens the prompt", "clock rides with the question")
    for n, pair in enumerate(zip(arms["bad"], arms["good"], strict=True)):
        Run.print_pair(to_list, n, *pair)
    printed.append(time_verdict(arms["bad"][1:], arms["good"][1:]))
    assert block("pair", path).splitlines() == [re.sub(r"\[/?[a-z ]*\]", "", line).rstrip() for line in printed]


def test_there_is_a_recorded_run() -> None:
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_summary_shown_is_what_the_command_prints_from_the_recorded_run(path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "run_all_examples.py", "--show", path], capture_output=True, text=True, check=True
    )
    assert [line.rstrip() for line in block("summary", path).splitlines()] == [
        line.rstrip() for line in printed.stdout.splitlines() if line.strip()
    ]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_environment_shown_is_that_of_the_recorded_run(path: Path) -> None:
    shown = block("environment", path)
    for result in json.loads(path.read_text(encoding="utf-8"))["lessons"]:
        environment = result["environment"]
        for key in ("vllm", "torch", "transformers", "python", "device", "model", "weights", "dtype", "block_size"):
            assert str(environment[key]) in shown, key


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_recorded_run_is_of_the_model_that_is_here(path: Path) -> None:
    for result in json.loads(path.read_text(encoding="utf-8"))["lessons"]:
        config = ROOT / result["environment"]["model"] / "config.json"
        assert result["environment"]["config_sha256"] == hashlib.sha256(config.read_bytes()).hexdigest()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_in_a_recorded_run_every_prediction_is_met_and_every_claim_holds(path: Path) -> None:
    for result in json.loads(path.read_text(encoding="utf-8"))["lessons"]:
        assert all(m["cached_tokens"] == m["predicted_cached_tokens"] for m in result["measurements"])
        assert all(claim["holds"] for claim in result["claims"])


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(?:python3? )?(?:-m )?([\w./]+\.(?:py|txt|json))", README))))
def test_every_file_that_is_named_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"going_further\.(\w+)", TEXTS))))
def test_every_module_that_is_named_exists(name: str) -> None:
    assert (ROOT / "going_further" / f"{name}.py").exists()


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", TEXTS)) - {"--help"}))
def test_every_option_that_is_named_is_one_of_a_script(option: str) -> None:
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("going_further/*.py"), ROOT / "built_in_model" / "build.py"]
    assert any(f'"{option}"' in script.read_text(encoding="utf-8") for script in scripts)


def test_the_size_of_the_download_is_the_one_that_the_set_up_announces() -> None:
    assert f"{SIZES['requirements-cpu.txt'][0]} GB to download" in README


def test_the_client_line_logs_requests_that_the_replayer_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            message = {"role": "assistant", "content": "Yes."}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    [line] = re.findall(r"^openai\.DefaultHttpxClient\(.*\)$", README, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url, http_client = f"http://127.0.0.1:{server.server_port}/v1", eval(line, {"openai": openai})
            client = openai.OpenAI(base_url=url, api_key="none", http_client=http_client)
            for question in ("Is it so?", "And so?"):
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": question}])
        finally:
            server.shutdown()
    found = list(read_log(tmp_path / "log.jsonl"))
    assert [record.body["messages"][0]["content"] for record in found] == ["Is it so?", "And so?"]
