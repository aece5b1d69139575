"""One page about a replayed log: what `run_all_examples.py --show FILE --report PATH` writes of the replayer's JSON.

It is made like report.py's page, and has a section for everything that the file holds something for. The file may come
from anybody: a number that cannot be is refused, a long text is cut, and of a long table the first rows are shown.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from report import COLOURS, EDGES, HATCHES, LOOK, TOP, Chart, cleaned, fill, new_chart, to_svg
from run_all_examples import milliseconds, replay_head, whole

ROWS_SHOWN = 20  # of a table
BARS = 100
LONGEST = 300  # characters of a text
# Three greys: dark, hatched on a lighter one, white.
LOOKS = {
    "found": dict(facecolor=COLOURS["good"], edgecolor=EDGES["good"]),
    "lost": dict(facecolor=COLOURS["bad"], edgecolor=EDGES["bad"], hatch=HATCHES["bad"]),
    "computed otherwise": dict(facecolor="white", edgecolor="#555C66"),
}


class Request(NamedTuple):
    """One request of the log."""

    line: int
    prompt_tokens: int
    found: int
    lost: int
    answer: int
    evicted: int
    kind: str
    where: str
    token: int
    predecessor: int | None
    texts: list[str]  # the predecessor's and its own, where they first differ


# --- what a file may hold ---


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def items(value: Any) -> list:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return value


def amount(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e15:
        raise ValueError(f"{value!r:.40} is no amount")
    return value


def rate(value: Any) -> float:
    if amount(value) > 1:
        raise ValueError(f"{value!r:.40} is no hit rate")
    return value


def share(part: int, of: int) -> str:
    return f"{part / of if of else 0:.1%}"


def read_requests(result: dict) -> list[Request]:
    """Return the requests in the order of the log. ValueError where the numbers of one cannot be."""
    keys = "line", "prompt_tokens", "predicted_cached_tokens", "lost_tokens", "answer_tokens", "evicted_tokens"
    rows = []
    for row in items(result["requests"]):
        before = None if row["predecessor"] is None else whole(row["predecessor"])
        what = text(row["kind"]), text(row["where"]), whole(row["token"]), before
        rows.append(Request(*(whole(row[key]) for key in keys), *what, [text(row["before"]), text(row["after"])]))
        if rows[-1].found + rows[-1].lost > rows[-1].prompt_tokens:
            raise ValueError(f"line {rows[-1].line}: more tokens found and lost than there are")
    found, sent = sum(row.found for row in rows), sum(row.prompt_tokens for row in rows)
    if not math.isclose(rate(result["hit_rate"]), found / sent, abs_tol=1e-6):
        raise ValueError(f"a hit rate of {result['hit_rate']}, but {found:,} of {sent:,} tokens found")
    return rows


# --- the chart ---


def draw_requests(rows: list[Request]) -> Chart:
    """Draw a bar for each request, or for some that follow each other: what was found, lost, and computed otherwise."""
    size = math.ceil(len(rows) / BARS)
    bars = [rows[at : at + size] for at in range(0, len(rows), size)]
    lines = [str(bar[0].line) for bar in bars]
    figure, axes = new_chart([bar[0].line for bar in bars], "line of the log")
    every = math.ceil(len(bars) * (max(map(len, lines)) + 2) / 50)  # some 50 digits fit
    axes.set_xticks(range(0, len(bars), every), lines[::every])
    base, told, handles = [0.0] * len(bars), [], []
    for name, look in LOOKS.items():
        tokens = {"found": [r.found for r in rows], "lost": [r.lost for r in rows]}.get(name)
        tokens = tokens or [row.prompt_tokens - row.found - row.lost for row in rows]
        heights = [sum(tokens[at * size : (at + 1) * size]) / len(bar) for at, bar in enumerate(bars)]
        axes.bar(range(len(bars)), heights, 0.8, bottom=base, linewidth=0.7 if len(bars) <= 50 else 0.3, **look)
        base = [low + height for low, height in zip(base, heights, strict=True)]
        handles.append(Patch(**look, linewidth=0.7, label=name))
        told.append(f"{name} {sum(tokens):,}")
    axes.set_ylim(0, max(base) * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("prompt tokens" if size == 1 else "prompt tokens, mean of a bar")
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
    per = "per request" if size == 1 else f"per request, {size:,} requests a bar, named by the first"
    caption = f"Prompt tokens {per}. Lost: stood behind a break, the same as before, and computed again."
    description = f"Tokens: {', '.join(told)}."
    return Chart(to_svg(figure, "requests", "Prompt tokens found, lost and computed otherwise", description), caption)


# --- the tables ---


def some(rows: list) -> dict[str, Any]:
    return {"rows": rows[:ROWS_SHOWN], "more": len(rows) - ROWS_SHOWN}


def table(heads: list[str], rows: list[list]) -> dict[str, Any]:
    """Return a table for the page. A cell that is a list holds texts, one a line."""
    is_text = [isinstance(cell, list) for cell in rows[0]] if rows else [False] * len(heads)
    return {"heads": list(map(list, zip(heads, is_text, strict=True))), **some(rows)}


def kinds_table(rows: list[Request]) -> dict[str, Any]:
    counts, lost = Counter(row.kind for row in rows), Counter()
    for row in rows:
        lost[row.kind] += row.lost
    kinds = sorted(counts, key=lambda kind: (-lost[kind], -counts[kind], kind))
    return table(["kind", "requests", "tokens lost"], [[k, f"{counts[k]:,}", f"{lost[k]:,}"] for k in kinds])


def advice_rows(places: list[dict]) -> list[list]:
    return [
        [
            text(place["where"]),
            f"{whole(place['requests']):,}",
            f"{whole(place['lost_tokens']):,}",
            f"{rate(place['hit_rate']):.1%}",
            "-" if place["moved_hit_rate"] is None else f"{rate(place['moved_hit_rate']):.1%}",
            f"{whole(place['replayed']):,}",
            [text(line) for line in [*items(place["texts"])[:ROWS_SHOWN], place["hint"]] if line],
        ]
        for place in items(places)
    ]


def read_groups(groups: list[list], least: int = 1) -> list[tuple[str, int, int, float]]:
    """Return those groups that have at least so many requests."""
    found = [(text(name), whole(requests), whole(tokens), rate(r)) for name, requests, tokens, r in items(groups)]
    return [group for group in found if group[1] >= least]


def group_rows(groups: list[tuple[str, int, int, float]]) -> list[list]:
    """Return the rows of a table, none for a single group: that is the whole log."""
    rows = [[name, f"{requests:,}", f"{tokens:,}", f"{hits:.1%}"] for name, requests, tokens, hits in groups]
    return rows if len(rows) > 1 else []


def spread_text(sessions: list[tuple[str, int, int, float]]) -> str:
    if len(sessions) < 2:
        return ""
    rates = sorted((hits, name) for name, _, _, hits in sessions)
    middle = f"{len(rates):,} sessions, hit rate {statistics.median(hits for hits, _ in rates):.1%} in the median"
    return f"{middle}, {rates[0][0]:.1%} to {rates[-1][0]:.1%}; lowest: {rates[0][1]}."


def reason_rows(logged: dict) -> list[list]:
    """Return why the server computed tokens, most first."""
    rows = []
    tokens = {text(reason): whole(count) for reason, count in logged["computed"].items()}
    for reason in sorted(tokens, key=lambda reason: -tokens[reason]):
        ages = [amount(age) for age in items(logged["ages"].get(reason, []))]
        used = f", last used {statistics.median(ages):,.0f} s before" if ages else ""
        rows.append([reason + used, f"{whole(logged['affected'][reason]):,}", f"{tokens[reason]:,}"])
    return rows


def routing_row(policy: dict) -> list:
    sent, found = whole(policy["sent_tokens"]), whole(policy["found_tokens"])
    computed, requests = ([whole(n) for n in items(policy[key])] for key in ("computed_tokens", "requests"))
    if found > sent:
        raise ValueError(f"{found:,} of {sent:,} tokens found")
    spread = f"{max(computed) * len(computed) / sum(computed):.2f}" if len(computed) > 1 and sum(computed) else "-"
    each = " ".join(f"{n:,}" for n in requests[:4]) + (" ..." if len(requests) > 4 else "")
    too_long = f"{whole(policy['too_long']):,}"
    return [text(policy["policy"]), share(found, sent), f"{sum(computed):,}", spread, each, too_long]


def lost_text(row: Request) -> dict[str, Any]:
    before = "" if row.predecessor is None else f", best predecessor line {row.predecessor}"
    place = f"Line {row.line}: {row.where}, token {row.token:,}: {row.lost:,} tokens lost"
    return {"where": f"{place} ({row.kind}{before})", "texts": row.texts}


def measured_text(result: dict) -> str:
    """Return what an engine found of the log."""
    sent = [m for m in items(result["measurements"]) if (m["experiment"], m["arm"]) == ("replay", "log")]
    prompt, cached = (sum(whole(m[key]) for m in sent) for key in ("prompt_tokens", "cached_tokens"))
    times = [amount(m["ttft_ms"]) for m in sent if m["error"] is None]
    ttft = f", TTFT {milliseconds(statistics.median(times))} in the median" if times else ""
    return f"Sent to the engine: {len(sent):,}; {cached:,} tokens found ({share(cached, prompt)}){ttft}."


def claim_row(claim: dict) -> list:
    if not isinstance(claim["holds"], bool):
        raise TypeError(f"{claim['holds']!r:.40} is neither true nor false")
    return [text(claim["claim"]), "holds" if claim["holds"] else "FAILED", [text(claim["evidence"])]]


def sections(result: dict) -> list[dict[str, Any]]:
    """Return those parts of the page that there is something for: a table, and a line above and one below it."""
    found = []

    def add(title: str, heads: list[str], lines: list[list], above: str = "", below: str = "") -> None:
        if lines or above:
            found.append({"title": title, "table": table(heads, lines), "above": above, "below": below})

    places = advice_rows(result["advice"])
    heads = ["place", "requests", "tokens lost", "hit rate", "behind the static part", "replayed", "what changes"]
    below = (
        "Hit rates of the requests with such prompts, as they are and with what changes behind all else: both replayed."
    )
    add("What stands too early", heads, places, "", below)

    families, groups = (read_groups(result[key]) for key in ("families", "groups"))
    sessions = read_groups(result["sessions"], least=2)
    heads = ["requests", "tokens", "hit rate"]
    add("Prompt families", ["its first request", *heads], group_rows(families))
    add("Sessions of two requests or more", ["session", *heads], group_rows(sessions), spread_text(sessions))
    add("Groups", ["--group-by", *heads], group_rows(groups))

    if (logged := result["logged"]) is not None:
        keys = "requests", "unreported", "sent_tokens", "found_tokens", "predicted_tokens", "surplus_tokens"
        requests, silent, sent, hits, predicted, surplus = (whole(logged[key]) for key in keys)
        above = f"The server found {share(hits, sent)} of {sent:,} tokens in {requests:,} requests, predicted were "
        above += f"{share(predicted, sent)}. Why it computed the rest:"
        below = f"Found beyond the prediction, known from before: {surplus:,} tokens. " if surplus else ""
        below += f"Requests of which it does not say what it found: {silent:,}." if silent else ""
        add("Logged against predicted", ["reason", "requests", "tokens"], reason_rows(logged), above, below)

    below = "max / mean: computed tokens of the busiest replica and of all. Left out: too long for a replica's cache."
    heads = ["policy", "hit rate", "computed", "max / mean", "requests each", "left out"]
    add(
        "Several replicas, the same log", heads, [routing_row(policy) for policy in items(result["routing"])], "", below
    )

    if "measurements" in result:
        claims = [claim_row(claim) for claim in items(result["claims"])]
        add("Measured", ["claim", "", "evidence"], claims, measured_text(result))
    return found


def page(result: dict) -> str:
    """Return the whole page, the same bytes for the same file. One that is none raises one of the runner's NO_RUN."""
    rows = read_requests(result)
    prompt, found, answer, evicted = (
        sum(getattr(row, name) for row in rows) for name in ("prompt_tokens", "found", "answer", "evicted")
    )
    head = [f"{replay_head(result)}."]
    if answer:
        more = share(found + answer, prompt)
        head.append(f"Where the engine wrote the answers itself: {answer:,} tokens more ({more}).")
    if evicted:
        head.append(f"Evicted or too old: {evicted:,} tokens that a cache without bounds would have found.")
    environment = {text(key): text(str(value)) for key, value in result["environment"].items()}
    for key, value in result.get("seconds", {}).items():
        environment[f"seconds: {text(key)}"] = f"{amount(value):.1f}"
    most = sorted((row for row in rows if row.lost), key=lambda row: -row.lost)[:ROWS_SHOWN]
    notes = [text(note) for note in items(result["notes"])]
    left_out = [f"line {whole(entry['line'])}: {text(entry['reason'])}" for entry in items(result["left_out"])]
    texts = {
        "head": head,
        "lists": {"Notes": some(notes), "Left out": some(left_out)},
        "kinds": kinds_table(rows),
        "sections": sections(result),
        "most": [lost_text(row) for row in most],
        "environment": environment,
    }
    with style.context(["default", LOOK]):
        chart = draw_requests(rows)
    return fill(PAGE, title="A replayed log: what a prefix cache finds of it", chart=chart, **cleaned(texts))


