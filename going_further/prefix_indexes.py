"""Three indexes, one question: which part of this prompt is known?

    python -m going_further.prefix_indexes        an agent's conversation, and
                                                  users of one system prompt
    python -m going_further.prefix_indexes LOG    a log of your own, as
                                                  `replay_request_log` takes it

  (a) a hash over whole messages, tried from the longest list of messages down
  (b) a radix tree over token ids: its edges hold runs of tokens
  (c) a chain of block hashes: a block is its tokens and all blocks before it

Each gets the same requests in the same order and is asked before it is told.
What (c) finds must be what vLLM finds: the requests are sent to an engine as
well, one at a time. --without-engine leaves that out, for large logs.
Who keeps which: SGLang (b) (RadixAttention, Zheng et al. 2024); vLLM (c), and
no tree, whatever is told of it (its design documents, "Automatic Prefix
Caching"). (a) is what an application can keep by itself, above any engine.

Time is linear in tokens, and memory is bounded: every index forgets what was
not used for longest.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import hashlib
import heapq
import itertools
import json
import math
import statistics
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from going_further.common import (
    HERE,
    OUTPUT_TOKENS,
    LessonError,
    Run,
    at_least,
    clock,
    conversation,
    engine_parser,
    find_model,
    good_messages,
    import_transformers,
    report,
    run_command,
    run_lesson,
    shown,
    system_prompt,
    use_python_with_vllm,
    use_utf8,
    write_json,
)
from going_further.replay.analysis import prompts_in
from going_further.replay.comparing import shared
from going_further.replay.readers import read_log
from going_further.replay.records import Record
from going_further.replay.rendering import CannotRender, Renderer
from going_further.replay.rendering import Prompt as Rendered
from going_further.replay_request_log import check_memory

PROGRAM = "prefix_indexes"
BUILT_IN = HERE / "built_in_model" / "cpu"
LISTS_KEPT = 1_000_000  # of messages, by (a)
TOKENS_KEPT = 16_000_000  # by (b), and by (c) in blocks: 16 million tokens are a million blocks of 16
CONCLUSION = """\
(a) ends with the last message that is the same, (b) with the last token, (c)
with the last whole block before it. SGLang keeps (b), vLLM (c): it has no tree."""
TURNS, USERS, PROMPT_TOKENS = 10, 200, 2000  # of the workloads that are made here


class MessageHashes:
    """(a) For each list of messages that a prompt began with: how many tokens it was."""

    def __init__(self, lists_kept: int = LISTS_KEPT) -> None:
        self.lists_kept, self.evicted = lists_kept, 0
        self.tokens: OrderedDict[bytes, int] = OrderedDict()  # by hash, least recently used first

    @staticmethod
    def hashes(messages: list[dict]) -> list[bytes]:
        """Return the hash of the first message, of the first two, and so on. One pass: SHA-256 can be continued."""
        so_far, hashes = hashlib.sha256(), []
        for message in messages:
            so_far.update(json.dumps(message, sort_keys=True).encode() + b"\n")
            hashes.append(so_far.digest())
        return hashes

    def find(self, messages: list[dict]) -> int:
        for key in reversed(self.hashes(messages)):
            if key in self.tokens:
                self.tokens.move_to_end(key)
                return self.tokens[key]
        return 0

    def insert(self, messages: list[dict], ends: list[int | None]) -> None:
        """Remember every list that these messages begin with. `ends`: tokens up to the end of each, None if unknown."""
        for key, end in zip(self.hashes(messages), ends, strict=True):
            if end is not None:
                self.tokens[key] = end
                self.tokens.move_to_end(key)
        while len(self.tokens) > self.lists_kept:
            self.tokens.popitem(last=False)
            self.evicted += 1

    def __len__(self) -> int:
        return len(self.tokens)


class Node:
    """A node of the radix tree with the edge that leads to it."""

    __slots__ = ("children", "edge", "parent", "used")

    def __init__(self, edge: array, parent: Node | None, used: int) -> None:
        self.edge, self.parent, self.used = edge, parent, used
        self.children: dict[int, Node] = {}  # by the first token of their edges


class RadixTree:
    """(b) Token ids; prompts share the path from the root until they differ."""

    def __init__(self, tokens_kept: int = TOKENS_KEPT) -> None:
        self.tokens_kept, self.evicted = tokens_kept, 0
        self.root = Node(array("i"), None, 0)
        self.nodes = self.tokens = 0
        self.ticks = itertools.count(1)
        self.leaves: list[tuple[int, int, Node]] = []  # a heap by a use that may not be the last; each leaf once

    def walk(self, ids: array) -> tuple[Node, int, int]:
        """Return the last node on the way of `ids`, how much of its edge is on it, and how many tokens are in all."""
        node, on_edge, at, now = self.root, 0, 0, next(self.ticks)
        node.used = now
        while on_edge == len(node.edge) and at < len(ids) and ids[at] in node.children:
            node = node.children[ids[at]]
            node.used = now
            on_edge = shared(node.edge, ids[at : at + len(node.edge)])
            at += on_edge
        return node, on_edge, at

    def find(self, ids: array) -> int:
        _, _, known = self.walk(ids)
        return known

    def insert(self, ids: array) -> None:
        node, on_edge, at = self.walk(ids)
        if at == len(ids):
            return
        if on_edge < len(node.edge):
            node = self.split(node, on_edge)
        leaf = Node(ids[at:], node, node.used)
        node.children[ids[at]] = leaf
        self.nodes, self.tokens = self.nodes + 1, self.tokens + len(leaf.edge)
        heapq.heappush(self.leaves, (leaf.used, id(leaf), leaf))
        self.evict()

    def split(self, node: Node, at: int) -> Node:
        """Put a node into the edge that leads to `node`, after `at` tokens, and return it."""
        upper = Node(node.edge[:at], node.parent, node.used)
        node.parent.children[upper.edge[0]] = upper
        node.parent, node.edge = upper, node.edge[at:]
        upper.children[node.edge[0]] = node
        self.nodes += 1
        return upper

    def evict(self) -> None:
        """Remove the leaves that were not used for longest until the tokens fit."""
        while self.tokens > self.tokens_kept:
            used, _, leaf = heapq.heappop(self.leaves)
            if leaf.children:
                continue  # no leaf any more
            if leaf.used > used:  # used again since
                heapq.heappush(self.leaves, (leaf.used, id(leaf), leaf))
                continue
            parent = leaf.parent
            del parent.children[leaf.edge[0]]
            self.nodes, self.tokens = self.nodes - 1, self.tokens - len(leaf.edge)
            self.evicted += 1
            if not parent.children and parent is not self.root:
                heapq.heappush(self.leaves, (parent.used, id(parent), parent))

    def __len__(self) -> int:
        return self.nodes


class BlockHashes:
    """(c) Hashes of full blocks, each over the hash of the block before and the block's own tokens."""

    def __init__(self, block_size: int, tokens_kept: int = TOKENS_KEPT) -> None:
        self.block_size, self.blocks_kept, self.evicted = block_size, tokens_kept // block_size, 0
        self.blocks: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def chain(self, ids: array) -> Iterator[bytes]:
        parent = b""
        for end in range(self.block_size, len(ids) + 1, self.block_size):
            parent = hashlib.sha256(parent + ids[end - self.block_size : end].tobytes()).digest()
            yield parent

    def find(self, ids: array) -> int:
        known = list(itertools.takewhile(self.blocks.__contains__, self.chain(ids)))
        self.use(known)
        return len(known) * self.block_size

    def insert(self, ids: array) -> None:
        self.use(list(self.chain(ids)))
        while len(self.blocks) > self.blocks_kept:
            self.blocks.popitem(last=False)
            self.evicted += 1

    def use(self, chain: list[bytes]) -> None:
        for block in reversed(chain):  # so that of one prompt the last block is the first to be forgotten, as in vLLM
            self.blocks[block] = None
            self.blocks.move_to_end(block)

    def __len__(self) -> int:
        return len(self.blocks)


