"""Request logs as engineers have them (tests/field): what the replayer says of each, from the file to the advice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from going_further.common import UsageError
from going_further.replay import logged
from going_further.replay.advice import advise
from going_further.replay.analysis import Analysis, Options, analyse, notes_on
from going_further.replay.comparing import DROPPED
from going_further.replay.logged import explain
from going_further.replay.rendering import Renderer

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "built_in_model" / "cpu"
FIELD = Path(__file__).parent / "field"
BLOCK = 16
MODEL = {"28": "parts-like", "39": "qwen3-like", "40": "parts-like", "41": "qwen3-like", "42": "qwen3-like"}
REFUSED = "02-openai-batch-output.jsonl", "21-ollama-chat-images.jsonl"

FIRST, QUESTION, SAME = "first request", "another question", "same prompt"
ASKED = "message 1 (user)"
TWO = [(1284, 0, FIRST, "", 0), (1285, 1264, QUESTION, ASKED, 0)]
# Per file, of each request: prompt tokens, cached tokens, kind and place of the break, lost tokens.
ROWS = {
    "01-openai-batch-input.jsonl": TWO,
    "03-openai-responses.jsonl": [(1329, 0, FIRST, "", 0)],
    "04-anthropic-system-string.jsonl": [
        (1294, 0, FIRST, "", 0),
        (1322, 0, "system message changed", "message 0 (system)", 1280),
        (1350, 0, "system message changed", "message 0 (system)", 1312),
    ],
    "05-anthropic-system-blocks.jsonl": [(1284, 0, FIRST, "", 0), (1284, 1280, SAME, "", 0), (1284, 1280, SAME, "", 0)],
    "06-anthropic-tool-use.jsonl": [(1355, 0, FIRST, "", 0)],
    "07-litellm-standard-payload.jsonl": [(1284, 0, FIRST, "", 0)],
    "08-langfuse-generation-input-list.jsonl": [(1284, 0, FIRST, "", 0)],
    "11-vllm-debug-log.txt": [(1284, 0, FIRST, "", 0)],
    "11c-from-vllm-debug-log.jsonl": [(1284, 0, FIRST, "", 0)],
    "13-multimodal-one-of-three.jsonl": TWO,
    "15b-array-pretty.json": TWO,
    "16-log.jsonl.gz": TWO,
    "18-sharegpt.jsonl": [(19, 0, FIRST, "", 0)],
    "22-cache-salt.jsonl": [(1284, 0, FIRST, "", 0), (1284, 0, "another model or cache_salt", "", 0)],
    "24-billing-header-openai.jsonl": [(1284, 0, FIRST, "", 0), (1284, 1280, SAME, "", 0), (1284, 1280, SAME, "", 0)],
    "25-tool-arguments-cut.jsonl": [(1330, 0, FIRST, "", 0)],
    "25-tool-arguments-list.jsonl": [(1330, 0, FIRST, "", 0)],
    "26c-reasoning-only-assistant.jsonl": [(1306, 0, FIRST, "", 0)],
    "27b-tool-top-level-keys.jsonl": [(1584, 0, FIRST, "", 0), (1584, 1568, SAME, "", 0)],
    "28-tool-content-parts.jsonl": [(1316, 0, FIRST, "", 0)],
    "29-tool-results-cleared.jsonl": [
        (2206, 0, FIRST, "", 0), (1811, 1296, "tool message changed", "message 3 (tool)", 480)
    ],
    "33-error-line-in-the-middle.jsonl": TWO,
    "34-developer-and-function-roles.jsonl": [(1313, 0, FIRST, "", 0)],
    "39-agent-loop-reasoning.jsonl": [
        (89, 0, FIRST, "", 0), (71, 16, "assistant message changed", "message 2 (assistant) reasoning", 48)
    ],
    "40-developer-role.jsonl": [(29, 0, FIRST, "", 0), (37, 0, "message inserted", "message 1 (developer)", 16)],
    "41-thinking-off-three-turns.jsonl": [
        (1296, 0, FIRST, "", 0),
        (1324, 1280, DROPPED, "message 2 (assistant)", 0),
        (1350, 1312, DROPPED, "message 4 (assistant)", 0),
    ],
    "42-agent-loop-then-question.jsonl": [
        (1284, 0, FIRST, "", 0),
        (1435, 1280, "extended", "", 0),
        (1586, 1424, "extended", "", 0),
        (1397, 1280, DROPPED, "message 2 (assistant)", 80),
    ],
    "51-with-server-usage.jsonl": [*TWO, (1284, 1280, SAME, "", 0)],
    "56-longer-than-model.jsonl": [
        (1284, 0, FIRST, "", 0),
        (37824, 1248, "system message changed", "message 0 (system)", 16),
        (1285, 1264, QUESTION, ASKED, 0),
    ],
}  # fmt: skip
LINES = {  # other than 1, 2, ...
    "13-multimodal-one-of-three.jsonl": [1, 3],
    "15b-array-pretty.json": [2, 14],
    "33-error-line-in-the-middle.jsonl": [1, 3],
}
LEFT_OUT = {
    "03-openai-responses.jsonl": (2, "Encrypted content is not supported"),
    "13-multimodal-one-of-three.jsonl": (2, "an image: only text can be replayed"),
    "33-error-line-in-the-middle.jsonl": (2, "an error record: overloaded"),
}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Analysis]:
    """Analyse an input with the model that its line in the table names; each once."""
    folder, renderers, found = tmp_path_factory.mktemp("models"), {}, {}

    def renderer(name: str) -> Renderer:
        if name not in renderers:
            path = BUILT_IN
            if name:
                path = folder / name
                path.mkdir()
                for file in ("config.json", "tokenizer.json"):
                    shutil.copy(BUILT_IN / file, path)
                shutil.copy(FIELD / "models" / f"{name}.json", path / "tokenizer_config.json")
            renderers[name] = Renderer(str(path))
        return renderers[name]

    def analysis(name: str) -> Analysis:
        if name not in found:
            model = renderer(MODEL.get(name[:2], ""))
            found[name] = analyse(FIELD / name, model, BLOCK, Options(), Console(width=80, highlight=False))
        return found[name]

    return analysis


def text(found: Analysis, number: int = 0) -> str:
    """Return a prompt as the model gets it."""
    return found.comparer.recall(number).text


def test_every_input_is_here() -> None:
    names = {path.name for path in FIELD.glob("*.*")}
    assert names == {*ROWS, *REFUSED, "57-good-layout-200-users.jsonl"}
    assert len(names) == 32


@pytest.mark.parametrize("name", ROWS)
def test_what_is_said_of_each_request(analysed, name: str) -> None:
    found = analysed(name)
    said = [
        (row.prompt_tokens, row.predicted_cached_tokens, row.kind, row.where, row.lost_tokens) for row in found.rows
    ]
    assert said == ROWS[name]
    assert [row.line for row in found.rows] == LINES.get(name, list(range(1, len(found.rows) + 1)))
    if name not in LEFT_OUT:
        assert found.left_out == []
        return
    line, reason = LEFT_OUT[name]
    (left,) = found.left_out
    assert left.line == line
    assert reason in left.reason
    assert any(reason in note and f"(line {line})" in note for note in notes_on(found))


@pytest.mark.parametrize(
    ("name", "says"), [*zip(REFUSED, ["openai-batch-output", "an image (Ollama's `images`)"], strict=True)]
)
def test_what_holds_nothing_to_replay_is_refused_in_one_line(analysed, name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        analysed(name)
    assert says in str(caught.value)
    assert "line 1" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_no_input_has_a_field_that_is_ignored_and_was_not_named(analysed) -> None:
    assert {name: dict(analysed(name).ignored) for name in ROWS if analysed(name).ignored} == {}


# --- what a request means is vLLM's word ---


def test_01_07_08_11_the_same_request_in_several_shapes_is_the_same_prompt(analysed) -> None:
    same = ["01-openai-batch-input.jsonl", "07-litellm-standard-payload.jsonl", "11-vllm-debug-log.txt",
            "08-langfuse-generation-input-list.jsonl", "11c-from-vllm-debug-log.jsonl", "15b-array-pretty.json",
            "16-log.jsonl.gz", "13-multimodal-one-of-three.jsonl", "24-billing-header-openai.jsonl",
            "05-anthropic-system-blocks.jsonl", "22-cache-salt.jsonl"]  # fmt: skip
    assert len({text(analysed(name)) for name in same}) == 1


def test_04_the_system_prompt_is_rendered_and_moving_the_clock_raises_the_hit_rate(analysed) -> None:
    found = analysed("04-anthropic-system-string.jsonl")
    assert text(found).startswith("<|im_start|>system\nIt is 09:30. Rule 0:")
    (advice,) = advise(found.comparer, found.rows)
    assert (advice.where, advice.requests, advice.lost_tokens) == ("message 0 (system)", 2, 1280 + 1312)
    assert advice.texts == ["It is 09:30.", "It is 09:31.", "It is 09:32."]
    assert advice.hit_rate == 0
    assert 0.6 < advice.moved_hit_rate < 2 / 3
    assert [row.session for row in found.rows] == ["line 1"] * 3


def test_05_24_the_header_line_that_vllm_strips_is_in_no_prompt(analysed) -> None:
    for name in ("05-anthropic-system-blocks.jsonl", "24-billing-header-openai.jsonl"):
        found = analysed(name)
        assert not any("billing-header" in text(found, number) for number in range(3))


def test_06_tool_use_is_a_tool_call_and_its_result_a_tool_message(analysed) -> None:
    found = text(analysed("06-anthropic-tool-use.jsonl"))
    assert 'Looking.\n<tool_call>price {"id": "7"}</tool_call>' in found
    assert "<|im_start|>tool\n40 euros<|im_end|>" in found


def test_22_salts_split_the_cache_and_are_noted(analysed) -> None:
    assert any("2 values of cache_salt" in note for note in notes_on(analysed("22-cache-salt.jsonl")))


def test_25_arguments_that_are_no_object_are_an_empty_one(analysed) -> None:
    for name in ("25-tool-arguments-cut.jsonl", "25-tool-arguments-list.jsonl"):
        assert "<tool_call>price {}</tool_call>" in text(analysed(name))


def test_26c_34_older_and_emptier_messages_are_rendered(analysed) -> None:
    assert "<|im_start|>assistant\n<|im_end|>" in text(analysed("26c-reasoning-only-assistant.jsonl"))
    found = text(analysed("34-developer-and-function-roles.jsonl"))
    assert found.startswith("<|im_start|>system\nRule 0:")
    assert "<|im_start|>function\n40<|im_end|>" in found


def test_28_the_parts_of_a_tool_s_result_are_a_text(analysed) -> None:
    found = text(analysed("28-tool-content-parts.jsonl"))
    assert "<|im_start|>tool\n40\neuros<|im_end|>" in found
    assert "'type'" not in found


def test_29_a_cleared_result_is_told_with_what_stood_there(analysed) -> None:
    row = analysed("29-tool-results-cleared.jsonl").rows[1]
    assert "line of a file" in row.before
    assert "[old result cleared" in row.after


def test_39_reasoning_is_what_vllm_gives_the_template(analysed) -> None:
    found = analysed("39-agent-loop-reasoning.jsonl")
    assert "<think>\nI ask the price tool.\n</think>" in text(found, 0)
    assert "<think>" not in text(found, 1)


def test_40_a_developer_s_message_is_the_system_s(analysed) -> None:
    found = analysed("40-developer-role.jsonl")
    assert text(found, 0).startswith("<|im_start|>system\nYou tend a lamp shop.<|im_end|>")
    assert "developer" not in text(found, 0) + text(found, 1)


def test_42_reasoning_that_was_generated_is_found_until_a_question_follows(analysed) -> None:
    rows = analysed("42-agent-loop-then-question.jsonl").rows
    assert [row.answer_tokens for row in rows] == [0, 128, 144, 0]


# --- the server's own numbers; bounds; a good layout ---


def test_51_what_the_server_found_stands_beside_the_prediction(analysed) -> None:
    found = analysed("51-with-server-usage.jsonl")
    said = explain(found.rows, found.arrivals, BLOCK)
    assert (said.requests, said.unreported, said.sent_tokens, said.found_tokens) == (3, 0, 3 * 1284, 0)
    assert said.predicted_tokens == 1264 + 1280
    reasons = {logged.NEVER: (1264 + 1280, 2), logged.NEW: (3 * 1284 - 1264 - 1280, 3)}
    for reason in logged.REASONS:
        assert (said.computed[reason], said.affected[reason]) == reasons.get(reason, (0, 0))
    assert explain(analysed("07-litellm-standard-payload.jsonl").rows, [], BLOCK) is None, "it says nothing of a cache"


def test_56_what_is_longer_than_the_model_takes_is_analysed_and_named(analysed) -> None:
    found = analysed("56-longer-than-model.jsonl")
    assert [row.predecessor for row in found.rows] == [None, 1, 1]
    assert any("longer than the model takes (32,768 tokens): 1 request" in note for note in notes_on(found))


def test_57_two_hundred_users_under_one_system_prompt_lose_nothing(analysed) -> None:
    found = analysed("57-good-layout-200-users.jsonl")
    assert len(found.rows) == 200
    assert [row.predicted_cached_tokens for row in found.rows] == [0] + [1264] * 199
    assert {(row.kind, row.where) for row in found.rows[1:]} == {(QUESTION, ASKED)}
    assert sum(row.lost_tokens for row in found.rows) == 0
    assert advise(found.comparer, found.rows) == []
    assert len({row.session for row in found.rows}) == 200
    assert {row.family for row in found.rows} == {1}


def test_the_command_says_the_same_and_writes_it_down(tmp_path: Path) -> None:
    out, name = tmp_path / "out.json", "04-anthropic-system-string.jsonl"
    command = [sys.executable, "-m", "going_further.replay_request_log", FIELD / name, "--without-engine"]
    done = subprocess.run([*command, "--json", out], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    keys = "prompt_tokens", "predicted_cached_tokens", "kind", "where", "lost_tokens"
    assert [tuple(row[key] for key in keys) for row in json.loads(out.read_text())["requests"]] == ROWS[name]
    assert "message 0 (system): 2 requests, 2,592 tokens lost" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_command_refuses_a_batch_s_output_in_one_line() -> None:
    command = [sys.executable, "-m", "going_further.replay_request_log", FIELD / REFUSED[0], "--without-engine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "openai-batch-output" in done.stderr
