"""The exercises without an engine: what a student is told, which answers pass and which do not, by the cache model."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.wrong_answers import (
    FITS_THE_SAMPLE,
    REMEMBERS,
    RIGHT_1,
    RIGHT_2,
    RIGHT_3,
    WRONG_1,
    WRONG_2,
    WRONG_3,
    WRONG_4,
    WRONG_5,
)
from rich.console import Console

from exercises import check, diagnosis, facts, layouts, routing
from exercises.student import Student, load
from going_further.common import LessonError, UsageError, conversation, report
from going_further.replay.rendering import Renderer

ROOT = Path(__file__).parent.parent
EXERCISES = ROOT / "exercises"
ANSWERS = {1: layouts.answer_1, 2: layouts.answer_2, 3: layouts.answer_3}
BLOCKS = [16, 32, 64, 128]


@pytest.fixture(scope="module", params=["built-in", "llama"])
def renderer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = ROOT / "built_in_model" / "cpu"
    if request.param == "llama":
        folder = write_llama(tmp_path_factory.mktemp("model") / "llama")
    return Renderer(str(folder))


def start_file(number: int) -> Path:
    return EXERCISES / f"exercise_{number}.py"


def solution(number: int) -> Path:
    return EXERCISES / "solutions" / f"exercise_{number}.py"


def written(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "answer.py"
    path.write_text(source, encoding="utf-8")
    return path


def failed_claims(number: int, path: Path, renderer, block_size: int) -> set[str]:
    """Return what fails of an answer to one of the exercises 1 to 3, where vLLM finds what the cache model says."""
    answer = ANSWERS[number](load(path, "messages"))
    reader = layouts.Reader(renderer, block_size)
    rows = answer.rows(reader)
    result = layouts.score(rows, layouts.predicted(rows, block_size), answer.free)
    claims = [("hit rate", result.found >= result.needed, ""), ("facts", not answer.missing, "")]
    assert (result.found < result.needed) <= bool(result.losses), "what is lost has a place"
    return {claim for claim, holds, _ in [*claims, *answer.claims(reader)] if not holds}


# --- which answers pass ---


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("number", ANSWERS)
def test_a_start_file_carries_all_facts_and_misses_the_cache(number: int, block_size: int, renderer) -> None:
    failed = failed_claims(number, start_file(number), renderer, block_size)
    assert "hit rate" in failed
    assert "facts" not in failed


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("number", ANSWERS)
def test_a_solution_passes_whatever_the_blocks_and_the_tokens(number: int, block_size: int, renderer) -> None:
    assert failed_claims(number, solution(number), renderer, block_size) == set()


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("name", RIGHT_2)
def test_other_right_answers_pass_too(name: str, block_size: int, renderer, tmp_path: Path) -> None:
    assert failed_claims(2, written(tmp_path, RIGHT_2[name]), renderer, block_size) == set()


@pytest.mark.parametrize(("number", "name"), [*((1, name) for name in RIGHT_1), *((3, name) for name in RIGHT_3)])
def test_what_stands_around_a_text_does_not_matter(number: int, name: str, renderer, tmp_path: Path) -> None:
    source = {1: RIGHT_1, 3: RIGHT_3}[number][name]
    assert failed_claims(number, written(tmp_path, source), renderer, 64) == set()


@pytest.mark.parametrize("name", REMEMBERS)
def test_an_answer_that_depends_on_more_than_its_arguments_is_told(name: str, tmp_path: Path) -> None:
    student = load(written(tmp_path, REMEMBERS[name]), "messages")
    with pytest.raises(LessonError, match=r"line \d: asked again, messages returns something else"):
        layouts.answer_1(student)


@pytest.mark.parametrize("name", FITS_THE_SAMPLE)
def test_what_belongs_to_another_request_is_told(name: str, tmp_path: Path) -> None:
    answer = layouts.answer_3(load(written(tmp_path, FITS_THE_SAMPLE[name]), "messages"))
    assert any("of another request is there" in fault for fault in answer.missing)


def test_a_loop_without_an_end_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exercises.student.SECONDS", 1)
    source = "def messages(rules, policies, tools, request):\n    while True:\n        pass\n"
    with pytest.raises(LessonError, match=r"answer.py, line [23]: TimeoutError: no end after 1 s \(request 0\)"):
        layouts.answer_1(load(written(tmp_path, source), "messages"))


def test_a_router_may_print(tmp_path: Path) -> None:
    head, _, rest = solution(4).read_text(encoding="utf-8").partition("    with_room = ")
    source = f"{head}    print('.', end='')\n    with_room = {rest}"
    path = written(tmp_path, source)
    assert "print" in source
    assert routing.homes_elsewhere(path, 1) == routing.homes(
        load(path, "route"), routing.SESSIONS[:200], routing.WORKERS
    )


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize(
    ("number", "name"),
    [(number, name) for number, wrong in ((1, WRONG_1), (2, WRONG_2), (3, WRONG_3)) for name in wrong],
)
def test_a_wrong_answer_fails_for_its_own_reason(
    number: int, name: str, block_size: int, renderer, tmp_path: Path
) -> None:
    source = {1: WRONG_1, 2: WRONG_2, 3: WRONG_3}[number][name]
    failed = failed_claims(number, written(tmp_path, source), renderer, block_size)
    if "dropped" in name or "rounded" in name:
        assert "facts" in failed
    elif name == "the first boundary stands behind the tenant's text":
        assert failed == {"all prompts agree up to boundary 1"}, "vLLM finds what two prompts share all the same"
    else:
        assert "hit rate" in failed
        assert "facts" not in failed


def test_what_is_lost_is_told_with_message_character_and_token(renderer, tmp_path: Path) -> None:
    path = written(tmp_path, WRONG_1["the clock is one line further down"])
    answer, reader = layouts.answer_1(load(path, "messages")), layouts.Reader(renderer, 32)
    rows = answer.rows(reader)
    [(where, (requests, tokens, place))] = layouts.score(rows, layouts.predicted(rows, 32), 0).losses.items()
    assert (where, requests) == ("message 0 (system)", 5)
    assert tokens == sum(row.needed for row in rows[1:]) - sum(layouts.predicted(rows, 32)[1:])
    before, after = (answer.chats[n][0]["content"] for n in (1, 2))
    assert before[: place.character] == after[: place.character], "up to there two neighbours are the same"
    assert place.token == next(n for n, (a, b) in enumerate(zip(rows[1].ids, rows[2].ids, strict=False)) if a != b)


def test_the_bound_is_whole_blocks_of_the_static_text_less_one_a_request(renderer) -> None:
    answer, reader = layouts.answer_1(load(solution(1), "messages")), layouts.Reader(renderer, 64)
    static = len(reader.tokens(answer.static))
    assert {row.needed for row in answer.rows(reader)[1:]} == {static // 64 * 64 - 64}


# --- facts ---


def test_of_several_lines_with_one_key_the_last_one_counts() -> None:
    messages = [{"role": "system", "content": "seat = 11A\nmeal = fish"}, {"role": "user", "content": "seat = 12C\nHi"}]
    assert facts.read_memory(messages) == {"seat": "12C", "meal": "fish"}


def test_a_stale_value_that_comes_last_is_told() -> None:
    turns = facts.turns()
    student = load(solution(2), "messages")
    messages = student.messages("", "Be brief.", turns)
    assert facts.lost_memory(messages, "Be brief.", turns) == []
    key, value = next(iter(turns[-1]["learned"].items()))
    messages[-1]["content"] += f"\n{key} = 7"
    assert facts.lost_memory(messages, "Be brief.", turns) == [f"{key} reads '7', it is {value!r}"]


def test_a_static_line_that_is_left_out_or_sent_twice_is_told() -> None:
    messages = [{"role": "user", "content": "one\ntwo\ntwo"}]
    assert facts.lost(messages, {"rules": "one\ntwo\nthree"}, {}) == [
        "rules: the line 'two' is there 2 times",
        "rules: the line 'three' is there 0 times",
    ]


def test_a_value_is_read_word_for_word_wherever_it_stands() -> None:
    messages = [{"role": "user", "content": "It is 09:30:47."}]
    assert facts.lost(messages, {}, {"date": "09:30:47"}) == []
    assert facts.lost(messages, {}, {"date": "09:31:34"}) == ["the date '09:31:34' is missing"]


@pytest.mark.parametrize("text", ["[/bold]", r"\[/x] [red]", "a [1] b"])
def test_what_the_student_wrote_is_no_markup(text: str) -> None:
    markup = pytest.importorskip("rich.markup")
    assert markup.render(layouts.quoted(text)).plain == text
    assert "\x1b" not in layouts.quoted("\x1b[2J")


# --- exercise 4 ---


def routed_tokens(student: Student, renderer, block_size: int) -> tuple[int, int]:
    """Return what a router's requests find, and what is needed."""
    prompts = {}
    for session, turn in routing.arrivals():
        context = report(session, routing.CONTEXT_TOKENS, facts.about_tokens)
        text = renderer.tokenizer.apply_chat_template(
            conversation(context, turn), add_generation_prompt=True, tokenize=False
        )
        prompts[session, turn] = renderer.tokens(text)
    found = sum(routing.found_tokens(routing.routed(student), prompts, block_size))
    return found, routing.needed_tokens(routing.homes_of_senders(student), prompts, block_size)


