"""The page of --report: what it holds, that it loads nothing, and how it looks in a browser."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape

pytest.importorskip("matplotlib", reason="pip install -r requirements-report.txt")

import replay_report
import report
from going_further.replay.advice import Advice
from going_further.replay.caches import Arrival, RoutingResult, route_log
from going_further.replay.comparing import Row
from going_further.replay.logged import explain
from going_further.replay.output import groups_of, hit_rate
from going_further.replay.records import LeftOut
from run_all_examples import LESSONS, NO_RUN, LessonRun, milliseconds, read_arm, read_run

ROOT = Path(__file__).parent.parent
CPU = ROOT / "results" / "cpu.json"
RESULTS = sorted((ROOT / "results").glob("*.json"))
VOID = {"meta", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")

# What lessons write of late, and of what a student predicted.
LATER = {
    "break": {"token": 1009, "of": 4094, "blocks_lost": 24, "blocks": 31, "texts": ["09:30:00", ":47"]},
    "verdict": ["TTFT fell from here to there."],
    "predictions": [
        {"question": "cached in good?", "answer": 3968, "measured": 3968, "verdict": "exact", "why": "31 blocks"},
        {"question": "and in bad?", "answer": None, "measured": 0, "verdict": "skipped", "why": "it differs"},
    ],
}


class Page(HTMLParser):
    """A page as its tags, its attributes, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = Counter(), [], [], []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.strip()


def recorded(number: int, **more: object) -> dict:
    """Return a copy of a lesson as it was recorded before there was anything of LATER, with `more` in it."""
    lessons = {LESSONS[n].name: n for n in LESSONS}
    results = json.loads(CPU.read_text(encoding="utf-8"))["lessons"]
    found = copy.deepcopy(next(r for r in results if lessons[r["lesson"]] == number))
    return {key: value for key, value in found.items() if key not in LATER} | more


def page_of(*results: dict) -> str:
    numbers = {lesson.name: number for number, lesson in LESSONS.items()}
    return report.page([LessonRun(numbers[result["lesson"]], 0, 0.0, result) for result in results])


@pytest.fixture(scope="module")
def cpu() -> str:
    return report.page(read_run(CPU))


