"""The built-in model: rebuilt byte for byte, small, and with a prefix-stable template."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "built_in_model"
CONVERSATION = [
    {"role": "system", "content": "You help with orders."},
    {"role": "user", "content": "Where is order 20417?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "get_order", "arguments": {"order_id": "20417"}}}],
    },
    {"role": "tool", "content": '{"status": "shipped"}'},
    {"role": "assistant", "content": "It has been shipped."},
    {"role": "user", "content": "Thank you."},
]
TOOLS = [{"type": "function", "function": {"name": "get_order", "parameters": {}}}]


def build(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "build.py", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "cpu")


@pytest.mark.parametrize("shape", ["cpu", "0.5b", "1.5b", "7b"])
def test_build_writes_the_folder_again_byte_for_byte(shape: str, tmp_path: Path) -> None:
    assert build("--shape", shape, "--out", str(tmp_path / shape)).returncode == 0
    rebuilt = {path.name: path.read_bytes() for path in (tmp_path / shape).iterdir()}
    assert rebuilt == {path.name: path.read_bytes() for path in (FOLDER / shape).iterdir()}


def test_build_writes_the_published_7b_shape(tmp_path: Path) -> None:
    assert build("--shape", "7b", "--out", str(tmp_path)).returncode == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (3584, 28, 152064)


def test_build_asks_for_both_options() -> None:
    done = build("--shape", "7b")
    assert done.returncode == 2
    assert "belong together" in done.stderr


def test_no_weights_and_less_than_a_megabyte() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".json", ".py", ".txt"}
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_a_token_is_three_to_four_characters_of_its_own_text(tokenizer) -> None:
    text = (FOLDER / "corpus.txt").read_text(encoding="utf-8")
    assert 3 <= len(text) / len(tokenizer.encode(text)) <= 4


def test_equally_long_numbers_cost_the_same(tokenizer) -> None:
    assert len({len(tokenizer.encode(f"at {hour:02}:{minute:02}")) for hour in range(24) for minute in range(60)}) == 1


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    text = "naïve café — 漢字 🙂\r\n\ttab  two spaces\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_every_turn_is_a_prefix_of_the_next(tokenizer, tools: list | None) -> None:
    turns = [
        tokenizer.apply_chat_template(CONVERSATION[:n], tools=tools, return_dict=False)
        for n in range(1, len(CONVERSATION) + 1)
    ]
    for shorter, longer in itertools.pairwise(turns):
        assert longer[: len(shorter)] == shorter
    assert "get_order" in tokenizer.decode(turns[2])