def test_the_solution_keeps_all_rules() -> None:
    assert [claim for claim, holds, _ in routing.rules(load(solution(4), "route")) if not holds] == []


@pytest.mark.parametrize("block_size", BLOCKS)
def test_the_solution_finds_what_the_bound_allows(block_size: int, renderer) -> None:
    found, needed = routed_tokens(load(solution(4), "route"), renderer, block_size)
    assert found == needed + block_size * (routing.SENDERS + 1)


def test_another_hash_passes_too(renderer, tmp_path: Path) -> None:
    source = solution(4).read_text(encoding="utf-8").replace("sha256", "md5")
    student = load(written(tmp_path, source), "route")
    assert all(holds for _, holds, _ in routing.rules(student))
    found, needed = routed_tokens(student, renderer, 128)
    assert found >= needed


@pytest.mark.parametrize("name", WRONG_4)
def test_a_wrong_router_breaks_the_rule_that_it_is_wrong_about(name: str, tmp_path: Path) -> None:
    source, claim = WRONG_4[name]
    failed = [told for told, holds, _ in routing.rules(load(written(tmp_path, source), "route")) if not holds]
    assert any(claim in told for told in failed), failed


@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_router_that_looks_at_the_load_first_finds_too_little(block_size: int, renderer, tmp_path: Path) -> None:
    student = load(written(tmp_path, WRONG_4["sorted by load, then by hash"][0]), "route")
    found, needed = routed_tokens(student, renderer, block_size)
    assert found < needed