def replayed(requests: int = 12, **more: object) -> dict:
    """Return what the replayer writes of a log of agents with a clock at the front, made by its own parts."""
    rows, arrivals = [], []
    for n in range(requests):
        line, goes_on = n + 1, n % 3 == 2
        chain = [*range(n // 3 * 100, n // 3 * 100 + 60), *([line] * (n % 3))]
        common = dict(session=f"agent {n // 3}", group="ab"[n % 2], evicted_tokens=16 * goes_on, logged_cached_tokens=0)
        if goes_on:
            row = Row(line, 1005, 944, n, "extended", "", 960, "", "", 0, 16, family=2, **common)
        elif n % 3:
            texts = f"It is 09:{line:02}", f"It is 09:{n:02}"
            place = "system message changed", "message 0 (system)", 11, *texts
            row = Row(line, 985, 0, n, *place, 944, family=2, **common)
        else:
            row = Row(line, 970, 0, None, "first request", "", 0, "", "", 0, family=1, **common)
        rows.append(row)
        arrivals.append(Arrival(chain, row.prompt_tokens, row.session, float(n)))
    found = {
        "schema": 1,
        "lesson": "replay_request_log",
        "environment": {"model": "built_in_model/cpu", "block_size": 16},
        "requests": rows,
        "hit_rate": hit_rate(rows),
        "advice": [Advice("message 0 (system)", 1, 4, 3776, ["It is 09:30.", "It is 09:31."], 8, 0.25, 0.875)],
        "families": groups_of(rows, lambda row: f"line {row.family}"),
        "sessions": groups_of(rows, lambda row: row.session),
        "groups": groups_of(rows, lambda row: row.group),
        "routing": route_log(arrivals, 2, 16),
        "logged": explain(rows, arrivals, 16),
        "left_out": [LeftOut(13, "no JSON object")],
        "notes": ["left out, 1: no JSON object (line 13)"],
    }
    return json.loads(json.dumps(found | more, default=vars))


MEASURED = {
    "measurements": [
        dict(
            experiment="warm_up", arm="decoy", request=0, prompt_tokens=970, cached_tokens=0, ttft_ms=900.0, error=None
        ),
        dict(experiment="replay", arm="log", request=1, prompt_tokens=970, cached_tokens=0, ttft_ms=700.0, error=None),
        dict(experiment="replay", arm="log", request=2, prompt_tokens=985, cached_tokens=960, ttft_ms=50.0, error=None),
    ],
    "claims": [{"claim": "the analysis and the engine agree", "holds": False, "evidence": "1 of 2 requests"}],
    "seconds": {"measuring": 0.81},
}


@pytest.fixture(scope="module", params=["lessons", "replayed log"])
def any_page(request: pytest.FixtureRequest, cpu: str) -> str:
    return cpu if request.param == "lessons" else replay_report.page(replayed(**MEASURED))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_summary_holds_both_arms_of_every_lesson_as_they_were_measured(path: Path) -> None:
    page = Page(report.page(read_run(path)))
    assert page.open == []
    rows = [cells for cells in page.tables[0] if len(cells) == 8]
    arms = [read_arm(run.result, arm) for run in read_run(path) for arm in ("bad", "good")]
    for cells, arm in zip(rows[1:], arms, strict=True):
        assert cells[2:4] == [f"{arm.hit_rate:.1%}", milliseconds(arm.median_ms)]
        assert cells[5:7] == [f"{arm.prompt_tokens:,}", f"{arm.computed_tokens:,}"]


@pytest.mark.parametrize("number", LESSONS)
def test_every_sample_of_both_arms_is_in_a_table_and_in_the_chart(number: int) -> None:
    result = recorded(number)
    text = page_of(result)
    main = [m for m in result["measurements"] if m["experiment"] == "main"]
    cells = Counter(cell for line in Page(text).tables[2][2:] for cell in line)
    for value, times in Counter(milliseconds(m["ttft_ms"]) for m in main).items():
        assert cells[value] == times
    counts = (f"{m['cached_tokens']:,} / {m['prompt_tokens']:,}" for m in main)
    assert all(cells[value] == times for value, times in Counter(counts).items())
    ttft = text[text.index("<svg") : text.index("</svg>")]
    markers = [
        place for group in re.findall(r"<g clip-path.*?</g>", ttft, re.DOTALL) for place in re.findall("<use", group)
    ]
    assert len(markers) == len(main)


def test_the_environment_is_there_whether_lessons_share_it_or_not() -> None:
    first, second = recorded(1), recorded(2)
    second["environment"]["device"] = "another device"
    page = Page(page_of(first, second))
    for result in (first, second):
        for key, value in result["environment"].items():
            assert any([key, str(value)] in table for table in page.tables), key


def test_a_chart_has_a_title_and_a_description_and_no_id_is_there_twice(any_page: str, cpu: str) -> None:
    page = Page(any_page)
    ids = [value for _, name, value in page.attributes if name == "id"]
    charts = 2 * len(LESSONS) if any_page is cpu else 1
    assert page.tags["svg"] == page.tags["desc"] == page.tags["title"] - 1 == charts
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", any_page)) <= set(ids)


def test_the_page_loads_nothing_runs_nothing_and_says_so_to_the_browser(any_page: str) -> None:
    page = Page(any_page)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?://|@import", any_page)
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", any_page))
    for _, name, value in page.attributes:
        assert name not in ("src", "srcset", "data")
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href") or value.startswith("#")
    policy = ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'")
    assert policy in page.attributes
    assert ("meta", "charset", "utf-8") in page.attributes


@pytest.mark.parametrize("kind", ["lessons", "replayed log"])
def test_the_same_run_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    shown = CPU if kind == "lessons" else tmp_path / "log.json"
    if shown != CPU:
        shown.write_text(json.dumps(replayed()), encoding="utf-8")
    settings = tmp_path / "matplotlibrc"
    settings.write_text("axes.facecolor: black\nlines.linewidth: 9\n")
    for name, environment in (
        ("a", {"PYTHONHASHSEED": "1"}),
        ("b", {"MATPLOTLIBRC": str(settings), "TZ": "Asia/Tokyo"}),
    ):
        command = [sys.executable, ROOT / "run_all_examples.py", "--show", shown, "--report", tmp_path / name]
        subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def everywhere(value: object, text: str, key: str = "") -> object:
    """Return `value` with `text` before each of its texts but those that say which lesson, experiment and arm it is."""
    if isinstance(value, dict):
        return {k: everywhere(v, text, k) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(item, text, key) for item in value]
    return text + value if isinstance(value, str) and key not in ("lesson", "experiment", "arm") else value


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></svg>", "{{ 7 }}"]
)
def test_a_text_of_a_run_is_shown_and_never_taken_for_a_part_of_the_page(text: str) -> None:
    before, after = recorded(4, **LATER), everywhere(recorded(4, **LATER), text)
    after["environment"][text] = text
    page = page_of(after)
    assert Page(page).tags - Page(page_of(before)).tags == Counter(tr=1, th=1, td=1)  # the further key
    assert page.count(escape(text)) > 40
    for beginning in ("TTFT fell", "09:30:00", "cached in good?", "31 blocks", "session-00", "built_in_model"):
        assert text + beginning in html.unescape(page)


def test_control_characters_and_lone_surrogates_are_made_visible() -> None:
    result = recorded(1, verdict=["a\x1b[31m\x00b\ud800\u202e"])
    page = page_of(result)
    page.encode()
    assert r"a\x1b[31m\x00b\ud800\u202e" in page


def test_what_an_older_run_does_not_hold_is_said_and_what_a_newer_one_holds_is_shown() -> None:
    old, new = page_of(*map(recorded, LESSONS)), page_of(recorded(1, **LATER))
    for text, lessons in (
        ("This run does not hold the lesson's verdict.", len(LESSONS)),
        ("This run does not hold where two prompts first differ.", len(LESSONS) - 1),  # sessions have no break
    ):
        assert (old.count(text), new.count(text)) == (lessons, 0)
    assert "Predicted before" not in old
    assert "<h3>Predicted before it was measured: 1 exact, 0 within one block, 0 off, 1 skipped</h3>" in new
    assert "Two bad prompts first differ at token 1,009 of 4,094: 24 of 31 blocks lost" in new
    assert "<pre>09:30:00</pre>\n<pre>:47</pre>" in new
    assert '<p class="verdict">TTFT fell from here to there.</p>' in new
    assert ["cached in good?", "3,968", "3,968", "exact", "31 blocks"] in Page(new).tables[1]
    assert ["and in bad?", "-", "0", "skipped", "it differs"] in Page(new).tables[1]


def test_sessions_have_no_break_and_the_page_says_why() -> None:
    assert "both arms send the same prompts" in page_of(recorded(4))
    assert "This run does not hold where two prompts first differ" in page_of(recorded(1))


def test_a_claim_that_failed_and_a_count_that_was_not_predicted_are_marked() -> None:
    result = recorded(1)
    result["claims"][0]["holds"] = False
    row = next(m for m in result["measurements"] if (m["experiment"], m["arm"], m["request"]) == ("main", "good", 3))
    row["predicted_cached_tokens"] = 4096
    page = page_of(result)
    assert "4 of 5 hold" in page
    assert '<tr class="FAILED"><th scope="row">FAILED</th>' in page
    assert "3,968 / 4,090 (4,096 predicted)" in page


def test_a_lesson_without_a_result_is_named_in_summary_and_section() -> None:
    page = report.page([LessonRun(1, 1, 3.0, None)])
    assert page.count("no result: exit status 1 after 3 s") == 2
    assert "<svg" not in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ttft_ms", float("nan")),
        ("ttft_ms", float("inf")),
        ("ttft_ms", 0),
        ("ttft_ms", -1.0),
        ("ttft_ms", "slow"),
        ("ttft_ms", [1]),
        ("prompt_tokens", 5),
        ("cached_tokens", -1),
        ("cached_tokens", 10**400),
        ("request", 1),
    ],
)
def test_numbers_that_cannot_be_are_refused_as_no_recorded_run(key: str, value: object) -> None:
    result = recorded(1)
    row = next(m for m in result["measurements"] if (m["experiment"], m["arm"], m["request"]) == ("main", "good", 2))
    row[key] = value
    with pytest.raises(NO_RUN):
        page_of(result)


