"""One page about a run: what `run_all_examples.py --report PATH` writes.

The page stands alone: charts are drawn into it, it loads nothing and runs no script. It shows what a run's JSON holds,
and says so where the run holds something not. A recorded run may come from anybody: all its texts are escaped.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections import Counter
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from run_all_examples import (
    LESSONS,
    PRICE_CACHED,
    PRICE_INPUT,
    Arm,
    LessonRun,
    count_verdicts,
    milliseconds,
    pair_ratios,
    read_arm,
    shown,
    speed_up,
)

# Okabe and Ito's orange and blue: told apart by the colour-blind, and one light and one dark in grey. Markers, line
# styles and hatches say the same once more.
COLOURS = {"bad": "#E69F00", "good": "#0072B2"}
EDGES = {"bad": "#7A5200", "good": "#003F66"}
MARKERS, LINES, HATCHES = {"bad": "s", "good": "o"}, {"bad": "--", "good": "-"}, {"bad": "////", "good": "\\\\\\\\"}
SIDES = {"bad": -0.2, "good": 0.2}  # of a request's place on the axis; a bar is 0.38 wide
LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "kv-cache lessons",  # the same run gives the same bytes
}


class Row(NamedTuple):
    """One request of the main experiment."""

    request: int
    session: str | None
    worker: int | None
    prompt_tokens: int
    cached_tokens: int
    predicted: int
    ttft_ms: float | None  # None where the request failed
    error: str | None

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class Chart(NamedTuple):
    svg: Markup
    caption: str


def read_rows(result: dict, arm: str) -> list[Row]:
    """Return an arm's requests, in order. ValueError where the numbers of one cannot be."""
    rows = []
    for m in result["measurements"]:
        if m["experiment"] == "main" and m["arm"] == arm:
            error = None if m["error"] is None else str(m["error"])
            ttft_ms = float(m["ttft_ms"]) if error is None else None
            numbers = (m[key] for key in ("prompt_tokens", "cached_tokens", "predicted_cached_tokens"))
            row = Row(int(m["request"]), m["session"], m["worker"], *map(int, numbers), ttft_ms, error)
            if not 0 <= row.cached_tokens <= row.prompt_tokens:
                raise ValueError(f"{row.cached_tokens} of {row.prompt_tokens} tokens cached")
            if ttft_ms is not None and not 0 < ttft_ms < math.inf:
                raise ValueError(f"a TTFT of {ttft_ms} ms")
            rows.append(row)
    if len({(row.request, row.session) for row in rows}) < len(rows):
        raise ValueError("a request is there twice")
    return sorted(rows, key=lambda row: (row.request, str(row.session)))


