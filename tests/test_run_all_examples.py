"""The runner: which examples, what is refused, and the summary."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import run_all_examples
from run_all_examples import LESSONS, Arm, LessonRun, print_summary, read_arm, speed_up, summarise

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "results").glob("*.json"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "run_all_examples.py", *words], capture_output=True, text=True)


def test_list_names_every_lesson_and_each_is_a_script() -> None:
    done = run("--list")
    assert done.returncode == 0
    listed = [line.split()[:2] for line in done.stdout.splitlines()]
    assert listed == [[str(number), lesson.name] for number, lesson in LESSONS.items()]
    assert all((ROOT / f"{lesson.name}.py").is_file() for lesson in LESSONS.values())


@pytest.mark.parametrize("words", [["0"], ["5"], ["one"], ["-1"], ["1.5"], ["1", "9"], ["²"], [""]])
def test_what_is_no_example_is_refused_with_usage(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--requests", "1"],
        ["--prefix-tokens", "many"],
        ["--json", "/no/such/folder/x.json"],
        ["--json", "/dev/null"],
        ["--json", "."],
        ["--bogus"],
    ],
)
def test_bad_options_are_refused_before_any_lesson_starts(words: list[str]) -> None:
    done = run("1", *words)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"lessons": 5}',
        '{"lessons": [[]]}',
        '{"lessons": [{"lesson": "nobody"}]}',
        '{"lessons": [{"lesson": "session_consistency", "measurements": []}]}',
        "[" * 100_000,
        '{"lessons": ' + "9" * 5000 + "}",
    ],
)
def test_a_file_that_is_no_recorded_run_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    done = run("--show", str(tmp_path / "file.json"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "is no run recorded with --json" in done.stderr


def test_a_recorded_run_in_which_nothing_was_computed_is_one_line(tmp_path: Path) -> None:
    recorded = json.loads((ROOT / "results" / "cpu.json").read_text())
    for row in recorded["lessons"][0]["measurements"]:
        row["cached_tokens"] = row["prompt_tokens"]
    (tmp_path / "file.json").write_text(json.dumps(recorded))
    done = run("--show", str(tmp_path / "file.json"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_a_run_is_added_to_a_recorded_one_only_where_there_is_one_to_be_read(tmp_path: Path) -> None:
    assert "name it with --json PATH" in run("1", "--append").stderr
    path = tmp_path / "other.json"
    path.write_text("{}")
    done = run("1", "--append", "--json", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no run recorded with --json" in done.stderr
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    "words",
    [
        ["run_all_examples.py", "--model", ""],
        ["run_all_examples.py", "--show", ""],
        ["run_all_examples.py", "--json="],
        ["run_all_examples.py", "1", ""],
        ["stable_prefix_vs_timestamp.py", "--model", ""],
        ["manual_cache_boundary.py", "--prompt-file="],
        ["-m", "going_further.replay_request_log", ""],
        ["-m", "going_further.vllm_router_sessions", "--model", ""],
        ["-m", "going_further.is_it_sticky", ""],
        ["-m", "going_further.pinned_system_prompt", "--model="],
        ["built_in_model/build.py", "--shape", "7b", "--out", ""],
    ],
    ids=" ".join,
)
def test_an_empty_value_is_refused_everywhere_since_an_unset_variable_is_one(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["run_all_examples.py", "--model", "m\x1b[31m"],
        ["run_all_examples.py", "--show", "\x1b]0;title\x07"],
        ["setup_and_test.py", "--\x1b[2J"],
        ["session_consistency.py", "--seed", "1\r2"],
        ["append_only_vs_inplace_edit.py", "\x9b31m"],
        ["manual_cache_boundary.py", "--prompt-file", "a\nb"],
        ["-m", "going_further.replay_request_log", "log\x1b[31m.jsonl"],
        ["-m", "going_further.vllm_router_sessions", "--model", "\x1b[31m"],
        ["-m", "going_further.is_it_sticky", "http://a/\x1b[31m"],
        ["-m", "going_further.pinned_system_prompt", "\x07"],
        ["built_in_model/build.py", "--shape", "7b", "--out", "\x1b[31m"],
    ],
    ids=repr,
)
def test_a_control_character_is_refused_everywhere_and_does_not_reach_the_terminal(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(line.isprintable() for line in done.stderr.split("\n"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["4", "--workers", "1"], "session_consistency.py: error: argument --workers: '1' is not a whole number"),
        (["1", "--workers", "4"], "stable_prefix_vs_timestamp.py: error: unrecognized arguments: --workers 4"),
        (["--prompt-file", "x"], "stable_prefix_vs_timestamp.py: error: unrecognized arguments: --prompt-file x"),
        (["3", "--prompt-file"], "manual_cache_boundary.py: error: argument --prompt-file: expected one argument"),
    ],
)
def test_what_the_runner_does_not_know_the_lesson_takes_or_refuses_before_it_starts(
    words: list[str], says: str
) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_what_is_handed_on_keeps_its_order_and_its_values() -> None:
    args, numbers, handed_on = run_all_examples.parse(["4", "2", "4", "--workers", "4", "--deeper", "--price-input=2"])
    assert (numbers, handed_on) == ([4, 2], ["--workers", "4", "--deeper", "--price-input=2"])
    assert run_all_examples.parse(["--json", "x.json"])[1:] == ([1, 2, 3, 4], [])
    assert args.recorded == []


@pytest.mark.parametrize("script", ["run_all_examples.py", "setup_and_test.py"])
def test_neither_the_runner_nor_the_set_up_imports_a_lesson(script: str) -> None:
    names = {lesson.name for lesson in LESSONS.values()}
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.module in names)
        assert not (isinstance(node, ast.Import) and names & {alias.name for alias in node.names})


def test_a_speed_up_is_qualified_where_the_ranges_overlap() -> None:
    slow, fast, between = (Arm(100, 0, times) for times in ([100.0, 110.0], [10.0, 20.0], [15.0, 105.0]))
    assert speed_up(slow, fast, []) == "speed-up 7.0x"
    assert speed_up(slow, between, []) == "TTFT ranges overlap"
    assert speed_up(fast, slow, []) == "no speed-up"
    assert speed_up(slow, between, [3.0, 0.5, 2.0]) == "2 of 3 faster (2.0x)"


def test_turns_of_sessions_are_compared_with_themselves_in_the_other_arm() -> None:
    def row(arm: str, request: int, session: str | None, ttft: float) -> dict:
        common = dict(experiment="main", error=None)
        return dict(arm=arm, request=request, session=session, ttft_ms=ttft, **common)

    sessions = [
        row("bad", 1, "a", 100.0),
        row("good", 1, "a", 50.0),
        row("bad", 2, "a", 30.0),
        row("good", 2, "a", 60.0),
    ]
    assert run_all_examples.pair_ratios({"measurements": sessions}) == [2.0, 0.5]
    first = [row("bad", 0, "a", 100.0), row("good", 0, "a", 50.0)]
    alone = [row("bad", 1, None, 100.0), row("good", 1, None, 50.0)]
    assert run_all_examples.pair_ratios({"measurements": first + alone}) == []


def test_cost_is_computed_tokens_at_the_full_and_cached_ones_at_the_reduced_price() -> None:
    assert Arm(1_000_000, 0, []).dollars == pytest.approx(run_all_examples.PRICE_INPUT)
    assert Arm(1_000_000, 1_000_000, []).dollars == pytest.approx(run_all_examples.PRICE_CACHED)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_summary_of_a_recorded_run_fits_80_columns_and_leaves_out_request_0(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads(path.read_text())["lessons"]
    by_name = {lesson.name: number for number, lesson in LESSONS.items()}
    print_summary(summarise([LessonRun(by_name[result["lesson"]], 0, 30.0, result) for result in results]))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for result in results:
        rows = [m for m in result["measurements"] if m["experiment"] == "main" and m["arm"] == "good" and m["request"]]
        assert read_arm(result, "good").cached_tokens == sum(m["cached_tokens"] for m in rows)
        assert result["lesson"] in out


@pytest.mark.usefixtures("own_signals")
def test_a_summary_that_cannot_be_written_after_all_is_one_line_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gone" / "out.json"
    path.parent.mkdir()
    monkeypatch.setattr(run_all_examples, "has_usable_vllm", lambda: path.parent.rmdir() or True)  # after the options
    monkeypatch.setattr(run_all_examples, "LESSONS", {})
    monkeypatch.setattr("sys.argv", ["run_all_examples.py", "--json", str(path)])
    assert run_all_examples.main() == 1
    err = capsys.readouterr().err
    assert err == f"run_all_examples.py: error: cannot write {path}: No such file or directory\n"


def test_a_lesson_without_result_is_named_in_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summarise([LessonRun(1, 1, 3.0, None)]))
    assert "no result: exit status 1 after 3 s" in capsys.readouterr().out