def test_what_is_lost_by_moving_is_the_past_in_whole_blocks() -> None:
    sent = [routing.Sent("a", 0, 0), routing.Sent("a", 1, 1), routing.Sent("b", 0, 1), routing.Sent("a", 2, 1)]
    assert routing.lost_by_moving(sent, [0, 16, 0, 96], [70, 90, 50, 110], 16) == [(sent[1], 64 - 16)]


@pytest.mark.parametrize("returns", ["3", "None", "'worker-99'", "workers"])
def test_a_route_to_no_worker_is_told_with_its_line(returns: str, tmp_path: Path) -> None:
    student = load(written(tmp_path, f"\n\ndef route(session, workers):\n    return {returns}\n"), "route")
    with pytest.raises(LessonError, match=r"^answer.py, line 3: route returns a value of type \w+ that names none"):
        routing.rules(student)


# --- exercise 5 ---


@pytest.fixture(scope="module")
def built_in() -> Renderer:
    return Renderer(str(ROOT / "built_in_model" / "cpu"))


def rows_of_the_log(renderer: Renderer, block_size: int) -> list:
    return diagnosis.analyse(diagnosis.LOG, renderer, block_size, diagnosis.Options(), Console(quiet=True)).rows


@pytest.mark.parametrize("block_size", BLOCKS)
def test_the_log_has_three_breaks_and_the_solution_names_them(block_size: int, built_in: Renderer) -> None:
    rows = rows_of_the_log(built_in, block_size)
    found = [(row.line, row.kind, row.where) for row in rows if row.lost_tokens]
    assert len(found) == diagnosis.BREAKS
    assert diagnosis.named(load(solution(5), "breaks")) == found