def cleaned(value: Any) -> Any:
    """Return what a JSON file held with every control character and lone surrogate in its texts made visible."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return {shown(key): cleaned(item) for key, item in value.items()} if isinstance(value, dict) else value


# --- the charts ---


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return a figure as an element of the page, with a text for those who do not see it, and ids of its own."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg ") :].strip()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows what an svg is
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    attributes, content = svg.removeprefix("<svg ").split(">", 1)
    labels = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    texts = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return Markup(f"<svg {labels} {attributes}>{texts}{content}")


def new_chart(requests: list[int], what: str) -> tuple[Figure, Axes]:
    """Return a figure whose axis has a place for each request."""
    figure = Figure(figsize=(4.7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    every = math.ceil(len(requests) / 15)  # else the numbers run into each other
    axes.set_xticks(range(0, len(requests), every), [str(request) for request in requests[::every]])
    axes.set_xlim(-0.6, len(requests) - 0.4)
    axes.set_xlabel(what)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    return figure, axes


def draw_ttft(name: str, arms: dict[str, list[Row]], requests: list[int], what: str) -> Chart:
    """Draw every sample: request 0 hollow, a line at the median of the others."""
    figure, axes = new_chart(requests, what)
    handles, told = [], []
    for arm, rows in arms.items():
        colour, edge, marker = COLOURS[arm], EDGES[arm], MARKERS[arm]
        for place, request in enumerate(requests):
            times = [row.ttft_ms for row in rows if row.request == request and row.ttft_ms is not None]
            # Samples of one request stand beside each other, not behind.
            at = [place + SIDES[arm] + 0.3 * (k - (len(times) - 1) / 2) / max(len(times), 1) for k in range(len(times))]
            face = "white" if request == 0 else colour
            axes.plot(at, times, marker, markersize=5, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=0.9)
        median = statistics.median(row.ttft_ms for row in rows if row.request > 0 and row.ttft_ms is not None)
        axes.axhline(median, color=edge, linestyle=LINES[arm], linewidth=0.9, zorder=1)
        common = dict(marker=marker, color=edge, linestyle=LINES[arm], linewidth=0.9, markersize=5)
        label = f"{arm}, median {milliseconds(median)}"
        handles.append(Line2D([], [], markerfacecolor=colour, label=label, **common))
        told.append(label)
    hollow = dict(marker="o", color="none", markerfacecolor="white", markeredgecolor="#333333", markersize=5)
    handles.append(Line2D([], [], label=f"hollow: {what} 0 fills the cache", **hollow))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.15, high * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:,g} s" if value >= 1000 else f"{value:g} ms")
    )
    axes.set_ylabel("TTFT (log scale)")
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, handlelength=2.6)
    title = f"Time to first token per {what}, bad and good"
    samples = sum(row.ttft_ms is not None for rows in arms.values() for row in rows)
    caption = (
        f"TTFT per {what}: all {samples} samples of both arms. Lines: medians without {what} 0. The scale is "
        "logarithmic: equal distances are equal ratios."
    )
    return Chart(to_svg(figure, name, title, f"{'; '.join(told)}. The table below holds every value."), caption)


def draw_tokens(name: str, arms: dict[str, list[Row]], requests: list[int], what: str) -> Chart:
    """Draw a bar per request and arm: computed tokens, and on top of them the cached ones."""
    figure, axes = new_chart(requests, what)
    handles, told = [], []
    for arm, rows in arms.items():
        at = [place + SIDES[arm] for place in range(len(requests))]
        computed = [sum(row.computed_tokens for row in rows if row.request == request) for request in requests]
        cached = [sum(row.cached_tokens for row in rows if row.request == request) for request in requests]
        solid = dict(facecolor=COLOURS[arm], edgecolor=EDGES[arm], linewidth=0.7)
        hatched = dict(facecolor="white", edgecolor=EDGES[arm], linewidth=0.7, hatch=HATCHES[arm])
        axes.bar(at, computed, 0.38, **solid)
        axes.bar(at, cached, 0.38, bottom=computed, **hatched)
        handles += [Patch(**hatched, label=f"{arm}: cached"), Patch(**solid, label=f"{arm}: computed")]
        told.append(f"{arm}: {sum(computed):,} tokens computed, {sum(cached):,} cached")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("prompt tokens")
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    several = any(row.session is not None for rows in arms.values() for row in rows)
    caption = (
        f"Prompt tokens per {what}{', all sessions together' if several else ''}: bad on the left, good on the right."
    )
    title = f"Computed and cached prompt tokens per {what}, bad and good"
    return Chart(to_svg(figure, name, title, f"With {what} 0: {'; '.join(told)}."), caption)


# --- the texts ---


def as_list(value: Any) -> list:
    """Return what may be missing, one, or several, as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def break_text(found: dict) -> dict[str, str]:
    """Return where two bad prompts first differ, and the text around that in both."""
    before, after = map(str, found["texts"])
    lost = f"{found['blocks_lost']:,} of {found['blocks']:,} blocks lost"
    where = f"Two bad prompts first differ at token {found['token']:,} of {found['of']:,}: {lost}"
    return {"where": where, "before": before, "after": after}


def prediction_text(predicted: dict) -> dict[str, str]:
    answer = predicted["answer"]
    return {
        "question": str(predicted["question"]),
        "answer": "-" if answer is None else f"{answer:,}",
        "measured": f"{predicted['measured']:,}",
        "verdict": str(predicted["verdict"]),
        "why": str(predicted["why"]),
    }