@pytest.mark.parametrize(
    "more", [{"break": [5]}, {"break": {"arm": "bad"}}, {"predictions": [{}]}, {"claims": [{}]}, {"environment": []}]
)
def test_parts_of_another_shape_are_refused_as_no_recorded_run(more: dict) -> None:
    with pytest.raises(NO_RUN):
        page_of(recorded(1, **more))


@pytest.mark.parametrize("script", ["report.py", "replay_report.py"])
def test_the_page_imports_no_lesson(script: str) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    assert not any(re.search(rf"import.*{lesson.name}|from {lesson.name}", source) for lesson in LESSONS.values())


# --- a replayed log ---


def cells_of(page: str) -> list[list[str]]:
    return [cells for table in Page(page).tables for cells in table]


def test_a_replayed_log_is_shown_with_all_that_was_found_out_about_it() -> None:
    result = replayed()
    page = replay_report.page(result)
    text, cells = " ".join(Page(page).texts), cells_of(page)
    assert "12 requests, 11,840 tokens, 3,776 cached (31.9%), 8,064 computed." in text
    assert "Where the engine wrote the answers itself: 64 tokens more (32.4%)." in text
    assert "Evicted or too old: 64 tokens that a cache without bounds would have found." in text
    assert ["system message changed", "4", "3,776"] in cells
    moved = ["message 0 (system)", "4", "3,776", "25.0%", "87.5%", "8", "It is 09:30.It is 09:31."]
    assert moved in cells
    for groups in (result["families"], result["sessions"], result["groups"]):
        for name, requests, tokens, rate in groups:
            assert [name, str(requests), f"{tokens:,}", f"{rate:.1%}"] in cells
    assert "4 sessions, hit rate 31.9% in the median, 31.9% to 31.9%; lowest: agent 0." in text
    for reason, tokens in result["logged"]["computed"].items():
        assert [reason, str(result["logged"]["affected"][reason]), f"{tokens:,}"] in cells
    for policy in (RoutingResult(**found) for found in result["routing"]):
        row = next(row for row in cells if row[0] == policy.policy)
        spread = f"{policy.spread:.2f}" if len(policy.requests) > 1 else "-"
        assert row[1:4] == [f"{policy.hit_rate:.1%}", f"{sum(policy.computed_tokens):,}", spread]
    assert "line 13: no JSON object" in text
    assert "Line 2: message 0 (system), token 11: 944 tokens lost (system message changed, best predecessor" in text
    assert "<pre>It is 09:02</pre>\n<pre>It is 09:01</pre>" in page


