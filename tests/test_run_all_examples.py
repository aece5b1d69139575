"""The runner: which examples, what is refused, and the summary."""

from __future__ import annotations

import ast
import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run_all_examples
from run_all_examples import LESSONS, Arm, LessonRun, milliseconds, print_summary, read_arm, speed_up, summarise

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


def written(tmp_path: Path, name: str, change: Callable[[list[dict]], None] = lambda lessons: None) -> str:
    """Return the name of a copy of a recorded run whose lessons were changed."""
    recorded = json.loads((ROOT / "results" / "cpu.json").read_text(encoding="utf-8"))
    change(recorded["lessons"])
    (tmp_path / name).write_text(json.dumps(recorded), encoding="utf-8")
    return str(tmp_path / name)


def rows_of(result: dict, arm: str) -> list[dict]:
    return [m for m in result["measurements"] if m["experiment"] == "main" and m["arm"] == arm and m["request"] > 0]


def test_two_recorded_runs_stand_side_by_side_within_80_columns() -> None:
    files = [str(ROOT / "results" / name) for name in ("cpu.json", "h100.json")]
    done = run("--compare", *files)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout == run("--show", files[0], "--show", files[1]).stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("  bad ", "  good "))]
    pairs = zip(*(json.loads(Path(file).read_text(encoding="utf-8"))["lessons"] for file in files), strict=True)
    for number, results in enumerate(pairs):
        for arm, row in zip(("bad", "good"), rows[2 * number : 2 * number + 2], strict=True):
            a, b = (read_arm(result, arm) for result in results)
            assert row[:3] == [arm, f"{a.hit_rate:.1%}", f"{b.hit_rate:.1%}"]
            assert " ".join(row[3:7]) == f"{milliseconds(a.median_ms)} {milliseconds(b.median_ms)}"
            assert row[7] == f"{b.median_ms / a.median_ms:.2f}x"
            assert row[8:10] == [f"{a.computed_tokens:,}", f"{b.computed_tokens:,}"]
            assert row[10] == f"{b.computed_tokens / a.computed_tokens:.2f}x"
    assert "  vllm: 0.32.0 | 0.26.0\n" in done.stdout
    assert "  device: CPU (2 cores) | NVIDIA H100 80GB HBM3\n" in done.stdout
    assert "  kv_cache_tokens (lesson 2): 92160 | 153600\n" in done.stdout
    assert "  lesson 2, bad: 43,128 and 79,353 tokens computed\n" in done.stdout
    assert "started_at" not in done.stdout


def test_what_is_the_same_in_two_runs_is_said_and_times_are_no_difference(tmp_path: Path) -> None:
    def slower(lessons: list[dict]) -> None:
        for row in rows_of(lessons[0], "bad"):
            row["ttft_ms"] *= 2

    done = run("--compare", written(tmp_path, "a.json"), written(tmp_path, "b.json", slower))
    assert "The environments are the same." in done.stdout
    assert "All counts of tokens and claims are the same." in done.stdout
    assert re.search(r"  bad .* s +2\.00x +20,444 +20,444 +1\.00x", done.stdout)


def test_a_count_that_differs_is_named_with_lesson_and_arm(tmp_path: Path) -> None:
    def change(lessons: list[dict]) -> None:
        rows_of(lessons[1], "bad")[0]["prompt_tokens"] -= 128
        rows_of(lessons[0], "good")[0]["cached_tokens"] -= 128
        first, second = rows_of(lessons[2], "bad")[:2]
        first["prompt_tokens"] += 1
        second["prompt_tokens"] -= 1
        lessons[3]["claims"][0]["holds"] = False

    done = run("--compare", written(tmp_path, "a.json"), written(tmp_path, "b.json", change))
    assert done.stdout.partition("Counts differ:\n")[2].splitlines() == [
        "  lesson 1, good: 604 and 732 tokens computed, 19,840 and 19,712 cached",
        "  lesson 2, bad: 43,128 and 43,000 tokens computed",
        "  lesson 3, bad: the same sums, but 2 of 6 requests are not the same",
        "  lesson 4: 5 of 5 and 4 of 5 claims hold",
    ]


def test_a_lesson_that_only_one_run_holds_is_said(tmp_path: Path) -> None:
    first = written(tmp_path, "a.json", lambda lessons: lessons.pop(0) and None)
    second = written(tmp_path, "b.json", lambda lessons: lessons.pop() and None)
    done = run("--compare", first, second)
    assert "1 stable_prefix_vs_timestamp is only in B\n4 session_consistency is only in A\n" in done.stdout
    assert done.stdout.count("  good ") == 2


def test_a_lesson_that_one_run_holds_twice_is_told_apart_by_its_length(tmp_path: Path) -> None:
    def twice(lessons: list[dict]) -> None:
        longer = json.loads(json.dumps(lessons[0]))
        longer["environment"]["prefix_tokens"] = 30_000
        lessons.insert(1, longer)

    done = run("--compare", written(tmp_path, "a.json", twice), written(tmp_path, "b.json"))
    assert "1 stable_prefix_vs_timestamp with 30,000 static tokens is only in A\n" in done.stdout


def test_names_of_another_run_reach_the_terminal_as_they_are_but_for_control_characters(tmp_path: Path) -> None:
    def change(lessons: list[dict]) -> None:
        lessons[1]["environment"]["model"] = "[red]m\x1b[31m\u202e:smile:[/]"

    done = run("--compare", written(tmp_path, "a.json"), written(tmp_path, "b.json", change))
    assert r"  model (lesson 2): built_in_model/cpu | [red]m\x1b[31m\u202e:smile:[/]" in done.stdout
    assert all(line.isprintable() for line in done.stdout.splitlines())