def request_cells(row: Row | None, with_worker: bool) -> list[str]:
    """Return one arm's cells of the table of requests."""
    if row is None:
        return ["-"] * (2 + with_worker)
    counts = f"{row.cached_tokens:,} / {row.prompt_tokens:,}"
    if row.cached_tokens != row.predicted:
        counts += f" ({row.predicted:,} predicted)"
    time = f"failed: {row.error}" if row.ttft_ms is None else milliseconds(row.ttft_ms)
    return [time, counts, *([str(row.worker)] if with_worker else [])]


def request_table(arms: dict[str, list[Row]], what: str) -> dict[str, list]:
    """Return heads and rows of the table that holds every sample, two arms side by side."""
    every = [row for rows in arms.values() for row in rows]
    with_session = any(row.session is not None for row in every)
    with_worker = any(row.worker is not None for row in every)
    by_key = {arm: {(row.request, row.session): row for row in rows} for arm, rows in arms.items()}
    lines = []
    for request, session in sorted(
        {(row.request, row.session) for row in every}, key=lambda key: (key[0], str(key[1]))
    ):
        lines.append(
            {
                "names": [f"{request}{' (fill)' if request == 0 else ''}", *([str(session)] if with_session else [])],
                "arms": [request_cells(rows.get((request, session)), with_worker) for rows in by_key.values()],
            }
        )
    columns = ["TTFT", "cached / prompt", *(["worker"] if with_worker else [])]
    return {"heads": [what, *(["session"] if with_session else [])], "columns": columns, "lines": lines}


# Said of sessions: each request of both arms is the same one.
SAME_PROMPTS = "There is none: both arms send the same prompts, to different workers."


def arm_texts(arm: Arm) -> list[str]:
    spread = f"{milliseconds(min(arm.ttft_ms))} - {milliseconds(max(arm.ttft_ms))}"
    return [
        f"{arm.hit_rate:.1%}",
        milliseconds(arm.median_ms),
        spread,
        f"{arm.prompt_tokens:,}",
        f"{arm.computed_tokens:,}",
        f"${arm.dollars:.4f}",
    ]


def lesson_texts(run: LessonRun, at: int, common: dict) -> dict:
    """Return what the page shows of one lesson. `at`: its place in the run, which may hold a lesson twice."""
    texts = {"id": f"lesson-{at}", "name": LESSONS[run.number].name}
    texts["head"] = f"Lesson {run.number}: {LESSONS[run.number].title}"
    if run.result is None:
        return {**texts, "fault": f"no result: exit status {run.status} after {run.seconds:.0f} s"}
    result = cleaned(run.result)
    arms = {arm: read_rows(result, arm) for arm in ("bad", "good")}
    bad, good = (read_arm(result, arm) for arm in arms)
    requests = sorted({row.request for rows in arms.values() for row in rows})
    what = "turn" if any(row.session is not None for rows in arms.values() for row in rows) else "request"
    claims = [{key: claim[key] for key in ("claim", "holds", "evidence")} for claim in result["claims"]]
    predictions = [prediction_text(predicted) for predicted in as_list(result.get("predictions"))]
    environment = {key: value for key, value in result["environment"].items() if key not in common}
    return {
        **texts,
        "fault": "",
        "summary": {"bad": arm_texts(bad), "good": arm_texts(good)},
        "change": f"computed {good.computed_tokens / bad.computed_tokens - 1:+.0%}, cost "
        f"{good.dollars / bad.dollars - 1:+.0%}, {speed_up(bad, good, pair_ratios(result))}",
        "length": f"{result['environment']['prefix_tokens']:,} static tokens",
        "verdict": [str(line) for line in as_list(result.get("verdict"))],
        "no_break": SAME_PROMPTS if what == "turn" else "This run does not hold where two prompts first differ.",
        "breaks": [break_text(found) for found in as_list(result.get("break"))],
        "charts": [draw_ttft(f"ttft-{at}", arms, requests, what), draw_tokens(f"tokens-{at}", arms, requests, what)],
        "claims": claims,
        "held_of": f"{sum(bool(claim['holds']) for claim in claims)} of {len(claims)}",
        "predictions": predictions,
        "score": count_verdicts(Counter(predicted["verdict"] for predicted in predictions)),
        "requests": request_table(arms, what),
        "environment": {**environment, "seconds": ", ".join(f"{k} {v:.1f}" for k, v in result["seconds"].items())},
    }