# --- what they are asked ---


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request as the indexes get it."""

    line: int
    messages: list[dict]  # the first one holds the tools as well, which stand before all
    ids: array
    ends: list[int | None]  # tokens up to the end of each message; None where the template does not take so few


def prompt_of(rendered: Rendered, renderer: Renderer) -> Prompt:
    """Find where the messages of a rendered request end. Without messages all of it is one."""
    text, offsets, ends = rendered.text, rendered.offsets, []
    if not rendered.messages or offsets is None:
        return Prompt(rendered.record.line, [{"tokens": rendered.ids}], array("i", rendered.ids), [len(rendered.ids)])
    characters = [end for _, end in offsets]
    for n in range(1, len(rendered.messages) + 1):
        try:
            beginning = renderer.write(rendered, rendered.messages[:n], answer=False)
        except CannotRender:
            ends.append(None)
            continue
        ends.append(bisect.bisect_right(characters, len(beginning)) if text.startswith(beginning) else None)
    about_all = {"tools": rendered.tools, "variables": rendered.variables}
    first, *others = rendered.messages
    return Prompt(rendered.record.line, [about_all | first, *others], array("i", rendered.ids), ends)


def made_here(count: Callable[[str], int]) -> dict[str, list[list[dict]]]:
    """Return the messages of three workloads; `count` counts the tokens of a text."""
    context, system = report("an agent", PROMPT_TOKENS, count), system_prompt(PROMPT_TOKENS, count)
    good = [good_messages(system, n) for n in range(USERS)]
    late_clock = []
    for n in range(USERS):
        timed = {"role": "system", "content": f"{system}\nThe time is {clock(n)}."}
        late_clock.append([timed, {"role": "user", "content": f"I am user {n}."}])
    return {
        f"an agent's conversation of {TURNS} turns": [conversation(context, turn) for turn in range(TURNS)],
        f"{USERS} users under one system prompt": good,
        "the same, but the system prompt ends with a clock": late_clock,
    }


# --- asking them ---


@dataclasses.dataclass
class Answers:
    """What one index found, and how long it took."""

    name: str
    index: MessageHashes | RadixTree | BlockHashes
    found: list[int] = dataclasses.field(default_factory=list)  # tokens, by request
    find_us: list[float] = dataclasses.field(default_factory=list)
    insert_us: list[float] = dataclasses.field(default_factory=list)

    def take(self, asked: tuple, told: tuple, most: int) -> None:
        """Look a request up, at most `most` tokens of it, then insert it."""
        began = time.perf_counter()
        found = self.index.find(*asked)
        between = time.perf_counter()
        self.index.insert(*told)
        self.insert_us.append((time.perf_counter() - between) * 1e6)
        self.find_us.append((between - began) * 1e6)
        self.found.append(min(found, most))


def ask_all(prompts: Iterable[Prompt], block_size: int) -> tuple[list[int], list[Answers]]:
    """Return how long each prompt is, and the answers of all three. A last token is always computed: nobody has it."""
    by_message, by_tree, by_block = (
        Answers("(a) hash of whole messages", MessageHashes()),
        Answers("(b) radix tree of tokens", RadixTree()),
        Answers("(c) chain of block hashes", BlockHashes(block_size)),
    )
    lengths = []
    for prompt in prompts:
        lengths.append(len(prompt.ids))
        most = len(prompt.ids) - 1
        by_message.take((prompt.messages,), (prompt.messages, prompt.ends), most)
        by_tree.take((prompt.ids[:most],), (prompt.ids,), most)
        by_block.take((prompt.ids[:most],), (prompt.ids,), most)
    return lengths, [by_message, by_tree, by_block]


def print_answers(console, title: str, tokens: list[int], answers: list[Answers], engine: list[int] | None) -> None:
    """Print what each index found, the engine last; `tokens` are the prompts' lengths."""
    sent = sum(tokens)
    console.print(f"\n[bold]{shown(title)}[/]: {len(tokens):,} requests, {sent:,} tokens")
    console.print(f"{'':<28}{'tokens found':>16}{'entries':>11}{'look-up':>11}{'insertion':>12}")
    for answer in answers:
        found = sum(answer.found)
        times = f"{statistics.median(answer.find_us):>8,.0f} us{statistics.median(answer.insert_us):>9,.0f} us"
        console.print(f"{answer.name:<28}{found:>9,}{found / sent:>7.1%}{len(answer.index):>11,}{times}")
        if answer.index.evicted:
            console.print(f"  {answer.index.evicted:,} entries were evicted, least recently used first")
    by_message, by_tree, _ = (answer.found for answer in answers)
    false = sum(max(0, a - b) for a, b in zip(by_message, by_tree, strict=True))
    if false:
        console.print(f"  {false:,} tokens that (a) finds are others: equal JSON, rendered in another way")
    if engine is not None:
        console.print(f"{'vLLM: num_cached_tokens':<28}{sum(engine):>9,}{sum(engine) / sent:>7.1%}")