def test_of_a_log_only_that_is_shown_which_there_is() -> None:
    empty = dict(advice=[], families=[], sessions=[], groups=[], routing=[], logged=None, left_out=[], notes=[])
    page = replay_report.page(replayed(1, **empty))
    assert re.findall("<h2>(.*?)</h2>", page) == ["Environment"]
    assert re.findall("<h2>(.*?)</h2>", replay_report.page(replayed())) == [
        *("What stands too early", "Prompt families", "Sessions of two requests or more", "Groups"),
        *("Logged against predicted", "Several replicas, the same log", "Notes", "Left out"),
        *("Requests that lost most", "Environment"),
    ]


def test_what_an_engine_measured_of_a_log_is_shown_without_its_warm_up() -> None:
    page = replay_report.page(replayed(**MEASURED))
    assert "Sent to the engine: 2; 960 tokens found (49.1%), TTFT 375 ms in the median." in page
    assert ["the analysis and the engine agree", "FAILED", "1 of 2 requests"] in cells_of(page)
    assert ["seconds: measuring", "0.8"] in cells_of(page)


def bars_of(page: str) -> int:
    return len(set(re.findall(r'id="(requests-patch_\d+)"', page))) // 3  # found, lost, computed otherwise


@pytest.mark.parametrize(("requests", "bars"), [(1, 1), (100, 100), (101, 51), (1000, 100)])
def test_the_chart_of_a_log_has_three_parts_a_request_and_no_more_than_a_hundred_bars(requests: int, bars: int) -> None:
    result = replayed(requests)
    page = replay_report.page(result)
    assert bars_of(page) - bars_of(replay_report.page(replayed(2))) == bars - 2
    found, lost = (sum(row[key] for row in result["requests"]) for key in ("predicted_cached_tokens", "lost_tokens"))
    rest = sum(row["prompt_tokens"] for row in result["requests"]) - found - lost
    assert f"Tokens: found {found:,}, lost {lost:,}, computed otherwise {rest:,}." in page


