"""The two fences, instrument and plumbing: equal in every lesson, within their size, and right."""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import run_all_examples
from stable_prefix_vs_timestamp import (
    GRAPH_TOKENS,
    CacheModel,
    EngineError,
    LessonError,
    Measurement,
    built_in_model,
    common_prefix,
    find_model,
    graph_sizes,
    json_path,
    root_cause,
    time_verdict,
    write_json,
)  # fmt: skip

ROOT = Path(__file__).parent.parent
LESSONS = [ROOT / f"{lesson.name}.py" for lesson in run_all_examples.LESSONS.values()]
QUESTIONS = "# --- the questions: predict first"
INSTRUMENT, PLUMBING = "# --- the instrument: how it is measured", "# --- the plumbing: skip this"


def parts(script: Path) -> tuple[str, str, str, str]:
    """Return a lesson's own part, its questions, its instrument and its plumbing."""
    own, fences = script.read_text(encoding="utf-8").split(QUESTIONS)
    questions, fences = fences.split(INSTRUMENT)
    instrument, plumbing = fences.split(PLUMBING)
    return own, QUESTIONS + questions, INSTRUMENT + instrument, PLUMBING + plumbing


@pytest.mark.parametrize("script", LESSONS[1:], ids=lambda path: path.stem)
def test_the_fences_are_byte_identical_in_all_lessons(script: Path) -> None:
    assert parts(script)[1:] == parts(LESSONS[0])[1:]


def test_the_fences_keep_to_their_budgets() -> None:
    _, questions, instrument, plumbing = (len(part.splitlines()) for part in parts(LESSONS[0]))
    assert questions <= 80
    assert instrument <= 190
    assert plumbing <= 581


@pytest.mark.parametrize("script", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_shows_vllm_before_its_first_fence(script: Path) -> None:
    own = parts(script)[0]
    for name in ("AsyncLLMEngine", "SamplingParams", "num_cached_tokens", "max_num_batched_tokens"):
        assert name in own
    arguments = own.split("start_engine(")[-1] if "start_workers" not in own else own.split("start_workers(")[1]
    assert arguments.split("=")[0].split()[-1] == "enable_prefix_caching", "the first of the arguments"
    assert "# fmt: skip" not in own


def imported(source: str) -> set[str]:
    """Return the names of all modules that a source text imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def shadows(source: str) -> set[str]:
    """Return the names of a file's own functions, classes and imports that a function in it uses for something else."""
    tree = ast.parse(source)
    defined = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    taken = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.arg):
                    taken.add(node.arg)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    taken.add(node.id)
    return taken & defined


PYTHON = [
    path
    for folder in (".", "going_further", "going_further/replay", "exercises")
    for path in (ROOT / folder).glob("*.py")
]