def as_json(title: str, tokens: list[int], answers: list[Answers], engine: list[int] | None) -> dict:
    indexes = [
        {"name": a.name, "found": a.found, "entries": len(a.index), "evicted": a.index.evicted,
         "find_us": a.find_us, "insert_us": a.insert_us}
        for a in answers
    ]  # fmt: skip
    return {"workload": title, "prompt_tokens": tokens, "indexes": indexes, "engine_cached_tokens": engine}


def workloads(args: argparse.Namespace, renderer: Renderer) -> dict[str, Callable[[], Iterator[Prompt]]]:
    """Return, by title, what makes the prompts of a workload; a log is read anew each time and need not fit."""
    if args.file:
        path = Path(args.file)
        return {path.name: lambda: (prompt_of(prompt, renderer) for prompt in prompts_in(path, renderer, args.limit))}

    def count(text: str) -> int:
        return len(renderer.tokens(text))

    def prompts_of(conversations: list[list[dict]]) -> Iterator[Prompt]:
        for line, messages in enumerate(conversations, start=1):
            yield prompt_of(renderer.prompt(Record(line, "chat", {"messages": messages}, {})), renderer)

    made = made_here(count)
    return {title: lambda messages=messages: prompts_of(messages) for title, messages in made.items()}


def without_engine(args: argparse.Namespace) -> int:
    from rich.console import Console

    import_transformers()  # a faulty environment is told of here
    console = Console(width=80, highlight=False, soft_wrap=True)
    renderer = Renderer(find_model(args.model or str(BUILT_IN)))
    block_size, results = args.block_size or 16, []
    console.print(f"blocks of {block_size} tokens, nothing was sent")
    for title, prompts in workloads(args, renderer).items():
        tokens, answers = ask_all(prompts(), block_size)
        print_answers(console, title, tokens, answers, None)
        results.append(as_json(title, tokens, answers, None))
    console.print(f"\n{CONCLUSION}")
    if args.json:
        environment = {"model": args.model or "built_in_model/cpu", "block_size": block_size}
        write_json(args.json, {"schema": 1, "lesson": PROGRAM, "environment": environment, "workloads": results})
    return 0


