"""Why does my server miss: the prompt, the template, eviction or routing?

    python -m going_further.replay_request_log FILE
    python -m going_further.replay_request_log FILE --without-engine
    python -m going_further.replay_request_log FILE --without-engine \\
        --cache-tokens 200000 --replicas 4 --fail-under 60

Replays a log of requests and tells where each one stopped matching the cache.
FILE is what you have: requests of OpenAI's chat, Responses and completions
APIs or Anthropic's Messages API, batch input, logs of LiteLLM, Langfuse,
Helicone, OpenTelemetry or vLLM itself, ShareGPT, token ids, traces of hashes;
JSON lines, an array, gzip. vLLM's own code renders the requests. For each:
prompt tokens, cached tokens as predicted (and as measured, for they are sent
one at a time, in their order), and its best predecessor, the latest request
that shares most. Where the prompt departs from that one is told by message,
role, and field if it is in JSON. Last, what each kind of break has cost.

A token is lost if it stands behind a break, is the same as before, and was
computed again: another layout could have kept it. What stands too early is
named, with the hit rate of the same log with that behind the static part.

--without-engine does all but sending: for large logs, caches of any size, and
several replicas. Where a log tells what the server found, that stands beside
the prediction, and the difference is sorted by its reason. Time is linear in
tokens. Prompts wait in a temporary file; in memory are 64 of them, and some
100 bytes for each block that is known. All of it: docs/replay.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from going_further.common import (
    HERE,
    OUTPUT_TOKENS,
    LessonError,
    Run,
    UsageError,
    at_least,
    engine_parser,
    find_model,
    import_transformers,
    price,
    run_command,
    run_lesson,
    shown,
    telling_line,
    use_python_with_vllm,
    use_utf8,
    write_json,
)
from going_further.replay.advice import advise
from going_further.replay.analysis import Analysis, Options, analyse, block_size_of, notes_on
from going_further.replay.caches import route_log
from going_further.replay.logged import explain
from going_further.replay.output import (
    ROWS_SHOWN,
    groups_of,
    hit_rate,
    print_advice,
    print_groups,
    print_logged,
    print_notes,
    print_routing,
    print_row,
    print_sessions,
    print_summary,
    rows_to_show,
)
from going_further.replay.readers import read_log
from going_further.replay.rendering import Renderer
from going_further.replay.shapes import SHAPES

ONLY_WITHOUT_ENGINE = "cache_tokens", "ttl", "replicas", "speculative_config"


def options_of(args: argparse.Namespace) -> Options:
    return Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})


def print_findings(console, found: Analysis, args: argparse.Namespace) -> dict:
    """Print all that is found out without an engine beside the rows, and return it as it stands in the JSON."""
    rows, block_size = found.rows, found.comparer.block_size
    print_summary(console, rows, args.price_input, args.price_cached)
    advice = advise(found.comparer, rows)
    print_advice(console, advice)
    families, sessions = groups_of(rows, lambda row: f"line {row.family}"), groups_of(rows, lambda row: row.session)
    print_groups(console, "prompt family, by its first request", families)
    print_sessions(console, sessions)
    groups = groups_of(rows, lambda row: "(no value)" if row.group is None else row.group) if args.group_by else []
    print_groups(console, args.group_by or "", groups)
    logged = explain(rows, found.arrivals, block_size)
    if logged is not None:
        print_logged(console, logged)
    routing = []
    if args.replicas:
        drops = found.comparer.drops_last_block
        routing = route_log(found.arrivals, args.replicas, block_size, args.cache_tokens, args.ttl, drops)
        print_routing(console, routing, args.replicas)
    notes = notes_on(found)
    named = [str(model) for model in found.models if model]
    if named and not args.model:
        notes.append(f"the log names {named[0]}: give --model and --block-size as its server has them")
    if logged is not None and logged.block_size:
        notes.append(f"what the server found is always a multiple of {logged.block_size}: has it such blocks? "
                     f"give --block-size {logged.block_size}")  # fmt: skip
    print_notes(console, notes)
    return {
        "requests": rows,
        "hit_rate": hit_rate(rows),
        "advice": advice,
        "families": families,
        "sessions": sessions,
        "groups": groups,
        "routing": routing,
        "logged": logged,
        "left_out": found.left_out,
        "notes": notes,
    }


def without_engine(args: argparse.Namespace) -> int:
    """Analyse a log with the cache model alone and print the result; return the exit status."""
    from rich.console import Console

    console, path, options = Console(width=80, highlight=False, soft_wrap=True), Path(args.file), options_of(args)
    renderer, block_size = None, block_size_of(path, options)
    if block_size is None:
        block_size = args.block_size or 16
        import_transformers()  # a faulty environment is told of here
        name = find_model(args.model or str(HERE / "built_in_model" / "cpu"))
        renderer = Renderer(name, args.speculative_config, *template_of(args))
        renderer.check_rules()
    elif args.block_size not in (None, block_size):
        raise UsageError(f"this trace has blocks of {block_size} tokens, --block-size asks for {args.block_size}")
    found = analyse(path, renderer, block_size, options, console)
    whose = "" if renderer is None else f"template of {args.model or 'built_in_model/cpu'}, "
    console.print(shown(f"{whose}blocks of {block_size} tokens; nothing was sent"), markup=False, soft_wrap=False)
    console.print("[bold] line  prompt predicted  best predecessor")
    for row in rows_to_show(found.rows):
        print_row(console, row, None)
    result = print_findings(console, found, args)
    if args.json:
        model = None if renderer is None else args.model or "built_in_model/cpu"
        environment = {"model": model, "block_size": block_size}
        write_json(args.json, {"schema": 1, "lesson": "replay_request_log", "environment": environment, **result})
    return 1 if below(args, found) else 0


def template_of(args: argparse.Namespace) -> tuple[str | None, dict | None]:
    """Return the server's chat template and the defaults of its variables, as far as they are not the model's own."""
    text = None
    if args.chat_template:
        try:
            text = Path(args.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {args.chat_template}: {telling_line(error)}") from error
    return text, args.default_chat_template_kwargs


def below(args: argparse.Namespace, found: Analysis) -> bool:
    """Say whether the hit rate is below --fail-under, and print that."""
    rate = hit_rate(found.rows) * 100
    if args.fail_under is None or rate >= args.fail_under:
        return False
    print(f"replay_request_log: hit rate {rate:.1f} %, below {args.fail_under:g} %", file=sys.stderr, flush=True)
    return True


async def with_engine(run: Run) -> None:
    """Analyse the log, then send it request by request to an engine whose cache holds all of it."""
    path, args, model, options = Path(run.args.file), run.args, run.model, options_of(run.args)
    if block_size_of(path, options) is not None:
        raise UsageError("a trace of hashes has no prompts to be sent: use --without-engine")
    renderer = Renderer(model.name, None, *template_of(args))
    renderer.check_rules()
    # The engine is started without the hybrid manager.
    options = dataclasses.replace(options, disable_hybrid_kv_cache_manager=True)
    found = analyse(path, renderer, model.block_size, options, run.console)
    rows, comparer = found.rows, found.comparer
    run.environment["requests"] = len(rows)
    for row in rows:
        if row.prompt_tokens + OUTPUT_TOKENS > model.max_model_len:
            raise UsageError(f"line {row.line}: {row.prompt_tokens:,} tokens, the model takes {model.max_model_len:,}: "
                             "use --without-engine")  # fmt: skip
    for number, row in enumerate(rows):
        if not comparer.recall(number).is_read:
            raise UsageError(f"line {row.line} asks for prompt_logprobs, for which vLLM reads no cache: use "
                             "--without-engine")  # fmt: skip
    longest = found.longest
    if comparer.forgotten:
        raise LessonError("this log is too large to be sent: use --without-engine, or --limit N")
    prompts = math.ceil(len(comparer.owners) * model.block_size / longest) + 2
    check_memory(run, model.kv_bytes(prompts, longest))
    hits = [row for row in rows if row.predicted_cached_tokens]
    suffix = max((row.prompt_tokens - row.predicted_cached_tokens for row in hits), default=1)
    length = longest + OUTPUT_TOKENS
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,  # a prompt is computed in one step
            kv_cache_memory_bytes=model.kv_bytes(prompts, length),
            graph_tokens=suffix,
        )
    await run.warm_up(longest, suffix)
    run.print("[bold] line  prompt predicted  cached     TTFT  best predecessor")
    with run.timed("measuring"):
        for number, row in enumerate(rows):
            prompt = comparer.recall(number)
            salt = json.dumps(prompt.salt) if any(prompt.salt) else None
            m = await engine.ask(prompt.ids, "replay", "log", row.line, salt=salt)
            if len(rows) <= ROWS_SHOWN:
                print_row(run.console, row, (m.cached_tokens, m.ttft_ms))
    measured = run.measured("replay", "log")
    if len(rows) > ROWS_SHOWN:
        of_row = {id(row): (m.cached_tokens, m.ttft_ms) for m, row in zip(measured, rows, strict=True)}
        for row in rows_to_show(rows):
            print_row(run.console, row, of_row[id(row)])
    run.result |= print_findings(run.console, found, args)
    agree = sum(m.cached_tokens == row.predicted_cached_tokens for m, row in zip(measured, rows, strict=True))
    run.claim("the analysis and the engine agree", agree == len(rows), f"{agree} of {len(rows)} requests")
    if args.fail_under is not None:
        rate = hit_rate(rows) * 100
        claim = f"the hit rate is at least {args.fail_under:g} %"
        run.claim(claim, rate >= args.fail_under, f"{rate:.1f} %")


def check_memory(run: Run, kv_bytes: int) -> None:
    """Raise LessonError where the cache for a whole log does not fit; on a GPU vLLM itself finds out."""
    import psutil  # comes with vLLM

    free = psutil.virtual_memory().available
    if not run.model.on_gpu and kv_bytes > free:
        sizes = f"the KV of this log takes {kv_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise LessonError(f"{sizes}: use --without-engine, or --limit N")


def replay(args: argparse.Namespace) -> int:
    next(iter(read_log(Path(args.file), args.format, args.strict, 1)))  # a log that cannot be read is told at once
    if not args.without_engine:
        return run_lesson(args, with_engine)
    use_python_with_vllm()
    use_utf8()
    return without_engine(args)


def tokens(text: str) -> int:
    """Read a number of tokens, also as vLLM prints it, with commas."""
    return at_least(1)(text.replace(",", ""))


def percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage")
    return value


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it is no JSON object, like vLLM's option of that name takes")
    return value


def main() -> int:
    parser = engine_parser(__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="the log")
    add("--without-engine", action="store_true", help="analyse only, in blocks of 16 unless told")
    add("--limit", type=at_least(1), metavar="N", help="only the first N requests")
    add("--format", choices=[*SHAPES], metavar="SHAPE", help=f"if it is not recognised: {', '.join(SHAPES)}")
    add("--strict", action="store_true", help="refuse a log with a line that cannot be replayed")
    add("--session-field", metavar="PATH", help="where an entry names its session, like metadata.session_id")
    add("--group-by", metavar="PATH", help="a field, like metadata.tenant: hit rate for each of its values")
    add("--one-model", action="store_true", help="the models that the log names are one, under several names")
    add("--cache-tokens", type=tokens, metavar="N", help="a KV cache of N tokens, with vLLM's order of eviction")
    add("--ttl", type=at_least(1), metavar="SECONDS", help="forget what was not used for so long; needs times")
    add("--replicas", type=at_least(2, 1_000), metavar="N", help="compare ways of routing to N replicas")
    add("--speculative-config", type=json_object, metavar="JSON", help="as vLLM's option of that name")
    add("--chat-template", metavar="FILE", help="as vLLM's option of that name")
    add("--default-chat-template-kwargs", type=json_object, metavar="JSON", help="as vLLM's option of that name")
    add("--disable-hybrid-kv-cache-manager", action="store_true", help="as vLLM's option of that name")
    add("--fail-under", type=percent, metavar="PERCENT", help="exit status 1 if the hit rate is lower: for CI")
    add("--price-input", type=price, default=3.00, help="$ per million computed tokens (example: 3.00)")
    add("--price-cached", type=price, default=0.30, help="$ per million cached tokens (example: 0.30)")
    args = parser.parse_args()
    if args.json and args.json.exists() and Path(args.file).exists() and args.json.samefile(args.file):
        parser.error("--json names the log itself, which would be lost")
    for name in ONLY_WITHOUT_ENGINE:
        if getattr(args, name) is not None and not args.without_engine:
            parser.error(f"--{name.replace('_', '-')} needs --without-engine: it is computed, not measured")
    return run_command("replay_request_log", lambda: replay(args))


if __name__ == "__main__":
    sys.exit(main())
