"""What is printed of a replayed log, in 80 columns."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

from going_further.common import milliseconds, shown
from going_further.replay import logged as reasons
from going_further.replay.advice import Advice
from going_further.replay.caches import RoutingResult
from going_further.replay.comparing import Row
from going_further.replay.logged import Logged
from going_further.replay.records import count

ROWS_SHOWN = 200
GROUPS_SHOWN = 8


def cut(text: str) -> str:
    """Return what of a text fits into 80 columns; some characters take two."""
    from rich.cells import chop_cells

    return chop_cells(text, 80)[0]


def row_text(row: Row, measured: tuple[int, float] | None) -> str:
    cached = f" {measured[0]:>7,} {milliseconds(measured[1]):>8}" if measured else ""
    why = row.kind if row.predecessor is None else f"{row.kind}, line {row.predecessor}"
    return f"{row.line:>5} {row.prompt_tokens:>7,} {row.predicted_cached_tokens:>9,}{cached}  {why}"


def print_row(console, row: Row, measured: tuple[int, float] | None) -> None:
    console.print(shown(row_text(row, measured)), markup=False)
    if row.lost_tokens:
        where = f"{'':7}{row.where}, token {row.token:,}: {row.lost_tokens:,} tokens lost"
        console.print(shown(where), markup=False, soft_wrap=False)  # a log's names may be long
        for name, text in (("was", row.before), ("now", row.after)):
            console.print(cut(f"{'':9}{name} {text[-66:]!r}"), markup=False)


def rows_to_show(rows: list[Row]) -> list[Row]:
    """Return all rows of a short log, of a long one those that lost most."""
    if len(rows) <= ROWS_SHOWN:
        return rows
    return sorted(sorted(rows, key=lambda row: -row.lost_tokens)[:20], key=lambda row: row.line)


def share(found: int, sent: int) -> float:
    return found / sent if sent else 0.0


def hit_rate(rows: list[Row]) -> float:
    return share(sum(row.predicted_cached_tokens for row in rows), sum(row.prompt_tokens for row in rows))


def print_summary(console, rows: list[Row], price_input: float, price_cached: float) -> None:
    """Print what was computed, and what each kind of break has cost, at prices per million tokens."""
    prompt, cached = sum(row.prompt_tokens for row in rows), sum(row.predicted_cached_tokens for row in rows)
    sent, found = (
        f"{count(len(rows), 'request')}, {prompt:,} tokens",
        f"{cached:,} cached ({share(cached, prompt):.1%})",
    )
    console.print(f"\n{sent}, {found}, {prompt - cached:,} computed")
    answers = sum(row.answer_tokens for row in rows)
    if answers:
        more = f"{share(cached + answers, prompt):.1%}"
        console.print(f"with the answers kept that it wrote itself, a server finds {answers:,} more ({more})")
    evicted = sum(row.evicted_tokens for row in rows)
    if evicted:
        console.print(f"evicted or too old: {evicted:,} tokens that a cache without bounds would have found")
    console.print(f"[bold]{'kind':<32}{'requests':>10}{'tokens lost':>14}{'cost':>12}")
    counts, lost = Counter(row.kind for row in rows), Counter()
    for row in rows:
        lost[row.kind] += row.lost_tokens
    for kind, number in sorted(counts.items(), key=lambda item: (-lost[item[0]], -item[1])):
        dollars = lost[kind] * (price_input - price_cached) / 1e6
        console.print(f"{shown(kind):<32}{number:>10,}{lost[kind]:>14,}{f'${dollars:.4f}':>12}", markup=False)
    console.print("lost: stood behind a break, was the same as before, and was computed again")
    prices = f"${price_input:g} and ${price_cached:g} cached"
    console.print(f"cost: examples, {prices} a million (--price-input, --price-cached)")


def print_advice(console, advice: list[Advice]) -> None:
    from rich.cells import cell_len

    if not advice:
        return
    console.print("\n[bold]What stands too early[/], and the hit rate with it behind all else (replayed)")
    for place in advice:
        whose = f" in {place.families} prompt families" if place.families > 1 else ""
        head = f"{place.where}: {count(place.requests, 'request')}{whose}, {place.lost_tokens:,} tokens lost"
        console.print(shown(head), markup=False, soft_wrap=False)
        texts = [repr(text if len(text) <= 32 else f"{text[:32]}...") for text in place.texts]
        while len(texts) > 1 and cell_len(", ".join(texts)) > 74:
            texts = [*texts[:-2], "..."] if texts[-1] == "..." else [*texts[:-1], "..."]
        if texts:
            console.print(cut(f"  {', '.join(texts)}"), markup=False)
        if place.moved_hit_rate is not None and place.moved_hit_rate > place.hit_rate:
            rates = f"hit rate {place.hit_rate:.1%}, behind the static part {place.moved_hit_rate:.1%}"
            console.print(f"  {rates} ({count(place.replayed, 'request')} with such prompts)")
        elif place.texts:
            console.print("  moving it gains nothing" + ("" if place.hint else ": keep what was sent, and append"))
        if place.hint:
            console.print(f"  {place.hint}")


def groups_of(rows: list[Row], key) -> list[tuple[str, int, int, float]]:
    """Return name, requests, prompt tokens and hit rate of each group, the largest first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(key(row)), []).append(row)
    found = [(name, len(g), sum(row.prompt_tokens for row in g), hit_rate(g)) for name, g in groups.items()]
    return sorted(found, key=lambda group: -group[2])


