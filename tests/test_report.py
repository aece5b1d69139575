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

import report
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


def test_a_chart_has_a_title_and_a_description_and_no_id_is_there_twice(cpu: str) -> None:
    page = Page(cpu)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert page.tags["svg"] == page.tags["desc"] == page.tags["title"] - 1 == 2 * len(LESSONS)
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", cpu)) <= set(ids)


def test_the_page_loads_nothing_runs_nothing_and_says_so_to_the_browser(cpu: str) -> None:
    page = Page(cpu)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?://|@import", cpu)
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", cpu))
    for _, name, value in page.attributes:
        assert name not in ("src", "srcset", "data")
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href") or value.startswith("#")
    policy = ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'")
    assert policy in page.attributes
    assert ("meta", "charset", "utf-8") in page.attributes


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    settings = tmp_path / "matplotlibrc"
    settings.write_text("axes.facecolor: black\nlines.linewidth: 9\n")
    for name, environment in (
        ("a", {"PYTHONHASHSEED": "1"}),
        ("b", {"MATPLOTLIBRC": str(settings), "TZ": "Asia/Tokyo"}),
    ):
        command = [sys.executable, ROOT / "run_all_examples.py", "--show", CPU, "--report", tmp_path / name]
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


def test_the_page_imports_no_lesson() -> None:
    source = (ROOT / "report.py").read_text(encoding="utf-8")
    assert not any(re.search(rf"import.*{lesson.name}|from {lesson.name}", source) for lesson in LESSONS.values())


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
    whole_page: Path, tmp_path: Path, width: int
) -> None:
    wrapper = tmp_path / "wrapper.html"
    text = html.escape(whole_page.read_text(encoding="utf-8"), quote=True)
    wrapper.write_text(MEASURE.format(width=width, page=text), encoding="utf-8")
    dom = browse(tmp_path, wrapper, "--dump-dom")
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert found["wide"] <= width
    assert max(found["charts"], found["texts"]) <= width
    assert found["chart"] > 300
    assert found["cut"] == []


@in_a_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_a_screenshot_shows_text_and_both_arms_colours(whole_page: Path, tmp_path: Path, width: int) -> None:
    from PIL import Image, ImageColor

    path = tmp_path / "page.png"
    browse(tmp_path, whole_page, f"--screenshot={path}", f"--window-size={width},3000", "--hide-scrollbars")
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