def test_a_verdict_says_what_is_wrong_with_an_entry_and_not_what_is_right(built_in: Renderer) -> None:
    rows = rows_of_the_log(built_in, 128)
    right = diagnosis.named(load(solution(5), "breaks"))[0]
    line, kind, place = right
    assert diagnosis.verdict(right, rows) == "line 3: yes, 2,176 tokens are lost there"
    wrong = [(99, kind, place), (4, kind, place), (line, "tools changed", place), (line, kind, "message 0 (system)")]
    for entry in wrong:
        told = diagnosis.verdict(entry, rows)
        assert "yes" not in told
        assert ".budget.used" not in told
        assert kind not in told


@pytest.mark.parametrize("returns", ["None", "[3]", "[(3, 'kind')]", "[('3', 'kind', 'place')]", "[(True, 'a', 'b')]"])
def test_what_names_no_breaks_is_told_with_its_line(returns: str, tmp_path: Path) -> None:
    student = load(written(tmp_path, f"def breaks():\n    return {returns}\n"), "breaks")
    with pytest.raises(LessonError, match=r"^answer.py, line 1: breaks returns "):
        diagnosis.named(student)


@pytest.mark.parametrize("name", WRONG_5)
def test_a_wrong_diagnosis_does_not_name_the_three_and_nothing_else(name: str, tmp_path: Path) -> None:
    entries = diagnosis.named(load(written(tmp_path, WRONG_5[name][0]), "breaks"))
    assert set(entries) != set(diagnosis.named(load(solution(5), "breaks")))


# --- faults of the student's file ---


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\ndef messages(:\n", r"line 2: SyntaxError: "),
        ("def messages():\nreturn 1\n", r"line 2: IndentationError: "),
        ("x = 1\n\ny = x / 0\n", r"line 3: ZeroDivisionError: division by zero"),
        ("import nothing_like_this\n", r"line 1: ModuleNotFoundError: "),
        ("exit()\n", r"line 1: SystemExit"),
        ("def message():\n    pass\n", r"has no function messages: keep its name"),
        ("messages = 3\n", r"has no function messages: keep its name"),
        ("a\0b\n", r"line 1: \w+Error: "),
        ("x = 'ä'\n".encode("latin-1").decode("latin-1"), r"has no function messages"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_run_is_one_line_with_its_place(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(LessonError, match=f"^answer.py,? {says}") as caught:
        load(written(tmp_path, source), "messages")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_utf_8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "answer.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(LessonError, match=r"^answer.py, line 1: SyntaxError: "):
        load(tmp_path / "answer.py", "messages")


@pytest.mark.parametrize("name", ["none.py", "."])
def test_a_file_that_is_none_is_wrong_usage(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / name, "messages")


BODY = "def helper(x):\n    return x['key']\n\ndef messages(request):\n    {}\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return helper({})", "line 2: KeyError: 'key' (request 7)"),
        ("return int(request)", "line 5: ValueError: invalid literal for int() with base 10: 'hello' (request 7)"),
        ("raise SystemExit(0)", "line 5: SystemExit: 0 (request 7)"),
        ("return messages(request)", "line 5: RecursionError: "),
        ("pass", "line 4: messages returns a value of type NoneType, not a list of messages (request 7)"),
        ("return [1]", "line 4: messages returns no message at 0: a message is a dict with role and content"),
        ("return [{'role': 'user'}]", "line 4: messages returns no message at 0"),
        ("return [{'role': ['user'], 'content': ''}]", "line 4: messages returns a role that is none in message 0"),
        ("return [{'role': 'user', 'content': None}]", "line 4: messages returns a content of type NoneType in"),
        ("return [{'role': 'user', 'content': chr(0xD800)}]", "line 4: messages returns half of a surrogate pair"),
        ("return [{'role': 'system', 'content': 'a'}]", "line 4: messages returns messages of which the last one"),
        ("return []", "line 4: messages returns messages of which the last one"),
        ("return [{'role': 'user', 'content': 'a' * 10**7}]", "line 4: messages returns a prompt of 10,000,000"),
    ],
)
def test_a_fault_of_the_students_function_is_one_line_with_its_place(body: str, says: str, tmp_path: Path) -> None:
    student = load(written(tmp_path, BODY.format(body)), "messages")
    with pytest.raises(LessonError) as caught:
        student.messages("request 7", "hello")
    told = str(caught.value)
    assert told.startswith(f"answer.py, {says}")
    assert "\n" not in told
    assert len(told) < 400