def print_groups(console, title: str, groups: list[tuple[str, int, int, float]]) -> None:
    if len(groups) < 2:
        return
    console.print()
    head = f"{shown(title)[:39]:<40}{'requests':>10}{'tokens':>14}{'hit rate':>12}"
    console.print(head, style="bold", markup=False)
    for name, requests, tokens, rate in groups[:GROUPS_SHOWN]:
        console.print(f"{shown(name)[:39]:<40}{requests:>10,}{tokens:>14,}{rate:>12.1%}", markup=False)
    rest = groups[GROUPS_SHOWN:]
    if rest:
        middle = statistics.median(rate for *_, rate in rest)
        name, requests = f"{len(rest):,} more, in the median", sum(group[1] for group in rest)
        tokens = sum(group[2] for group in rest)
        console.print(f"{name:<40}{requests:>10,}{tokens:>14,}{middle:>12.1%}", markup=False)


def print_sessions(console, groups: list[tuple[str, int, int, float]]) -> None:
    """Print how hit rates are spread over the sessions that have more than one request."""
    several = sorted((rate, name) for name, requests, _, rate in groups if requests > 1)
    if len(several) < 2:
        return
    low, high = several[0], several[-1]
    middle = statistics.median(rate for rate, _ in several)
    console.print(f"\n{len(several):,} sessions of two requests or more: hit rate {middle:.1%} in the median, "
                  f"{low[0]:.1%} to {high[0]:.1%}")  # fmt: skip
    name = f"the session that begins at {low[1]}" if low[1].startswith("line ") else low[1]
    console.print(shown(f"lowest: {name}"[:80]), markup=False)


def print_routing(console, results: list[RoutingResult], replicas: int) -> None:
    console.print(f"\n[bold]{f'{replicas} replicas, the same log':<26}{'hit rate':>10}{'computed':>14}"
                  f"{'max / mean':>12}  requests each")  # fmt: skip
    for result in results:
        requests = " ".join(f"{number:,}" for number in result.requests[:4])
        requests += " ..." if len(result.requests) > 4 else ""
        spread = f"{result.spread:.2f}" if len(result.requests) > 1 else ""
        console.print(f"{result.policy:<26}{result.hit_rate:>10.1%}{sum(result.computed_tokens):>14,}{spread:>12}"
                      f"  {requests}"[:80], markup=False)  # fmt: skip
    console.print("max / mean: computed tokens of the busiest replica and of all; few sessions are")
    console.print("hashed unevenly; one cache: as large as those of all replicas together")
    for result in itertools.islice((r for r in results if r.too_long), 1):
        console.print(f"{count(result.too_long, 'request')} did not fit into a replica's cache")


def print_logged(console, found: Logged) -> None:
    """Print what the server said, beside the prediction, and why it computed the rest."""
    rate, predicted = (share(n, found.sent_tokens) for n in (found.found_tokens, found.predicted_tokens))
    console.print(f"\n[bold]Logged against predicted[/]: {count(found.requests, 'request')} with cached tokens")
    console.print(f"found {rate:.1%} of {found.sent_tokens:,} tokens, predicted {predicted:.1%}; computed, since")
    for reason in reasons.REASONS:
        tokens = found.computed[reason]
        if tokens:
            age = found.median_age(reason) if reason in found.ages else None
            seen = f", last used {age:,.0f} s before" if age is not None else ""
            console.print(f"  {reason + seen:<52}{found.affected[reason]:>8,}{tokens:>14,}")
    if found.surplus_tokens:
        console.print(f"  found beyond the prediction, known from before: {found.surplus_tokens:,} tokens")
    if found.unreported:
        console.print(f"not reported: {count(found.unreported, 'request')} (vLLM: --enable-prompt-tokens-details)")


def print_notes(console, notes: list[str]) -> None:
    if notes:
        console.print()
    for note in notes:
        console.print(shown(note), markup=False, soft_wrap=False)