REPLAYED = {
    "schema": 1,
    "lesson": "replay_request_log",
    "requests": [
        {"prompt_tokens": 1000, "predicted_cached_tokens": 0},
        {"prompt_tokens": 1600, "predicted_cached_tokens": 992},
    ],
}


def test_of_a_replayed_log_the_hit_rate_is_shown_and_how_to_see_the_rest(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(REPLAYED), encoding="utf-8")
    done = run("--show", str(tmp_path / "log.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [
        "2 requests, 2,600 tokens, 992 cached (38.2%), 1,608 computed",
        "What broke the prefixes, where, and at what cost: add --report PATH",
    ]


@pytest.mark.parametrize(
    "requests",
    [
        *(None, 5, [], {}, "rows", [5], [{}]),
        [{"prompt_tokens": 0, "predicted_cached_tokens": 0}],
        *([{"prompt_tokens": n, "predicted_cached_tokens": 0}] for n in (-1, 1.5, True, "1\x1b[31m", float("nan"))),
    ],
    ids=repr,
)
@pytest.mark.parametrize("words", [[], ["--report", "page.html"]], ids=["line", "page"])
def test_a_replayed_log_that_is_none_is_one_line(requests: object, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(REPLAYED | {"requests": requests}), encoding="utf-8")
    command = [sys.executable, ROOT / "run_all_examples.py", "--show", "log.json", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith("run_all_examples.py: error: log.json is no run recorded with --json: ")
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["log.json"]


def test_a_replayed_log_is_neither_compared_nor_added_to(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(REPLAYED), encoding="utf-8")
    for words in (["--compare", str(path), str(path)], ["1", "--append", "--json", str(path)]):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is no run recorded with --json" in done.stderr.splitlines()[-1]
    assert json.loads(path.read_text(encoding="utf-8")) == REPLAYED


def test_of_two_files_that_one_is_named_which_is_no_recorded_run(tmp_path: Path) -> None:
    def change(lessons: list[dict]) -> None:
        rows_of(lessons[0], "bad")[0]["session"] = []

    done = run("--compare", written(tmp_path, "a.json"), written(tmp_path, "b.json", change))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert f"{tmp_path / 'b.json'} is no run recorded with --json" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--show", "a", "--show", "b", "--show", "c"], "two recorded runs can be compared, not more"),
        (["--compare", "a", "b", "--show", "c"], "two recorded runs can be compared, not more"),
        (["--compare", "a"], "expected 2 arguments"),
        (["--compare", "a", "b", "--report", "new.html"], "--report is about one run"),
        (["--report", "no/such/folder/page.html"], "cannot write no/such/folder/page.html"),
        (["--show", "run.json", "--report", "run.json"], "--report would overwrite run.json"),
        (["--show", "run.json", "--report", "link"], "--report would overwrite run.json"),
        (["--show", "link", "--report", "run.json"], "--report would overwrite link"),
        (["--show", "run.json", "--report", "hard"], "--report would overwrite run.json"),
        (["--json", "run.json", "--append", "--report", "link"], "--report would overwrite run.json"),
        (["--json", "new", "--report", "./new"], "--report would overwrite new"),
        (["3", "--prompt-file", "run.json", "--report", "link"], "--report would overwrite run.json"),
        (["3", "--prompt-file=run.json", "--report", "link"], "--report would overwrite run.json"),
    ],
    ids=" ".join,
)
def test_a_report_overwrites_no_input_and_is_about_one_run(words: list[str], says: str, tmp_path: Path) -> None:
    path = Path(written(tmp_path, "run.json"))
    before = path.read_bytes()
    (tmp_path / "link").symlink_to("run.json")
    (tmp_path / "hard").hardlink_to(path)
    command = [sys.executable, ROOT / "run_all_examples.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(says) or says in done.stderr.splitlines()[-1]
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
@pytest.mark.parametrize("words", [[], ["--show", str(ROOT / "results" / "cpu.json")]], ids=["run", "show"])
def test_a_report_without_what_draws_it_is_one_line_before_any_lesson_runs(
    words: list[str], module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(run_all_examples, "has_usable_vllm", lambda: True)
    monkeypatch.setattr(run_all_examples, "LESSONS", {})
    monkeypatch.setattr("sys.argv", ["run_all_examples.py", *words, "--report", str(tmp_path / "page.html")])
    assert run_all_examples.main() == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "pip install -r requirements-report.txt" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("own_signals")
def test_the_report_of_a_run_is_the_one_that_is_made_of_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install -r requirements-report.txt")
    recorded = {run.number: run for run in run_all_examples.read_run(ROOT / "results" / "cpu.json")}
    monkeypatch.setattr(run_all_examples, "has_usable_vllm", lambda: True)
    monkeypatch.setattr(run_all_examples, "run_lesson", lambda number, *_: recorded[number])
    page, again, path = (str(tmp_path / name) for name in ("page.html", "again.html", "run.json"))
    monkeypatch.setattr("sys.argv", ["run_all_examples.py", "4", "1", "--json", path, "--report", page])
    assert run_all_examples.main() == 0
    assert run("--show", path, "--report", again).returncode == 0
    assert Path(page).read_bytes() == Path(again).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_report_that_cannot_be_written_after_all_is_one_line_and_status_1_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install -r requirements-report.txt")
    path = tmp_path / "page.html"
    path.write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    assert run_all_examples.show(str(ROOT / "results" / "cpu.json"), path) == 1
    assert capsys.readouterr().err == f"run_all_examples.py: error: cannot write {path}: No space left\n"
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "before")]


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