def test_a_function_with_other_arguments_is_told_at_its_definition(tmp_path: Path) -> None:
    student = load(written(tmp_path, "\ndef messages():\n    return []\n"), "messages")
    with pytest.raises(LessonError, match=r"^answer.py, line 2: TypeError: .*takes 0 positional arguments"):
        student.messages("request 0", "rules")


def test_an_answer_may_define_dataclasses(tmp_path: Path) -> None:
    source = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    b: int = 1\n"
    )
    source += "def messages():\n    return [{'role': 'user', 'content': str(A())}]\n"
    assert "A(b=1)" in load(written(tmp_path, source), "messages").messages("")[0]["content"]


def test_a_wrong_number_of_boundaries_is_told_with_its_line(tmp_path: Path) -> None:
    source = solution(3).read_text(encoding="utf-8").replace("{MARKER}\\nYou", "You")
    with pytest.raises(LessonError, match=r"^answer.py, line \d+: messages returns 1 markers, not two"):
        layouts.answer_3(load(written(tmp_path, source), "messages"))


# --- the files, and the command line ---


@pytest.mark.parametrize("number", range(1, 6))
def test_a_students_file_is_short_and_has_no_engine_in_it(number: int) -> None:
    source = start_file(number).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    assert not re.search(r"^(from|import) (exercises|going_further|vllm)", source, re.MULTILINE)
    assert f"--exercise {number}\n" in ast.get_docstring(ast.parse(source)) + "\n"


@pytest.mark.parametrize("number", range(1, 6))
def test_a_solution_rewrites_one_function_and_keeps_its_arguments(number: int) -> None:
    name, _ = check.EXERCISES[str(number)]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (start_file(number), solution(number))]
    start, solved = ({node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)} for tree in trees)
    assert ast.dump(start[name].args) == ast.dump(solved[name].args)
    assert ast.dump(start[name]) != ast.dump(solved[name])
    assert all(ast.dump(solved[other]) == ast.dump(start[other]) for other in solved.keys() - {name})


def test_every_exercise_has_a_start_file_and_a_solution_and_no_more() -> None:
    for folder in (EXERCISES, EXERCISES / "solutions"):
        assert {path.stem for path in folder.glob("exercise_*.py")} == {f"exercise_{n}" for n in check.EXERCISES}


@pytest.mark.parametrize("path", sorted(EXERCISES.glob("*.py")), ids=lambda path: path.stem)
def test_the_checks_import_no_lesson_but_through_common(path: Path) -> None:
    lessons, modules = {path.stem for path in ROOT.glob("*.py")}, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    assert not modules & lessons


def runner(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "run_all_examples.py", *words], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize(
    "words", [["9"], ["x"], ["²"], ["-1"], [], ["1", "--bogus"], ["1", "--block-size", "0"], ["1", "--list"], [""]]
)
def test_the_runner_refuses_what_is_no_exercise_before_anything_starts(words: list[str]) -> None:
    done = runner("--exercise", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_answer_is_not_overwritten_by_the_measurements() -> None:
    done = runner("--exercise", "1", str(solution(1)), "--json", str(solution(1)))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--json names the answer itself" in done.stderr


def test_a_fault_in_the_file_is_one_line_and_status_1_from_any_folder(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "exercises").mkdir()
    (tmp_path / "exercises" / "__init__.py").write_text("raise RuntimeError")  # of another project
    (tmp_path / "mine.py").write_text("def messages(rules, policies, tools, request):\n    return request['when']\n")
    done = runner("--exercise", "1", "mine.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "check.py: error: mine.py, line 2: KeyError: 'when' (request 0)\n"


def test_requests_turns_and_tenants_are_the_same_each_time() -> None:
    assert facts.requests() == facts.requests()
    assert facts.turns() == facts.turns()
    assert dataclasses.asdict(routing.routed(load(solution(4), "route"))[0])["turn"] == 0
    assert all(facts.tenant(name, 700) == facts.tenant(name, 700) for name in facts.TENANTS)