@pytest.mark.parametrize("script", sorted(PYTHON), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_local_name_hides_a_function_or_a_module(script: Path) -> None:
    assert shadows(script.read_text(encoding="utf-8")) == set()


def test_a_hidden_name_would_be_found() -> None:
    assert shadows("import time\ndef cells(): pass\ndef f(time):\n    cells = 1\n") == {"time", "cells"}


@pytest.mark.parametrize("script", LESSONS, ids=lambda path: path.stem)
def test_what_a_learner_reads_needs_no_tooling(script: Path) -> None:
    assert not imported(parts(script)[0]) & {"rich", "argparse", "os"}


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_no_script_makes_a_lesson_its_module(script: Path) -> None:
    assert not imported(script.read_text(encoding="utf-8")) & {lesson.stem for lesson in LESSONS}


@pytest.mark.parametrize("script", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_imports_nothing_that_stands_beside_it(script: Path) -> None:
    assert not imported(script.read_text(encoding="utf-8")) & {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_an_old_python_can_read_the_scripts_far_enough_to_say_that_it_is_too_old(script: Path) -> None:
    ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_an_old_python_gets_past_the_imports(script: Path) -> None:
    evaluated = [node for node in ast.parse(script.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    subscripted = {node.value.id for statement in evaluated for node in ast.walk(statement)
                   if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)}  # fmt: skip
    assert not subscripted & {"dict", "list", "set", "tuple", "type"}, (
        "list[int] is evaluated here; Python 3.8 has none"
    )


tokens = st.lists(st.integers(0, 2), max_size=24)


@given(st.lists(tokens, max_size=6), tokens.filter(len), st.integers(1, 5))
def test_a_hit_is_the_longest_common_prefix_in_whole_blocks_and_never_the_last_token(
    stored: list[list[int]], prompt: list[int], block: int
) -> None:
    model = CacheModel(block)
    for ids in stored:
        model.store(ids)
    full = [ids[: len(ids) // block * block] for ids in stored]  # a block is only stored once it is full
    longest = max((common_prefix(ids, prompt) for ids in full), default=0)
    assert model.cached_tokens(prompt) == min(longest, len(prompt) - 1) // block * block


def test_an_identical_prompt_of_whole_blocks_loses_its_last_block() -> None:
    model = CacheModel(4)
    model.store(list(range(8)))
    assert model.cached_tokens(list(range(8))) == 4
    assert model.cached_tokens([*range(8), 8]) == 8


def measurement(ttft_ms: float, prompt_tokens: int = 100, cached_tokens: int = 0) -> Measurement:
    return Measurement("main", "bad", 1, None, None, prompt_tokens, cached_tokens, cached_tokens, ttft_ms, None)


def test_the_verdict_shows_a_speed_up_only_where_the_ranges_lie_apart() -> None:
    slow = [measurement(100.0), measurement(120.0)]
    fast = [measurement(10.0, cached_tokens=90), measurement(12.0, cached_tokens=90)]
    assert "10.0x of at most 10x" in time_verdict(slow, fast)
    assert time_verdict([measurement(200.0)], [measurement(10.0, cached_tokens=90)]).endswith(
        "20.0x with 10x fewer (tokens computed)."
    ), "a time is no proof: it may exceed what fewer tokens explain"
    assert "overlap" in time_verdict(slow, [measurement(20.0), measurement(110.0)])
    assert "did not improve" in time_verdict(fast, slow)


def test_a_verdict_on_time_is_one_line_of_80_columns_whatever_was_measured() -> None:
    fast, slow = [measurement(98_000.0, 999_999, 999_998)], [measurement(99_000.0, 999_999)]
    spread = [measurement(1.0), *slow * 3]
    verdicts = time_verdict(slow, fast), time_verdict(fast, slow), time_verdict(spread, fast)
    assert [verdict.split(":")[0].split()[1] for verdict in verdicts] == ["fell", "did", "went"]
    assert max(map(len, verdicts)) <= 80, verdicts


def test_the_root_cause_is_the_first_exception_that_is_no_wrapper() -> None:
    log = (
        "(EngineCore pid=7) WARNING 11-23 11:23:28 [a.py:1] ImportError: only a warning\n"
        "(Worker pid=8) ERROR 11-23 11:23:29 [b.py:2] ValueError: the KV cache is too small\n"
        "(EngineCore pid=7) Exception: WorkerProc failed. See stack trace for root cause.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert root_cause(EngineError("vLLM did not start"), log) == "ValueError: the KV cache is too small"


def test_what_only_says_that_a_subprocess_failed_is_no_root_cause() -> None:
    log = (
        "(EngineCore pid=7) ERROR 11-27 18:35:52 [registry.py:1120] subprocess.CalledProcessError: Command '[...]' "
        "returned non-zero exit status 1.\n"
        "(EngineCore pid=7) ERROR 11-27 18:35:52 [registry.py:1120] RuntimeError: Error raised in subprocess:\n"
        "(EngineCore pid=7) ERROR 11-27 18:35:52 [registry.py:1120] ModuleNotFoundError: No module named 'it'\n"
    )
    assert root_cause(EngineError("no"), log) == "ModuleNotFoundError: No module named 'it'"


def test_where_vllm_points_above_and_nothing_stands_there_the_engine_was_killed() -> None:
    error = EngineError("vLLM did not start")
    error.__cause__ = RuntimeError("Engine core initialization failed. See root cause above.")
    assert "as one that is killed" in root_cause(error, "INFO 11-23 [a.py:1] all is well\n")


def test_json_goes_where_a_link_points_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    write_json(tmp_path / "link.json", {"n": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "file.json").read_text() == '{\n "n": 1\n}\n'


def test_json_does_not_write_through_a_link_that_waits_beside_it(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f"kv-{os.getpid()}.part").symlink_to(tmp_path / "precious")
    with pytest.raises(LessonError, match="cannot write"):
        write_json(tmp_path / "file.json", {"n": 1})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels"),
        (".", "no regular file"),
        ("none/x", "No such file"),
    ],
)
def test_a_json_path_that_cannot_be_written_is_told_before_anything_starts(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (json_path, run_all_examples.json_path):
        with pytest.raises(argparse.ArgumentTypeError, match=says):
            path(name)


def test_a_json_path_beside_a_folder_called_part_is_written(tmp_path: Path) -> None:
    (tmp_path / "file.json.part").mkdir()
    write_json(json_path(str(tmp_path / "file.json")), {"n": 1})
    assert (tmp_path / "file.json").read_text() == '{\n "n": 1\n}\n'


@pytest.mark.parametrize("joined", [False, True])
def test_a_file_that_is_read_is_not_written(joined: bool, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be brief. // __CACHE_END__ Why?")
    words = [f"--prompt-file={prompt}", f"--json={prompt}"] if joined else ["--prompt-file", prompt, "--json", prompt]
    done = subprocess.run([sys.executable, ROOT / "manual_cache_boundary.py", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--json names a file that is read" in done.stderr
    assert prompt.read_text().startswith("Be brief.")


@pytest.mark.parametrize("name", ["Qwen/a--b", "a/b..c", "a/b-", f"a/{'b' * 100}"])
def test_a_name_that_the_hub_does_not_take_is_one_line(hub, name: str) -> None:
    hub(404)
    with pytest.raises(LessonError, match="no name that the hub takes"):
        find_model(name)


def test_both_lessons_that_check_the_template_check_it_alike() -> None:
    def check(script: Path) -> str:
        own = parts(script)[0]
        return own[own.index("def check_template") :].split("\n\n\n")[0]

    assert check(LESSONS[1]) == check(LESSONS[3])


def test_json_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.json").mkdir()
    with pytest.raises(LessonError, match="cannot write"):
        write_json(tmp_path / "file.json", {"n": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that puts a hub in place which answers everything with one status; None: nobody answers."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    servers = []

    def put(status: int | None) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        endpoint = f"http://127.0.0.1:{servers[0].server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if status is None:
            servers.pop().server_close()
        else:
            threading.Thread(target=servers[0].serve_forever, daemon=True).start()

    yield put
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (404, "the hub answers 404 for some/model: check the name"),
        (401, "the hub answers 401 for some/model: check the name"),
        (503, "some/model: no folder, not downloaded, and the hub is out of reach"),
        (None, "some/model: no folder, not downloaded, and the hub is out of reach"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_line(hub, status: int | None, says: str) -> None:
    hub(status)
    with pytest.raises(LessonError, match=says):
        find_model("some/model")


@pytest.mark.parametrize("status", [503, None])
def test_a_hub_that_is_down_does_not_hide_a_model_that_is_downloaded(hub, status: int | None, tmp_path: Path) -> None:
    hub(status)
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    assert find_model("some/model") == str(snapshot)


def test_the_folder_of_a_run_that_was_killed_goes_with_the_next_run_one_in_use_stays(tmp_path: Path) -> None:
    script = "from stable_prefix_vs_timestamp import prepare_process; print(prepare_process(1), flush=True); input()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    folders = []
    with contextlib.ExitStack() as runs:
        for _ in range(3):
            command = [sys.executable, "-c", script]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            run = runs.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
            folders.append((run, Path(run.stdout.readline().strip())))
            if len(folders) == 1:
                run.kill()
                run.wait()
                assert folders[0][1].is_dir(), "nobody had the time to remove it"
        found = [folder.is_dir() for _, folder in folders]
        for run, _ in folders[1:]:
            run.communicate("\n")
    assert found == [False, True, True]


@pytest.mark.parametrize(
    ("gib", "shape"), [(141, "7b"), (79.6, "7b"), (39.6, "7b"), (24, "1.5b"), (11.7, "1.5b"), (8, "0.5b")]
)
def test_the_built_in_shape_follows_the_memory_of_the_gpu(gib: float, shape: str) -> None:
    assert Path(built_in_model(int(gib * 2**30))) == ROOT / "built_in_model" / shape


def test_without_a_gpu_the_shape_is_the_small_one() -> None:
    assert Path(built_in_model(0)) == ROOT / "built_in_model" / "cpu"


@given(st.integers(1, 3000))
def test_a_step_is_padded_to_a_captured_size_by_less_than_half(tokens: int) -> None:
    sizes = graph_sizes(tokens)
    assert sizes == sorted(set(sizes))
    if tokens <= sizes[-1]:
        assert min(size for size in sizes if size >= tokens) <= max(16, 1.5 * tokens)
    else:
        assert tokens > GRAPH_TOKENS


@pytest.mark.parametrize("engines", [1, 2])
def test_one_engine_leaves_a_core_to_the_client_several_share_them(engines: int, tmp_path: Path) -> None:
    script = "import os, stable_prefix_vs_timestamp as s; s.prepare_process(int(os.environ['N']))"
    script += "; print(os.environ['OMP_NUM_THREADS'], len(os.sched_getaffinity(0)))"
    environment = os.environ | {"TMPDIR": str(tmp_path), "N": str(engines)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    threads, cores = map(int, done.stdout.split())
    assert threads == max(1, cores - 1 if engines == 1 else cores // engines)


FORKED = """
import os, time
from stable_prefix_vs_timestamp import prepare_process
prepare_process(1)
if (child := os.fork()) == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
SPAWNED = """
import multiprocessing, time
import stable_prefix_vs_timestamp
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    time.sleep(1)
    print(process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("text", [FORKED, SPAWNED], ids=["forked", "spawned"])
def test_an_engines_process_ends_with_a_lesson_that_is_killed(text: str, tmp_path: Path) -> None:
    (tmp_path / "lesson.py").write_text(text)
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "lesson.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as lesson:
        engine = Path("/proc") / lesson.stdout.readline().strip()
        assert engine.exists()
        lesson.kill()
        lesson.stdout.close()
    end = time.monotonic() + 10
    while engine.exists() and "State:\tZ" not in (engine / "status").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not engine.exists() or "State:\tZ" in (engine / "status").read_text()
