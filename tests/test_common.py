"""The door between the tools and the lessons, and what the tools share besides."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from going_further.common import Parser, json_path

ROOT = Path(__file__).parent.parent
LESSONS = {path.stem for path in ROOT.glob("*.py")}
IN_VLLM = {"pinning_scheduler", "redis_connector"}  # what vLLM imports, in whatever process it runs
BEHIND_THE_DOOR = sorted(
    {path.stem for path in (ROOT / "going_further").glob("*.py")} - {"__init__", "common"} - IN_VLLM
)


@pytest.mark.parametrize("name", BEHIND_THE_DOOR)
def test_a_tool_imports_no_lesson_but_through_common(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "going_further" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    assert "going_further.common" in imported
    assert not imported & LESSONS


@pytest.mark.parametrize("name", sorted(IN_VLLM))
def test_what_vllm_imports_stands_alone(name: str) -> None:
    source = (ROOT / "going_further" / f"{name}.py").read_text(encoding="utf-8")
    modules = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module in LESSONS or module.startswith("going_further")]


@pytest.mark.parametrize("words", [[""], ["--key="], ["--key", ""]])
def test_an_empty_value_is_refused_and_nothing_is_repeated(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("", prog="tool")
    parser.add_argument("--key")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["secret", *words])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "tool: error: there is an empty value among the arguments\n" in told
    assert "secret" not in told


def test_a_file_that_can_be_written_is_a_path_for_json_and_is_not_made(tmp_path: Path) -> None:
    assert json_path(str(tmp_path / "out.json")) == tmp_path / "out.json"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"), [(".", "it is no regular file"), ("no/such/folder/out.json", "No such file or directory")]
)
def test_a_file_that_cannot_be_written_is_refused_with_the_reason(name: str, says: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"cannot write {name}: {says}"):
        json_path(name)


@pytest.mark.parametrize("tool", ["pinned_system_prompt", "shared_store"])
def test_a_tool_does_not_ask_the_questions_of_a_lesson(tool: str) -> None:
    command = [sys.executable, "-m", f"going_further.{tool}", "--predict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.endswith("error: --predict asks about a lesson: take one of the four\n")


COMMANDS = sorted(path for folder in (".", "going_further", "exercises") for path in (ROOT / folder).glob("*.py")
                  if re.search(r"sys\.exit\((main|run_command)\(", path.read_text(encoding="utf-8")))  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_commands_help_fits_80_columns(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