async def with_engine(run: Run) -> None:
    """Ask the indexes, send the same prompts to vLLM, and hold (c) against what it found."""
    model, args = run.model, run.args
    makers = workloads(args, Renderer(model.name))
    asked, longest, blocks = {}, 0, 0
    for title, prompts in makers.items():
        tokens, answers = ask_all(prompts(), model.block_size)
        asked[title] = tokens, answers
        longest, blocks = max(longest, *tokens), max(blocks, len(answers[-1].index))
        if answers[-1].index.evicted:
            raise LessonError("this log is too large to be sent: use --without-engine, or --limit N")
    length = longest + OUTPUT_TOKENS
    model.check_length(length)
    room = model.kv_bytes(math.ceil(blocks * model.block_size / longest) + 2, length)
    check_memory(run, room)
    with run.timed("engine_start", "Starting vLLM..."):
        engine = run.start_engine(
            enable_prefix_caching=not args.no_prefix_caching,
            max_model_len=length,
            max_num_batched_tokens=length,
            kv_cache_memory_bytes=room,  # nothing is evicted
            graph_tokens=model.block_size,
        )
    await run.warm_up(longest, model.block_size)
    run.result["workloads"] = []
    for title, (tokens, answers) in asked.items():
        await engine.reset()
        with run.timed("measuring"):
            for prompt in makers[title]():
                await engine.ask(prompt.ids.tolist(), title, "vllm", prompt.line)
        found = [m.cached_tokens for m in run.measured(title, "vllm")]
        print_answers(run.console, title, tokens, answers, found)
        run.result["workloads"].append(as_json(title, tokens, answers, found))
        _, by_tree, by_block = (answer.found for answer in answers)
        equal = sum(a == b for a, b in zip(by_block, found, strict=True))
        run.claim(f"{title}: (c) finds what vLLM finds", equal == len(found), f"{equal} of {len(found)} requests")
        floors = sum(model.whole_blocks(b) == c for b, c in zip(by_tree, by_block, strict=True))
        evidence = f"{floors} of {len(found)} requests"
        run.claim(f"{title}: (b) in whole blocks is (c)", floors == len(found), evidence)
    run.print(f"\n{CONCLUSION}")


def ask_indexes(args: argparse.Namespace) -> int:
    if args.file:
        next(read_log(Path(args.file), limit=1))  # a log that cannot be read is told at once
    if not args.without_engine:
        return run_lesson(args, with_engine)
    use_python_with_vllm()
    use_utf8()
    return without_engine(args)


def main() -> int:
    parser = engine_parser(__doc__)
    parser.add_argument("file", metavar="LOG", nargs="?", help="a log of chat requests (default: workloads made here)")
    parser.add_argument("--without-engine", action="store_true", help="ask only, in blocks of 16 unless told")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N requests of the log")
    args = parser.parse_args()
    if args.json and args.file and args.json.exists() and Path(args.file).exists() and args.json.samefile(args.file):
        parser.error("--json names the log itself, which would be lost")
    return run_command(PROGRAM, lambda: ask_indexes(args))


if __name__ == "__main__":
    sys.exit(main())