PAGE = (
    TOP
    + """\
.replay h2 { margin: 1.8rem 0 .4rem; }
.replay figure { margin-top: 0; }
.replay th, .replay td { vertical-align: top; }
.replay tbody th { font-weight: 400; min-width: 9rem; }
.replay tbody th, .long { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.long { min-width: 12rem; }
.charts > * { min-width: 0; }
.break p { max-width: none; margin-top: .9rem; }
@media print {
  .replay h2 { margin-top: 12pt; font-size: 12pt; }
  .long { min-width: 4rem; }
  .break { break-inside: avoid; }
}
</style>
</head>
<body class="replay">
{% macro rest(more) %}
{% if more > 0 %}
<p class="quiet">and {{ "{:,}".format(more) }} more</p>
{% endif %}
{% endmacro %}
{% macro show(table, label) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}">
<table>
<thead>
<tr>
{% for head, is_text in table.heads %}
<th{% if is_text or loop.first %} class="text"{% endif %}>{{ head }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row">{{ cell }}</th>
{% elif cell is string %}
<td>{{ cell }}</td>
{% else %}
<td class="long">{% for text in cell %}{{ text }}{% if not loop.last %}<br>{% endif %}{% endfor %}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{{ rest(table.more) }}
{% endmacro %}
<header>
<h1>{{ title }}</h1>
{% for line in head %}
<p>{{ line }}</p>
{% endfor %}
</header>
<main>
<div class="charts">
<figure>
{{ chart.svg }}
<figcaption>{{ chart.caption }}</figcaption>
</figure>
<div>
{{ show(kinds, "kinds") }}
</div>
</div>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.above %}
<p>{{ section.above }}</p>
{% endif %}
{% if section.table.rows %}
{{ show(section.table, section.title) }}
{% endif %}
{% if section.below %}
<p class="quiet">{{ section.below }}</p>
{% endif %}
{% endfor %}
{% for title, list in lists.items() if list.rows %}
<h2>{{ title }}</h2>
{% for line in list.rows %}
<p>{{ line }}</p>
{% endfor %}
{{ rest(list.more) }}
{% endfor %}
{% if most %}
<h2>Requests that lost most</h2>
<p class="quiet">Above the text around the first token that differs in the predecessor, below that in the request.</p>
{% for row in most %}
<div class="break">
<p>{{ row.where }}</p>
{% for text in row.texts %}
<pre>{{ text }}</pre>
{% endfor %}
</div>
{% endfor %}
{% endif %}
<h2>Environment</h2>
<table class="words">
<tbody>
{% for key, value in environment.items() %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>
</main>
</body>
</html>
"""
)