def test_the_page_of_a_large_log_is_small_and_counts_what_it_leaves_out() -> None:
    result = replayed(1000)
    result["requests"] *= 100
    for n, row in enumerate(result["requests"]):
        row |= {"line": n + 1}
    result |= {"sessions": [[f"s{n}", 2, 10, 0.5] for n in range(50_000)], "notes": ["long" * 1000] * 30}
    page = replay_report.page(result)
    assert len(page) < 500_000
    assert '<p class="quiet">and 49,980 more</p>' in page
    assert '<p class="quiet">and 10 more</p>' in page
    assert page.count('<div class="break">') == 20
    assert "100,000 requests" in page
    assert "1,000 requests a bar" in page


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 }}", "$x^{"])
def test_a_text_of_a_log_is_shown_and_never_taken_for_a_part_of_the_page(text: str) -> None:
    before = replayed(**MEASURED)
    after = everywhere(before, text)
    after["measurements"] = before["measurements"]
    after["logged"]["computed"] = {text: 5}
    after["logged"]["affected"] = {text: 5}
    after["environment"][text] = text
    page = replay_report.page(after)
    markup, plain = Page(page), Page(replay_report.page(before))
    assert set(markup.tags) == set(plain.tags)
    assert markup.tags["svg"] == plain.tags["svg"]
    assert page.count(escape(text)) > 40
    for beginning in ("It is 09:30.", "message 0 (system)", "agent 0", "no JSON object", "1 of 2 requests"):
        assert text + beginning in html.unescape(page)


def test_control_characters_of_a_log_are_made_visible() -> None:
    result = everywhere(replayed(), "a\x1b[31m\x00b\ud800\u202e")
    page = replay_report.page(result)
    page.encode()
    assert page.count(r"a\x1b[31m\x00b\ud800\u202e") > 30
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)


@pytest.mark.parametrize("value", [None, -1, 1.5, float("nan"), float("inf"), "5", [5], {}, True, 10**400], ids=repr)
@pytest.mark.parametrize("key", ["line", "prompt_tokens", "predicted_cached_tokens", "lost_tokens", "token"])
def test_counts_of_a_log_that_cannot_be_are_refused(key: str, value: object) -> None:
    result = replayed()
    result["requests"][1][key] = value
    with pytest.raises(NO_RUN):
        replay_report.page(result)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("requests",), []),
        (("requests",), {}),
        (("requests", 1, "lost_tokens"), 986),
        (("requests", 1, "kind"), ["extended"]),
        (("requests", 1, "before"), 5),
        (("hit_rate",), 0.99),
        (("hit_rate",), float("nan")),
        (("advice", 0, "moved_hit_rate"), 1.5),
        (("advice", 0, "hit_rate"), float("nan")),
        (("advice", 0, "texts"), "It"),
        (("families", 0), ["line 1", 4]),
        (("sessions", 0, 3), "high"),
        (("routing", 0, "found_tokens"), 10**6),
        (("routing", 0, "computed_tokens"), 5),
        (("logged",), []),
        (("logged", "ages", "found"), [float("nan")]),
        (("logged", "computed"), [5]),
        (("left_out", 0), "line 13"),
        (("notes",), "a note"),
        (("environment",), []),
        (("measurements",), 5),
        (("measurements", 1, "ttft_ms"), float("nan")),
        (("claims",), {}),
        (("claims", 0, "holds"), "no"),
        (("seconds", "measuring"), "long"),
    ],
    ids=str,
)
def test_parts_of_a_log_that_cannot_be_are_refused(place: tuple, value: object) -> None:
    result = replayed(**copy.deepcopy(MEASURED))
    result["logged"] |= {"computed": {"found": 1}, "affected": {"found": 1}, "ages": {"found": [1.0]}}
    replay_report.sections(result)
    part = result
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    with pytest.raises(NO_RUN):
        replay_report.page(result)


@pytest.mark.parametrize("key", sorted(replayed().keys() - {"schema", "lesson"}))
def test_a_log_that_lacks_a_part_is_refused(key: str) -> None:
    result = replayed()
    del result[key]
    with pytest.raises(NO_RUN):
        replay_report.page(result)