def in_common(runs: list[LessonRun]) -> dict:
    """Return what the environments of all lessons agree in."""
    first, *others = [cleaned(run.result["environment"]) for run in runs if run.result] or [{}]
    return {key: value for key, value in first.items() if all(key in e and e[key] == value for e in others)}


def fill(template: str, **texts: object) -> str:
    """Return a page with its texts, each of them escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(texts)


def page(runs: list[LessonRun]) -> str:
    """Return the whole page, the same bytes for the same runs. A run that is none raises one of the runner's NO_RUN."""
    common = in_common(runs)
    with style.context(["default", LOOK]):  # and nothing of the reader's own matplotlibrc
        lessons = [lesson_texts(run, at, common) for at, run in enumerate(runs, 1)]
    prices = f"${PRICE_INPUT:.2f} per million tokens, cached ${PRICE_CACHED:.2f}"
    return fill(PAGE, title="KV-cache lessons: what was measured", lessons=lessons, common=common, prices=prices)


# --- the page ---

TOP = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --line: #d5d9de; --soft: #f5f6f8; --quiet: #555c66; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 3rem; background: #fff; color: #1b1f24;
       font: 1rem/1.5 system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 0 0 .2rem; }
header { margin-bottom: 1.4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet { color: var(--quiet); }
.lesson, .environment { border-top: 2px solid #1b1f24; margin-top: 2.2rem; padding-top: 1rem; }
.verdict { border-left: 4px solid #0072B2; background: var(--soft); padding: .5rem .8rem; max-width: 46rem; }
.failed { border-left: 4px solid #D55E00; padding-left: .8rem; font-weight: 600; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th[scope=row], .text, .words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.words th { vertical-align: top; }
.summary tbody tr:not(:last-child) > * { border-bottom: 0; }
.summary span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 3rem); white-space: normal; }
.FAILED { color: #a33d00; }
.next { padding-left: 1.2rem; border-left: 1px solid var(--line); }
pre { background: var(--soft); padding: .5rem .8rem; margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere;
      font: .85rem/1.45 ui-monospace, "Liberation Mono", "DejaVu Sans Mono", monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
figure { margin: .6rem 0 0; max-width: 38rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: .85rem; }
@media print {
  @page { margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .lesson, .environment { break-before: page; border-top: 0; margin-top: 0; padding-top: 0; }
  .scroll { overflow: visible; }
  .charts { grid-template-columns: 1fr 1fr; gap: 4mm; }
  table { font-size: 8pt; }
  th, td { padding: 1pt 5pt 1pt 0; }
  .requests th[scope=row] { font-weight: 400; }
  h3 { margin-top: 10pt; }
  figure, tr, pre, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .verdict, .failed { print-color-adjust: exact; }
}
"""

PAGE = (
    TOP
    + """\
</style>
</head>
<body>
<header>
<h1>KV-cache lessons: what was measured</h1>
{% if common.device is defined and common.model is defined and common.vllm is defined %}
<p class="quiet">vLLM {{ common.vllm }}, {{ common.model }}, {{ common.device }}</p>
{% endif %}
</header>
<main>
<h2>Summary</h2>
<p>Each lesson sends a badly and a well laid out prompt to a real engine. Request 0 of an arm fills the cache and is
left out of this table.</p>
<div class="scroll" tabindex="0" role="region" aria-label="summary">
<table class="summary">
<thead><tr><th class="text">lesson</th><th class="text">arm</th><th>hit rate</th><th>TTFT, median</th><th>range</th>
<th>prompt tokens</th><th>computed</th><th>cost</th></tr></thead>
{% for lesson in lessons %}
<tbody>
{% if lesson.fault %}
<tr><th scope="row"><a href="#{{ lesson.id }}">{{ lesson.name }}</a></th>
<td class="text" colspan="7">{{ lesson.fault }}</td></tr>
{% else %}
{% for arm, cells in lesson.summary.items() %}
<tr>
{% if loop.first %}
<th scope="row"><a href="#{{ lesson.id }}">{{ lesson.name }}</a></th>
{% else %}
<td class="text">{{ lesson.length }}</td>
{% endif %}
<td class="text">{{ arm }}</td>
{% for cell in cells %}
<td>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
<tr><td class="text quiet" colspan="8"><span>{{ lesson.held_of }} claims hold; {{ lesson.change }}</span></td></tr>
{% endif %}
</tbody>
{% endfor %}
</table>
</div>
<p class="quiet">TTFT is the client's clock from the call to the first streamed output. Cached tokens are those that
vLLM found in its KV cache, computed ones the rest of the prompt; the hit rate is cached by prompt tokens. Example
prices: {{ prices }}.</p>
{% for lesson in lessons %}
<section class="lesson" id="{{ lesson.id }}">
<h2>{{ lesson.head }}</h2>
<p class="quiet">{{ lesson.name }}.py</p>
{% if lesson.fault %}
<p class="failed">{{ lesson.fault }}</p>
{% else %}
<h3>Verdict</h3>
{% for line in lesson.verdict %}
<p class="verdict">{{ line }}</p>
{% else %}
<p class="quiet">This run does not hold the lesson's verdict.</p>
{% endfor %}
<p>Good against bad: {{ lesson.change }}.</p>
<div class="charts">
{% for chart in lesson.charts %}
<figure>
{{ chart.svg }}
<figcaption>{{ chart.caption }}</figcaption>
</figure>
{% endfor %}
</div>
<h3>The break</h3>
{% for found in lesson.breaks %}
<p>{{ found.where }}</p>
<pre>{{ found.before }}</pre>
<pre>{{ found.after }}</pre>
{% else %}
<p class="quiet">{{ lesson.no_break }}</p>
{% endfor %}
{% if lesson.predictions %}
<h3>Predicted before it was measured: {{ lesson.score }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="predictions">
<table class="words predictions">
<thead><tr><th>question</th><th>answer</th><th>measured</th><th>verdict</th><th>why</th></tr></thead>
<tbody>
{% for p in lesson.predictions %}
<tr><td>{{ p.question }}</td><td>{{ p.answer }}</td><td>{{ p.measured }}</td>
<td>{{ p.verdict }}</td><td>{{ p.why }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
<h3>Claims about token counts: {{ lesson.held_of }} hold</h3>
<div class="scroll" tabindex="0" role="region" aria-label="claims">
<table class="words claims">
<tbody>
{% for claim in lesson.claims %}
<tr{% if not claim.holds %} class="FAILED"{% endif %}><th scope="row">{{ "holds" if claim.holds else "FAILED" }}</th>
<td>{{ claim.claim }}</td><td>{{ claim.evidence }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<h3>Every sample</h3>
<div class="scroll" tabindex="0" role="region" aria-label="every sample">
<table class="requests">
<thead>
<tr>
<th colspan="{{ lesson.requests.heads | length }}"></th>
{% for arm in lesson.summary %}
<th class="text next" colspan="{{ lesson.requests.columns | length }}">{{ arm }}</th>
{% endfor %}
</tr>
<tr>
{% for head in lesson.requests.heads %}
<th class="text">{{ head }}</th>
{% endfor %}
{% for arm in lesson.summary %}
{% for head in lesson.requests.columns %}
<th{% if loop.first %} class="next"{% endif %}>{{ head }}</th>
{% endfor %}
{% endfor %}
</tr>
</thead>
<tbody>
{% for line in lesson.requests.lines %}
<tr>
{% for name in line.names %}
<th scope="row">{{ name }}</th>
{% endfor %}
{% for cells in line.arms %}
{% for cell in cells %}
<td{% if loop.first %} class="next"{% endif %}>{{ cell }}</td>
{% endfor %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<h3>This lesson's part of the environment</h3>
<table class="words">
<tbody>
{% for key, value in lesson.environment.items() %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</section>
{% endfor %}
<section class="environment">
<h2>Environment</h2>
<p class="quiet">What is the same in all lessons of this run.</p>
<table class="words">
<tbody>
{% for key, value in common.items() %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>
</section>
</main>
</body>
</html>
"""
)
