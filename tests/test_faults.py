"""What the machine does to the commands that need no engine: no room to print, odd locales, proxies, missing files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOG = '{"messages": [{"role": "user", "content": "Gr\u00fc\u00dfe, \u4f60\u597d, one"}]}\n'


def run(words: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)
    assert "Traceback" not in done.stderr
    return done


def replay(tmp_path: Path) -> list[str | Path]:
    log = tmp_path / "log.jsonl"
    log.write_text(LOG + LOG.replace("one", "two"), encoding="utf-8")
    return ["-m", "going_further.replay_request_log", log, "--without-engine"]


COMMANDS = {
    "list": lambda _: ["run_all_examples.py", "--list"],
    "show": lambda _: ["run_all_examples.py", "--show", "results/cpu.json"],
    "check": lambda _: ["setup_and_test.py", "--check"],
    "replay": replay,
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_behind_standard_output_is_one_line(command, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(command(tmp_path), stdout=full)
    assert done.returncode == 1
    assert done.stderr.endswith("error: cannot write: No space left on device\n")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_closed_standard_output_is_one_line(command, tmp_path: Path) -> None:
    done = run(command(tmp_path), preexec_fn=lambda: os.close(1))
    assert done.returncode == 1
    assert "standard output is closed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_texts_that_the_terminal_cannot_show_are_no_fault(locale: dict[str, str], tmp_path: Path) -> None:
    done = run(replay(tmp_path), stdout=subprocess.PIPE, env=os.environ | locale)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 requests" in done.stdout


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, "SOCKS"),
        ({"HTTP_PROXY": "http://somebody:secret@:::"}, "InvalidURL"),
        ({"ALL_PROXY": "ftp://127.0.0.1"}, "ValueError"),
        ({"SSL_CERT_FILE": "/no/such/file"}, "FileNotFoundError"),
        ({"OPENAI_PROJECT_ID": "\u00fc"}, "UnicodeEncodeError"),
    ],
    ids=str,
)
def test_an_environment_that_the_client_cannot_use_is_one_line(variable: dict[str, str], says: str) -> None:
    tool = ["-m", "going_further.is_it_sticky", "http://127.0.0.1:9/v1"]
    done = run(tool, stdout=subprocess.PIPE, env=os.environ | variable)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"error: no client: {'' if says == 'SOCKS' else says}" in done.stderr
    assert says in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("options", [[], ["--model", "somebody/a-model"]], ids=str)
def test_an_address_of_the_hub_that_is_none_is_one_line(options: list[str], tmp_path: Path) -> None:
    done = run([*replay(tmp_path), *options], stdout=subprocess.PIPE, env=os.environ | {"HF_ENDPOINT": "http://[::1"})
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "Invalid IPv6 URL" in done.stderr


@pytest.mark.parametrize("script", ["run_all_examples.py", "setup_and_test.py"])
def test_a_command_that_was_copied_alone_says_so_in_one_line(script: str, tmp_path: Path) -> None:
    alone = shutil.copy(ROOT / script, tmp_path)
    done = run([alone, "--list" if script.startswith("run") else "--check"])
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "is not beside this script: copy the whole folder" in done.stderr