def test_what_the_replayer_writes_of_a_log_is_what_the_page_reads(tmp_path: Path) -> None:
    log, found, page = (
        ROOT / "tests" / "field" / "29-tool-results-cleared.jsonl",
        tmp_path / "a.json",
        tmp_path / "a.html",
    )
    options = ["--without-engine", "--replicas", "2", "--json", found]
    replay = [sys.executable, "-m", "going_further.replay_request_log", log, *options]
    subprocess.run(replay, cwd=ROOT, check=True, capture_output=True)
    show = [sys.executable, ROOT / "run_all_examples.py", "--show", found, "--report", page]
    subprocess.run(show, check=True, capture_output=True)
    result, text = json.loads(found.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
    assert result.keys() == replayed().keys()
    for mine, its in ((replayed()["requests"], result["requests"]), (replayed()["advice"], result["advice"])):
        assert mine[0].keys() == its[0].keys()
    assert f"({result['hit_rate']:.1%})" in text
    assert f"{result['advice'][0]['moved_hit_rate']:.1%}" in text


# --- in a browser ---

MEASURE = """<!DOCTYPE html><meta charset="utf-8"><iframe id="frame" width="{width}" height="3000" style="border: 0"
srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
onload = () => {{
  const page = document.getElementById("frame").contentDocument;
  const box = (element) => element.getBoundingClientRect();
  const right = (selector) => Math.max(...[...page.querySelectorAll(selector)].map(element => box(element).right));
  document.getElementById("found").textContent = JSON.stringify({{
    wide: page.documentElement.scrollWidth, charts: right("figure svg"), texts: right("p, pre, h1, h2, h3, .scroll"),
    chart: box(page.querySelector("figure svg")).width,
    cut: [...page.querySelectorAll("svg text")].filter(text => {{
      const inner = box(text), outer = box(text.ownerSVGElement);
      return inner.left < outer.left - 1 || inner.right > outer.right + 1;
    }}).map(text => text.textContent),
  }});
}};
</script>
"""


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page on which there is everything that can be, with long texts where a run may have them."""
    results = [recorded(number, **LATER) for number in LESSONS]
    results[0]["environment"]["model"] = "a/very/long/path/" * 20
    results[1]["verdict"] = ["unbroken" * 40]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page_of(*results), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page about a log with all that can be, in which texts are long and lines have six digits."""
    result = replayed(1000, **copy.deepcopy(MEASURED))
    for row in result["requests"]:
        row["line"] += 100_000
    result["sessions"][0][0] = "unbroken" * 60
    result["advice"][0]["texts"][0] = result["requests"][1]["before"] = "a long text " * 60
    result["notes"][0] = result["environment"]["model"] = "a/very/long/path/" * 20
    path = tmp_path_factory.mktemp("log") / "page.html"
    path.write_text(replay_report.page(result), encoding="utf-8")
    return path


@pytest.fixture(params=["lessons", "replayed log"])
def looked_at(request: pytest.FixtureRequest, whole_page: Path, long_log: Path) -> Path:
    return whole_page if request.param == "lessons" else long_log


def browse(folder: Path, page: Path, *options: str) -> str:
    """Open a page in chromium and return what it prints."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *options,
    ]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


@in_a_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window_and_no_text_of_a_chart_is_cut(
    looked_at: Path, tmp_path: Path, width: int
) -> None:
    wrapper = tmp_path / "wrapper.html"
    text = html.escape(looked_at.read_text(encoding="utf-8"), quote=True)
    wrapper.write_text(MEASURE.format(width=width, page=text), encoding="utf-8")
    dom = browse(tmp_path, wrapper, "--dump-dom")
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert found["wide"] <= width
    assert max(found["charts"], found["texts"]) <= width
    assert found["chart"] > 300
    assert found["cut"] == []


@in_a_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_a_screenshot_shows_text_and_both_arms_colours(looked_at: Path, tmp_path: Path, width: int) -> None:
    from PIL import Image, ImageColor

    path = tmp_path / "page.png"
    browse(tmp_path, looked_at, f"--screenshot={path}", f"--window-size={width},3000", "--hide-scrollbars")
    with Image.open(path) as image:
        assert image.size == (width, 3000)
        pixels = {colour: count for count, colour in image.convert("RGB").getcolors(2**24)}
    assert 0.5 < pixels[255, 255, 255] / (width * 3000) < 0.99
    for colour in report.COLOURS.values():
        assert pixels[ImageColor.getrgb(colour)] > 500


def pages_of_pdf(folder: Path, page: Path) -> int:
    path = folder / "page.pdf"
    browse(folder, page, f"--print-to-pdf={path}", "--no-pdf-header-footer")
    content = path.read_bytes()
    assert content.startswith(b"%PDF")
    return len(re.findall(rb"/Type\s*/Page\b", content))


@in_a_browser
def test_as_pdf_every_lesson_and_the_environment_begin_on_a_page_of_their_own(tmp_path: Path) -> None:
    short = tmp_path / "short.html"
    short.write_text(report.page([LessonRun(number, 1, 3.0, None) for number in LESSONS]), encoding="utf-8")
    assert pages_of_pdf(tmp_path, short) == 1 + len(LESSONS) + 1


@in_a_browser
def test_as_pdf_a_lesson_takes_no_more_than_two_pages(whole_page: Path, tmp_path: Path) -> None:
    assert pages_of_pdf(tmp_path, whole_page) <= 1 + 2 * len(LESSONS) + 1


@in_a_browser
def test_as_pdf_a_log_takes_six_pages_with_every_part_it_can_have(long_log: Path, tmp_path: Path) -> None:
    assert pages_of_pdf(tmp_path, long_log) <= 6
