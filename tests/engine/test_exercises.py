"""The exercises on the real engine: start files fail, solutions pass with the results they tell, wrong answers fail."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.wrong_answers import WRONG_1, WRONG_2, WRONG_3, WRONG_4, WRONG_5

ROOT = Path(__file__).parent.parent.parent
CHECK = "exercises.check"
RECORDED = ("--model", "built_in_model/cpu", "--block-size", "128")  # what the solutions were measured with
ENGINE_CLAIMS = {
    "predicted = measured cached tokens on every request",
    "vLLM's own counters agree with the requests",
    "the analysis and the engine agree",
}
FAILS = {  # the claims that each start file breaks
    1: {"the hit rate reaches its bound"},
    2: {"the hit rate reaches its bound"},
    3: {
        "the hit rate reaches its bound",
        "all prompts agree up to boundary 1",
        "those of a tenant agree up to boundary 2",
    },
    4: {
        "the hit rate reaches its bound",
        "each worker has about the same share of the sessions",
        "the order in which workers are listed decides nothing",
        "a session comes back to its worker while that has room",
    },
    5: {"the three breaks are named"},
}


def failed(done) -> set[str]:
    """Return the claims that fail; the engine did what was predicted, whatever the student wrote."""
    claims = {claim["claim"] for claim in done.result["claims"] if not claim["holds"]}
    assert not claims & ENGINE_CLAIMS, done.out
    assert ("Not solved: exercise" in done.out) == bool(claims) == (done.status == 1), done.out + done.err
    return claims


@pytest.mark.parametrize("number", FAILS)
def test_a_start_file_fails_its_check(number: int, run_script) -> None:
    assert failed(run_script(CHECK, str(number))) == FAILS[number]


@pytest.mark.parametrize("number", FAILS)
def test_a_solution_passes_with_the_results_that_its_docstring_tells(number: int, run_script) -> None:
    path = ROOT / "exercises" / "solutions" / f"exercise_{number}.py"
    done = run_script(CHECK, str(number), str(path), *RECORDED)
    assert failed(done) == set()
    told = " ".join(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split())
    counts = done.result["exercise"]
    measured = {
        True: "{breaks} of 3 breaks, {explained:,} of {lost:,} lost tokens explained.",
        False: "hit rate {percent:.1f} %, {computed:,} of {sent:,} tokens computed.",
    }[number == 5].format(**counts, percent=100 * counts.get("hit_rate", 0))
    assert told.endswith(f"Measured (built-in model, blocks of 128): {measured}")
    assert (counts["number"], counts["file"]) == (number, path.name)


def answer(tmp_path: Path, source: str) -> str:
    path = tmp_path / "answer.py"
    path.write_text(source, encoding="utf-8")
    return str(path)


def test_through_the_runner_with_another_model_and_smaller_blocks(run_script, tmp_path: Path) -> None:
    wrong = answer(tmp_path, WRONG_1["the clock is one line further down"])
    options = ("--model", str(write_llama(tmp_path / "llama")), "--block-size", "32")
    done = run_script("run_all_examples.py", "--exercise", "1", wrong, *options)
    assert failed(done) == {"the hit rate reaches its bound"}
    assert re.search(r"message 0 \(system\), character \d+\n +from token \d+ on; [\d,]+ tokens lost in 5", done.out)
    assert done.result["environment"]["block_size"] == 32


def test_a_dropped_fact_is_named_however_high_the_hit_rate(run_script, tmp_path: Path) -> None:
    done = run_script(CHECK, "2", answer(tmp_path, WRONG_2["what was learned earlier is dropped"]), *RECORDED)
    assert failed(done) == {"every prompt carries its facts"}
    assert "turn 1: traveller is missing" in done.out


def test_a_boundary_that_stands_too_early_is_told(run_script, tmp_path: Path) -> None:
    done = run_script(CHECK, "3", answer(tmp_path, WRONG_3["both boundaries stand behind the shared text"]), *RECORDED)
    assert failed(done) == {"the hit rate reaches its bound"}
    assert re.search(r"boundary 2 stands at token [\d,]+\n", done.out)


def test_a_router_that_does_not_bound_a_hot_session_is_told(run_script, tmp_path: Path) -> None:
    done = run_script(CHECK, "4", answer(tmp_path, WRONG_4["rendezvous without a bound"][0]), *RECORDED)
    assert failed(done) == {"a hot session overruns no worker"}


def test_a_diagnosis_that_is_one_line_off_is_told(run_script, tmp_path: Path) -> None:
    source, says = WRONG_5["one line further down"]
    done = run_script(CHECK, "5", answer(tmp_path, source), *RECORDED)
    assert failed(done) == {"the three breaks are named", "nothing else is named"}
    assert says in done.out
    assert not re.search(r"system message|field|tools\[", done.out), "not the solution"
