"""Comparing requests of a log: where each departs from its predecessor, and what another layout would have kept."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.models import write_llama, write_model
from rich.console import Console

from going_further.common import CacheModel
from going_further.replay import comparing
from going_further.replay.advice import Advice, advise
from going_further.replay.comparing import (
    DROPPED,
    OTHERWISE,
    REWRITTEN,
    Comparer,
    Row,
    describe,
    equal_parts,
    first_difference,
    json_around,
    shared,
    units,
)
from going_further.replay.output import print_advice
from going_further.replay.records import Record
from going_further.replay.rendering import Renderer

ROOT = Path(__file__).parent.parent
BUILT_IN = ROOT / "built_in_model" / "cpu"
FIELD = Path(__file__).parent / "field"
BLOCK = 16


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def result(text: str, **more: object) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": "c"} | more


def calling(arguments: dict, call_id: str = "c", **more: object) -> dict:
    function = {"name": "get_order", "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "type": "function",
            "function": function}]} | more  # fmt: skip


def tool(name: str, **properties: object) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def rules(number: int = 40) -> str:
    return " ".join(f"Rule {n}: the desk answers kindly, checks {n} lamps and names a price." for n in range(number))


SYSTEM, USER, ANSWER, NEXT = (
    system("You are an agent. " + rules(8)),
    user("Begin with the first task, which is about lamps of all kinds. " * 4),
    said("I have begun with the tall lamps, and go on with the small ones. " * 4),
    user("Go on, please, with whatever comes next in your list. " * 4),
)
OTHER = user("Something else that nobody has asked before, about chairs. " * 4)
TOOLS = [tool("get_order"), tool("refund")]


@pytest.fixture(scope="module")
def renderer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Renderer]:
    """Make the renderer of a model, once for each; a template makes a Llama with it."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def renderer(name: str, template: str | None = None) -> Renderer:
        if name not in made:
            path = write_model(folder / name, name, template)
            made[name] = Renderer(str(path))
        return made[name]

    return renderer


@pytest.fixture(params=["built-in", "llama"])
def renderer(request: pytest.FixtureRequest, renderer_of) -> Renderer:
    return renderer_of(request.param)


def body(*messages: dict, **fields: object) -> dict:
    return {"messages": list(messages), **fields}


def windows(messages: int) -> list[dict]:
    """Return requests of three conversations at once, under one system prompt: each sends its last messages only."""
    sent = []
    for turn in range(4):
        for about in ("lamps", "chairs", "tables"):
            chat = []
            for n in range(turn + 1):
                chat += [
                    user(f"Question {n} on {about}: " + "which of them is it? " * 12),
                    said(f"Answer {n}: " + "all of them. " * 30),
                ]
            sent.append(body(SYSTEM, *chat[:-1][-messages:]))
    return sent


def test_a_conversation_of_which_only_the_last_messages_are_sent_is_found_again(renderer: Renderer) -> None:
    _, rows = add_all(renderer, windows(3))
    for row in rows[6:]:
        assert (row.kind, row.predecessor) == ("message removed", row.line - 3)
        assert row.lost_tokens > 0


def test_among_requests_that_share_as_much_one_of_the_same_session_comes_before(renderer: Renderer) -> None:
    comparer = Comparer(renderer, BLOCK)
    for line, request in enumerate(windows(1), start=1):
        row, _ = comparer.add(renderer.prompt(Record(line, "chat", request, {})), f"session {line % 3}")
        assert line <= 3 or row.predecessor == line - 3


def add_all(
    renderer: Renderer, bodies: Sequence[dict], block_size: int = BLOCK, answers: dict[int, dict] | None = None
) -> tuple[Comparer, list[Row]]:
    """Compare requests of the chat API; their lines are counted from 1."""
    comparer, rows = Comparer(renderer, block_size), []
    for line, fields in enumerate(bodies, start=1):
        record = Record(line, "chat", fields, fields, answer=(answers or {}).get(line))
        rows.append(comparer.add(renderer.prompt(record))[0])
    return comparer, rows


def found_break(renderer: Renderer, before: dict, after: dict) -> tuple[str, str]:
    prompts = [renderer.prompt(Record(1, "chat", fields, fields)) for fields in (before, after)]
    found = describe(*prompts, renderer)
    return found.kind, found.where


def length(renderer: Renderer, *messages: dict) -> int:
    """Return how many tokens messages add at the end of a prompt."""
    ends = [renderer.prompt(Record(1, "chat", b, b)).ids for b in (body(SYSTEM), body(SYSTEM, *messages))]
    return len(ends[1]) - len(ends[0])


# --- kinds ---


@pytest.mark.parametrize(
    ("before", "after", "kind", "where"),
    [
        (body(SYSTEM, USER), body(SYSTEM, USER, ANSWER, NEXT), "extended", ""),
        (body(SYSTEM, USER), body(SYSTEM, USER), "same prompt", ""),
        (body(SYSTEM, USER, ANSWER), body(SYSTEM, USER), "shortened", "message 2 was left out"),
        (body(SYSTEM, USER), body(SYSTEM, NEXT, USER), "message inserted", "message 1 (user)"),
        (body(SYSTEM, USER, ANSWER, NEXT), body(SYSTEM, USER, ANSWER, OTHER, NEXT), "message inserted",
         "message 3 (user)"),
        (body(SYSTEM, USER, ANSWER), body(SYSTEM, ANSWER), "message removed", "message 1 (user)"),
        (body(SYSTEM, USER), body(USER, NEXT), "message removed", "message 0 (system)"),
        (body(SYSTEM, USER), body(SYSTEM, NEXT), "another question", "message 1 (user)"),
        (body(SYSTEM, USER, ANSWER, NEXT), body(SYSTEM, USER, ANSWER, OTHER), "another question", "message 3 (user)"),
        (body(SYSTEM, USER, ANSWER, NEXT), body(SYSTEM, OTHER, ANSWER, NEXT), "user message changed",
         "message 1 (user)"),
        (body(SYSTEM, USER, ANSWER, NEXT), body(SYSTEM, USER, said("No."), NEXT), "assistant message changed",
         "message 2 (assistant)"),
        (body(USER), body(NEXT), "user message changed", "message 0 (user)"),
        (body(SYSTEM, USER), body(system(SYSTEM["content"] + "Be short."), USER), "system message changed",
         "message 0 (system)"),
        (body(SYSTEM, USER, system("ab"), NEXT), body(SYSTEM, USER, system("abc"), NEXT), "system message changed",
         "message 2 (system)"),
        (body(SYSTEM, USER, system("abc"), NEXT), body(SYSTEM, USER, system("ab"), NEXT), "system message changed",
         "message 2 (system)"),
    ],
)  # fmt: skip
def test_every_kind_of_break_is_told_apart(renderer, before: dict, after: dict, kind: str, where: str) -> None:
    assert found_break(renderer, before, after) == (kind, where)


@pytest.mark.parametrize(
    ("before", "after", "kind", "where"),
    [
        (body(USER), body(USER, tools=TOOLS), "tools changed", "tools"),
        (body(USER, tools=TOOLS), body(USER, tools=TOOLS[::-1]), "tools changed", "tools[0].function.name"),
        (body(USER, tools=[tool("f", a={"x": 1, "y": 2})]), body(USER, tools=[tool("f", a={"y": 2, "x": 1})]),
         "tools changed", "tools[0].function.parameters.properties.a (order of keys)"),
        (body(USER, tools=TOOLS), body(USER, tools=[*TOOLS, tool("third")]), "tools changed", "tools[2]"),
        (body(USER, calling({"a": 1}), NEXT), body(USER, calling({"a": 2}), NEXT), "assistant message changed",
         "message 1 (assistant) tool_calls"),
        (body(USER, calling({"a": 1, "b": 2}), NEXT), body(USER, calling({"b": 2, "a": 1}), NEXT),
         "assistant message changed", "message 1 (assistant) tool_calls"),
        (body(USER, calling({}), result("7"), NEXT), body(USER, calling({}), result("8"), NEXT),
         "tool message changed", "message 2 (tool)"),
        (body(USER, calling({}), result("7")), body(USER, calling({}), result("8")), "tool message changed",
         "message 2 (tool)"),
    ],
)  # fmt: skip
def test_tools_and_tool_calls_are_told_apart(renderer_of, before: dict, after: dict, kind: str, where: str) -> None:
    # The template of the Llama model writes neither.
    assert found_break(renderer_of("built-in"), before, after) == (kind, where)


def test_an_old_tool_result_that_was_cleared_is_a_changed_one_where_the_same_text_stands_elsewhere(renderer_of) -> None:
    text = "line of a file, " * 20
    turn = [USER, calling({}), result(text), ANSWER, NEXT, calling({}), result(text)]
    cleared = [*turn[:2], result("[cleared]"), *turn[3:]]
    found = found_break(renderer_of("built-in"), body(*turn), body(*cleared, said("Done."), USER))
    assert found == ("tool message changed", "message 2 (tool)")


def test_what_the_template_does_not_write_breaks_nothing(renderer: Renderer) -> None:
    def turn(n: int, question: str, *more: dict) -> dict:
        call, answer = calling({"order": 7}, f"call_{n}"), result("sent on Monday", tool_call_id=f"call_{n}")
        return body(
            SYSTEM, USER, call, answer, user(question) | {"name": f"user{n}"}, *more, temperature=n, user=f"{n}"
        )

    assert found_break(renderer, turn(1, "A?"), turn(2, "A?")) == ("same prompt", "")
    assert found_break(renderer, turn(1, "A?"), turn(2, "B?")) == ("another question", "message 4 (user)")
    assert found_break(renderer, turn(1, "A?"), turn(2, "A?", ANSWER, NEXT)) == ("extended", "")


def test_a_role_that_the_server_writes_as_another_breaks_nothing(renderer_of) -> None:
    """vLLM gives a developer's message to a template as the system's; a second one is what is new."""
    renderer = renderer_of("built-in")
    developer = {"role": "developer", "content": SYSTEM["content"]}
    assert found_break(renderer, body(developer, USER), body(SYSTEM, USER)) == ("same prompt", "")
    longer = body(SYSTEM, {"role": "developer", "content": "Answer in one line."}, USER)
    kind, where = found_break(renderer, body(developer, USER), longer)
    assert (kind, where) == ("message inserted", "message 1 (developer)")


def test_variables_of_the_template_are_told(renderer_of) -> None:
    template = "{% if style %}<{{ style }}>{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    renderer = renderer_of("styled", template)
    found = found_break(renderer, body(SYSTEM, USER), body(SYSTEM, USER, chat_template_kwargs={"style": "plain"}))
    assert found == ("template variables changed", "template variables.style")
    found = found_break(renderer, body(SYSTEM, USER), body(SYSTEM, USER, chat_template_kwargs={"unread": 1}))
    assert found == ("same prompt", "")


def test_what_only_the_template_changes_is_put_down_to_it(renderer_of) -> None:
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if loop.last %}(answer this) {% endif %}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    found = found_break(renderer_of("last", template), body(SYSTEM, USER), body(SYSTEM, USER, ANSWER, NEXT))
    assert found == (REWRITTEN, "message 1 (user)")


def test_generated_text_that_the_template_drops_is_a_kind_of_its_own(renderer_of) -> None:
    renderer = renderer_of("qwen3-like")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    found = found_break(renderer, body(SYSTEM, USER, **off), body(SYSTEM, USER, ANSWER, NEXT, **off))
    assert found == (DROPPED, "message 2 (assistant)")
    thought = calling({"a": 1}, reasoning="First I look up the price. " * 5)
    loop = body(SYSTEM, USER, thought, result("40"))
    assert found_break(renderer, loop, body(*loop["messages"], ANSWER, NEXT)) == (DROPPED, "message 2 (assistant)")
    without = calling({"a": 1})
    found = found_break(renderer, loop, body(SYSTEM, USER, without, result("40")))
    assert found == ("assistant message changed", "message 2 (assistant) reasoning")


def test_completions_and_token_ids_have_no_messages_to_tell(renderer_of) -> None:
    renderer = renderer_of("built-in")
    for api, name, texts in (
        ("completions", "prompt", ["Once upon a time", "Once upon a time there was", "Once more"]),
        ("tokens", "prompt_token_ids", [[5, 6, 7], [5, 6, 7, 8], [5, 9]]),
    ):
        prompts = [renderer.prompt(Record(1, api, {name: text}, {})) for text in texts]
        kinds = [describe(prompts[0], prompt, renderer).kind for prompt in prompts]
        assert kinds == ["same prompt", "extended", "prompt changed"]


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ('{"step": 1, "n": 2}', '{"step": 2, "n": 2}', ".step"),
        ('# State\n{"tasks": [{"s": 0}, {"s": 0}]}', '# State\n{"tasks": [{"s": 0}, {"s": 1}]}', ".tasks[1].s"),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', "(order of keys)"),
        ('{"x": {"a": 1, "b": 2}}', '{"x": {"b": 2, "a": 1}}', ".x (order of keys)"),
        ("[1, 2]", "[1, 2, 3]", "[2]"),
        ("[see] {broken", "[see] {broken!", None),
        ('At 09:30. State {"step": 1}', 'At 09:31. State {"step": 2}', None),
        ('Tools: [] State: {"step": 1}', 'Tools: [] State: {"step": 2}', ".step"),
        ('{"step": 1} begin', '{"step": 1} go on', None),
        ('{"step": 1}', '{"step":1}', None),
    ],
)  # fmt: skip
def test_a_break_in_json_is_told_by_its_field(renderer, before: str, after: str, field: str | None) -> None:
    kind, where = found_break(renderer, *(body(system(text), USER) for text in (before, after)))
    assert kind == "system message changed"
    assert where == "message 0 (system)" + (f" field {field}" if field is not None else "")


# --- the small functions ---


def test_shared_is_the_length_of_the_common_beginning() -> None:
    dice = random.Random(1)
    for _ in range(200):
        a, b = ([dice.randrange(2) for _ in range(dice.randrange(12))] for _ in range(2))
        expected = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert shared(a, b) == expected == shared("".join(map(str, a)), "".join(map(str, b)))


def test_units_are_the_whole_text_in_pieces() -> None:
    text = 'It is 09:31. You are kind!\n{"a": 1, "b": [1, 2]}' + "word " * 100 + "end"
    assert "".join(units(text)) == text
    assert units("") == []
    assert units("It is 09:31. You are kind!")[0].strip() == "It is 09:31."
    assert max(map(len, units("word " * 100))) < 10


def test_equal_parts_are_equal_and_in_order() -> None:
    dice = random.Random(2)
    for _ in range(200):
        a, b = ([dice.randrange(3) for _ in range(dice.randrange(10))] for _ in range(2))
        ends = 0, 0
        for x, y, size in equal_parts(a, b):
            assert size > 0
            assert a[x : x + size] == b[y : y + size]
            assert (x, y) >= ends
            assert y >= ends[1]
            ends = x + size, y + size
    assert sum(size for *_, size in equal_parts(list(range(9)), [*range(4), 99, *range(4, 9)])) == 9


def test_json_is_found_around_a_place() -> None:
    text = 'state {"a": [1, 2]} and [3'
    assert json_around(text, text.index("1")) == (6, {"a": [1, 2]})
    assert json_around(text, 0) is None
    assert json_around(text, len(text) - 1) is None
    assert json_around("[" * 50_000, 10) is None
    assert first_difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}) == ".b.c[1]"
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ".b"


# --- predictions ---


def random_bodies(seed: int) -> list[dict]:
    """Return requests of a few conversations that take turns, change, repeat, lose messages, or another's salt."""
    dice = random.Random(seed)
    conversations = [[system(f"Agent {n % 2}. " + rules(4)), user(f"Task {n}. " * 5)] for n in range(4)]
    bodies = []
    for step in range(30):
        messages = dice.choice(conversations)
        match dice.randrange(6):
            case 0 | 1 | 2:
                messages += [said(f"Answer {step}. " * dice.randrange(1, 9)), user(f"Next {step}. ")]
            case 3:
                messages[0] = system(f"It is {step}. {messages[0]['content']}")
            case 4 if len(messages) > 3:
                del messages[2]
        more = {"cache_salt": dice.choice("ab")} if dice.random() < 0.2 else {}
        more |= {"tools": TOOLS[: dice.randrange(1, 3)]} if dice.random() < 0.2 else {}
        bodies.append(body(*map(dict, messages), **more))
    return bodies


@pytest.mark.parametrize(("seed", "block_size"), [(1, 1), (2, 16), (3, 16), (4, 32)])
def test_the_comparer_predicts_what_the_cache_model_predicts(renderer, seed: int, block_size: int) -> None:
    comparer, model = Comparer(renderer, block_size), CacheModel(block_size)
    hits = 0
    for line, fields in enumerate(random_bodies(seed), start=1):
        prompt = renderer.prompt(Record(line, "chat", fields, fields))
        row, blocks = comparer.add(prompt)
        assert row.predicted_cached_tokens == model.cached_tokens(prompt.ids, prompt.salt)
        assert row.prompt_tokens == len(prompt.ids)
        assert len(blocks) == len(prompt.ids) // block_size
        hits += row.predicted_cached_tokens > 0
        model.store(prompt.ids, prompt.salt)
    assert 5 < hits < 30, "a log without hits or misses shows nothing"


@pytest.mark.parametrize("seed", range(6))
def test_what_is_lost_was_computed_and_stands_behind_the_break(renderer, seed: int) -> None:
    _, rows = add_all(renderer, random_bodies(seed))
    for row in rows:
        assert row.lost_tokens % BLOCK == 0
        assert 0 <= row.lost_tokens <= (row.prompt_tokens - 1) // BLOCK * BLOCK - row.predicted_cached_tokens
        assert row.lost_tokens == 0 or row.kind not in comparing.NO_BREAK
        assert row.token >= row.predicted_cached_tokens
        assert row.answer_tokens == 0 or row.kind == "extended"
        assert row.predicted_cached_tokens + row.answer_tokens < row.prompt_tokens
    assert any(row.lost_tokens for row in rows)


def test_a_salt_or_a_model_of_its_own_shares_nothing(renderer: Renderer) -> None:
    bodies = [body(SYSTEM, USER, **more) for more in ({}, {"cache_salt": "a"}, {"model": "m"}, {"cache_salt": "a"})]
    _, rows = add_all(renderer, bodies)
    kinds = ["first request", "another model or cache_salt", "another model or cache_salt", "same prompt"]
    assert [row.kind for row in rows] == kinds
    assert [row.predecessor for row in rows] == [None, None, None, 2]
    assert [row.lost_tokens for row in rows] == [0, 0, 0, 0]
    assert [row.predicted_cached_tokens > 0 for row in rows] == [False, False, False, True]


# --- predecessors ---


def test_the_best_predecessor_need_not_be_the_line_before(renderer: Renderer) -> None:
    other = [system("Another agent. " * 40), USER]
    _, rows = add_all(renderer, [body(SYSTEM, USER), body(*other), body(SYSTEM, USER, ANSWER, NEXT)])
    assert [row.predecessor for row in rows] == [None, 1, 1]
    assert [row.kind for row in rows] == ["first request", "another prompt", "extended"]
    assert [row.lost_tokens for row in rows] == [0, 0, 0]


def test_among_requests_that_share_as_much_one_of_the_same_conversation_is_taken(renderer: Renderer) -> None:
    def turn(minute: int, *messages: dict) -> dict:
        return body(system(f"It is 09:{minute}. " + rules(10)), *messages)

    first, second = user("First: lamps. " * 5), user("Second: chairs. " * 5)
    bodies = [turn(10, first), turn(20, second), turn(30, first, ANSWER, NEXT), turn(40, second, ANSWER, NEXT)]
    _, rows = add_all(renderer, bodies)
    assert [row.predecessor for row in rows[2:]] == [1, 2]
    assert {row.kind for row in rows[1:]} == {"system message changed"}
    assert [row.session for row in rows] == ["line 1", "line 2", "line 1", "line 2"]


def test_of_two_agents_that_are_asked_the_same_each_has_its_own_predecessor(renderer: Renderer) -> None:
    other = "Quite another kind of helper, who speaks in verse about chairs. " * 20
    prompts = [text for n in range(3) for text in (f"It is 09:1{n}. {rules(20)}", f"Day {n} of May. {other}")]
    _, rows = add_all(renderer, [body(system(text), USER) for text in prompts])
    assert [row.predecessor for row in rows[2:]] == [1, 2, 3, 4]
    assert {row.kind for row in rows[2:]} == {"system message changed"}


def test_a_predecessor_that_is_no_longer_in_memory_is_read_from_the_file(renderer, monkeypatch) -> None:
    others = [body(system(f"{n} is another agent. " * 20)) for n in range(5)]
    bodies = [body(SYSTEM, USER), *others, body(SYSTEM, USER, ANSWER, NEXT), body(system("x" + rules(8)), USER)]
    _, expected = add_all(renderer, bodies)
    monkeypatch.setattr(comparing, "REQUESTS_KEPT", 1)
    comparer, rows = add_all(renderer, bodies)
    assert rows == expected
    assert (rows[-2].predecessor, rows[-2].kind) == (1, "extended")
    assert len(comparer.recent) == 1
    assert comparer.recall(0).ids == renderer.prompt(Record(1, "chat", bodies[0], {})).ids


def test_blocks_beyond_the_bound_are_forgotten(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "BLOCKS_KNOWN", 4)
    comparer, rows = add_all(renderer, [body(SYSTEM, USER), body(SYSTEM, USER)])
    assert len(comparer.owners) == 4
    blocks = rows[0].prompt_tokens // BLOCK
    assert comparer.forgotten == 2 * (blocks - 4)
    assert rows[1].predicted_cached_tokens == 4 * BLOCK, "the end of a prompt is forgotten first, its start stays"


# --- what is lost ---


def test_the_last_message_is_a_request_s_own(renderer: Renderer) -> None:
    _, rows = add_all(renderer, [body(SYSTEM, user(f"I am customer {n}. My parcel is late. " * 5)) for n in range(9)])
    assert {row.kind for row in rows[1:]} == {"another question"}
    assert sum(row.lost_tokens for row in rows) == 0


def test_other_users_under_one_system_prompt_lose_nothing(renderer: Renderer) -> None:
    def talk(n: int) -> list[dict]:
        return [SYSTEM, user(f"Customer {n} asks this. " * 3), said(f"Answer {n}, and no more. " * 3), user(f"{n}?")]

    _, rows = add_all(renderer, [body(*talk(n)) for n in range(5)])
    assert {row.kind for row in rows[1:]} == {"another conversation"}
    assert sum(row.lost_tokens for row in rows) == 0


def test_a_clock_in_front_loses_all_that_stands_behind_it(renderer: Renderer) -> None:
    _, rows = add_all(renderer, [body(system(f"It is 09:3{n}. {rules(10)}"), USER) for n in range(3)])
    for row in rows[1:]:
        assert (row.kind, row.where) == ("system message changed", "message 0 (system)")
        assert row.predicted_cached_tokens == 0
        assert row.prompt_tokens - row.token - 3 * BLOCK < row.lost_tokens <= row.prompt_tokens
        assert "09:3" in row.before + row.after


def test_a_clock_at_the_end_of_the_system_prompt_loses_the_rest_alone(renderer: Renderer) -> None:
    _, rows = add_all(renderer, [body(system(f"{rules(20)} It is 09:3{n}."), USER, ANSWER, NEXT) for n in range(2)])
    rest = length(renderer, USER, ANSWER, NEXT)
    assert rows[1].kind == "system message changed"
    assert abs(rows[1].lost_tokens - rest) <= 2 * BLOCK
    assert rows[1].predicted_cached_tokens > rest


def test_nothing_is_lost_where_nothing_behind_the_break_is_as_before(renderer: Renderer) -> None:
    changed = system(SYSTEM["content"] + "Today only: all lamps are half as dear as they were before, so say it.")
    _, rows = add_all(renderer, [body(SYSTEM, USER), body(changed, OTHER)])
    assert rows[1].predicted_cached_tokens > 0
    assert rows[1].lost_tokens == 0


def test_another_system_prompt_is_another_prompt_and_no_break(renderer: Renderer) -> None:
    other = system("Translate all that is said into plain verse, line by line. " * 9)
    _, rows = add_all(renderer, [body(SYSTEM, USER), body(other, USER)])
    assert (rows[1].kind, rows[1].lost_tokens) == ("another prompt", 0)
    assert rows[1].family == 2


@pytest.mark.parametrize(
    ("after", "kind", "same"),
    [
        ([SYSTEM, OTHER, USER, ANSWER, NEXT], "message inserted", [USER, ANSWER, NEXT]),
        ([SYSTEM, ANSWER, NEXT], "message removed", [ANSWER, NEXT]),
        ([SYSTEM, OTHER, ANSWER, NEXT], "user message changed", [ANSWER, NEXT]),
        ([SYSTEM, USER, said("No."), NEXT], "assistant message changed", [NEXT]),
        ([SYSTEM, USER], "shortened", []),
        ([SYSTEM, USER, ANSWER, OTHER], "another question", []),
    ],
)
def test_what_is_lost_is_what_is_said_again_behind_the_break(renderer, after: list, kind: str, same: list) -> None:
    _, rows = add_all(renderer, [body(SYSTEM, USER, ANSWER, NEXT), body(*after)])
    assert rows[1].kind == kind
    expected = length(renderer, *same) if same else 0
    assert abs(rows[1].lost_tokens - expected) <= (2 * BLOCK if same else 0)


def test_tools_that_change_lose_the_tools_that_do_not_and_all_that_stands_behind(renderer_of) -> None:
    renderer = renderer_of("built-in")  # it writes the tools behind the first message
    many = [tool(f"tool_{n}", order={"type": "string"}, day={"type": "string"}) for n in range(8)]
    _, rows = add_all(renderer, [body(SYSTEM, USER, tools=many), body(SYSTEM, USER, tools=[tool("new"), *many])])
    added = length(renderer, USER)
    assert rows[1].kind == "tools changed"
    assert rows[1].prompt_tokens - rows[1].token > rows[1].lost_tokens > 8 * added / 4
    assert rows[1].predicted_cached_tokens > 0


# --- answers ---


def test_an_answer_that_stands_in_the_next_prompt_as_it_was_generated_is_found(renderer: Renderer) -> None:
    bodies = [body(SYSTEM, USER), body(SYSTEM, USER, ANSWER, NEXT)]
    for answers in ({}, {1: ANSWER}):
        _, rows = add_all(renderer, bodies, answers=answers)
        before = rows[0].prompt_tokens
        written = len(renderer.tokens(ANSWER["content"]))
        found = rows[1].predicted_cached_tokens + rows[1].answer_tokens
        assert found % BLOCK == 0
        assert before + written - BLOCK - 3 <= found <= before + written + 3
        assert rows[1].predicted_cached_tokens == before // BLOCK * BLOCK


def test_an_answer_that_the_client_has_changed_is_a_kind_of_its_own_and_not_found(renderer: Renderer) -> None:
    bodies = [body(SYSTEM, USER), body(SYSTEM, USER, ANSWER, NEXT)]
    _, rows = add_all(renderer, bodies, answers={1: said("Something else was said. " * 8)})
    assert (rows[1].kind, rows[1].where) == (OTHERWISE, "message 2 (assistant)")
    assert rows[1].answer_tokens == 0
    assert rows[1].predicted_cached_tokens == rows[0].prompt_tokens // BLOCK * BLOCK
    assert rows[1].session == "line 1"


@pytest.mark.parametrize("more", ["\n\n", " And so on, until all of them are done.", " (It is late.)" * 20])
def test_an_answer_that_comes_back_shorter_is_found_up_to_where_it_differs(renderer: Renderer, more: str) -> None:
    """The engine wrote more than the client sends back: what was written before that is in the cache."""
    bodies = [body(SYSTEM, USER), body(SYSTEM, USER, ANSWER, NEXT)]
    comparer, rows = add_all(renderer, bodies, answers={1: said(ANSWER["content"] + more)})
    answered = [SYSTEM, USER, said(ANSWER["content"] + more)]
    written, _ = renderer.encode(renderer.write(comparer.recall(0), answered, answer=False))
    found = rows[1].predicted_cached_tokens + rows[1].answer_tokens
    assert found == shared(written, comparer.recall(1).ids) // BLOCK * BLOCK > rows[0].prompt_tokens + BLOCK


def test_an_answer_that_the_client_wrote_itself_was_not_there_to_be_lost(renderer: Renderer) -> None:
    bodies = [body(SYSTEM, USER), body(SYSTEM, USER, ANSWER, NEXT)]
    _, rows = add_all(renderer, bodies, answers={1: said("No.")})
    assert rows[1].lost_tokens == 0, "three tokens were written, and no block of them"


@pytest.mark.parametrize("model", ["built-in", "qwen3-like"])
def test_a_tool_call_that_was_logged_as_the_answer_is_found_in_the_next_prompt(renderer_of, model: str) -> None:
    call = calling({"order": "number seven, of the tall lamps that came on Monday, and of the small ones, too"})
    bodies = [body(SYSTEM, USER), body(SYSTEM, USER, call, result("40"))]
    found = [add_all(renderer_of(model), bodies, answers=answers)[1][1].answer_tokens for answers in ({}, {1: call})]
    assert found[0] == found[1] > 0


def test_an_answer_with_reasoning_is_found_only_where_the_template_writes_it_again(renderer_of) -> None:
    renderer = renderer_of("qwen3-like")
    thought = calling({"a": 1}, reasoning="First I look up the price. " * 9)
    bodies = [body(SYSTEM, USER), body(SYSTEM, USER, thought, result("40"))]
    _, rows = add_all(renderer, bodies, answers={1: thought})
    assert rows[1].answer_tokens > 4 * BLOCK, "behind the last question it writes reasoning"
    thought = ANSWER | {"reasoning": "First I look for the price. " * 9}
    for sent, kind in ((thought, DROPPED), (ANSWER, OTHERWISE)):
        _, rows = add_all(renderer, [body(SYSTEM, USER), body(SYSTEM, USER, sent, NEXT)], answers={1: thought})
        assert (rows[1].kind, rows[1].where) == (kind, "message 2 (assistant)")
        assert rows[1].answer_tokens == 0, "before it, the answer is written without"


# --- sessions and families ---


def test_sessions_and_families_are_found_by_prefix(renderer: Renderer) -> None:
    agents = [system("One agent. " + rules(8)), system("Quite another kind of helper, for verse. " * 12)]
    talks = [[agents[n % 2], user(f"Task {n} of many. " * 4)] for n in range(4)]
    bodies, sessions, families = [], [], []
    for turn in range(3):
        for n, talk in enumerate(talks):
            bodies.append(body(*talk))
            talk += [said(f"Answer {n}.{turn}. " * 3), user(f"Next {n}.{turn}. " * 3)]
            sessions.append(f"line {n + 1}")
            families.append(n % 2 + 1)
    _, rows = add_all(renderer, bodies)
    assert [row.session for row in rows] == sessions
    assert [row.family for row in rows] == families


def test_a_session_that_is_given_is_kept(renderer: Renderer) -> None:
    comparer = Comparer(renderer, BLOCK)
    fields = body(SYSTEM, USER)
    rows = [comparer.add(renderer.prompt(Record(1, "chat", fields, fields)), name)[0] for name in ("a", "b", None)]
    assert [row.session for row in rows] == ["a", "b", "b"]


def test_a_trace_of_hashes_is_compared_without_texts() -> None:
    def record(line: int, ids: list[int], tokens: int) -> Record:
        return Record(line, "blocks", {"hash_ids": ids, "block_size": 512, "input_length": tokens}, {})

    comparer, rows = Comparer(None, 512), []
    for line, (ids, tokens) in enumerate(
        [([1, 2, 3], 1500), ([1, 2, 9, 4], 2048), ([1, 2, 9, 4, 5], 2500), ([7, 2], 1024), ([1, 2], 1024)], start=1
    ):
        rows.append(comparer.add_trace(record(line, ids, tokens))[0])
    # A block of less than 512 tokens has no hash in a cache; the last token is always computed.
    assert [row.predicted_cached_tokens for row in rows] == [0, 1024, 2048, 0, 512]
    assert [row.kind for row in rows] == ["first request", "extended", "extended", "another prompt", "extended"]
    assert [row.session for row in rows] == ["line 1", "line 1", "line 1", "line 4", "line 1"]


# --- advice ---


def replayed(renderer: Renderer, bodies: list[dict]) -> float:
    """Return the hit rate of a log in the cache model."""
    model, found, sent = CacheModel(BLOCK), 0, 0
    for fields in bodies:
        prompt = renderer.prompt(Record(1, "chat", fields, fields))
        found, sent = found + model.cached_tokens(prompt.ids, prompt.salt), sent + len(prompt.ids)
        model.store(prompt.ids, prompt.salt)
    return found / sent


CHANGES = {
    "a clock in front": lambda n: (f"It is 09:{10 + n}. ", ""),
    "a clock within": lambda n: (f"You tend a shop. It is 09:{10 + n}. ", "You tend a shop. "),
    "a state in JSON": lambda n: (f'Be kind.\n{{"step": {n}, "goal": "sell"}}\n', 'Be kind.\n{"goal": "sell"}\n'),
    "a customer": lambda n: (f"The customer is number {n * 7919}, from town {n}.\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_advice_gives_the_hit_rate_that_the_other_layout_has_where_it_is_really_written(renderer, change: str) -> None:
    early, late = [], []
    for n in range(8):
        text, static = CHANGES[change](n)
        early.append(body(system(text + rules(20)), user("Which lamp?")))
        late.append(body(system(static + rules(20)), user("Which lamp?" + text)))
    comparer, rows = add_all(renderer, early)
    (found,) = advise(comparer, rows)
    assert (found.families, found.where, found.requests, found.replayed) == (1, "message 0 (system)", 7, 8)
    assert found.lost_tokens == sum(row.lost_tokens for row in rows)
    assert found.hit_rate == pytest.approx(replayed(renderer, early))
    per_request = 2 * BLOCK / min(row.prompt_tokens for row in rows)
    assert abs(found.moved_hit_rate - replayed(renderer, late)) <= per_request
    assert found.moved_hit_rate > found.hit_rate + 0.3


def only_advice(renderer: Renderer, bodies: list[dict]) -> Advice:
    (found,) = advise(*add_all(renderer, bodies))
    return found


def test_the_texts_that_move_are_named(renderer: Renderer) -> None:
    found = only_advice(renderer, [body(system(f"Be kind. It is 09:3{n}. {rules(20)}"), USER) for n in range(3)])
    assert found.texts == [f"It is 09:3{n}." for n in range(3)]


def test_a_message_that_was_inserted_moves_as_a_whole(renderer: Renderer) -> None:
    notes = [user(f"Note {n}: stock is {n * 17}. " * 3) for n in range(3)]
    found = only_advice(renderer, [body(SYSTEM, note, USER, ANSWER, NEXT) for note in notes])
    assert found.moved_hit_rate > found.hit_rate
    assert any("Note 1" in text for text in found.texts)


def test_tools_that_change_are_advised_about(renderer_of) -> None:
    many = [tool(f"tool_{n}", order={"type": "string"}, day={"type": "string"}) for n in range(8)]
    bodies = [body(SYSTEM, USER, ANSWER, NEXT, tools=[tool(f"dated_{n}"), *many]) for n in range(4)]
    found = only_advice(renderer_of("built-in"), bodies)
    assert found.where.startswith("tools")
    assert found.moved_hit_rate > found.hit_rate + 0.2


def test_a_log_in_the_best_layout_gets_no_advice(renderer: Renderer) -> None:
    talk, bodies = [SYSTEM, USER], []
    for n in range(4):
        bodies += [body(*talk), body(SYSTEM, user(f"Customer {n}. " * 9))]
        talk = [*talk, said(f"Answer {n}. " * 5), user(f"Next {n}. " * 5)]
    comparer, rows = add_all(renderer, bodies)
    assert sum(row.lost_tokens for row in rows) == 0
    assert advise(comparer, rows) == []


def test_what_gains_nothing_when_it_is_moved_is_no_advice_to_move_it() -> None:
    for rate, promised in ((0.3, False), (0.1, False), (0.31, True)):
        console = Console(width=80, file=io.StringIO())
        print_advice(console, [Advice("message 0 (system)", 1, 1, 16, ["It is late."], 3, 0.3, rate)])
        printed = console.file.getvalue()
        assert ("behind the static part" in printed) == promised
        assert ("gains nothing" in printed) != promised


def test_advice_for_a_place_is_replayed_with_the_texts_of_each_family(renderer: Renderer) -> None:
    other = "Quite another kind of helper, who speaks in verse about chairs. " * 20
    bodies = []
    for n in range(3):
        bodies.append(body(system(f"It is 09:1{n}. {rules(20)}"), USER))
        bodies.append(body(system(f"Day {n} of May. {other}"), OTHER))
    comparer, rows = add_all(renderer, bodies)
    [found] = advise(comparer, rows)
    assert (found.families, found.requests, found.replayed) == (2, 4, 6)
    assert found.moved_hit_rate > 0.4 > 0.1 > found.hit_rate
    assert any("09:1" in text for text in found.texts)


def test_a_model_with_mistral_s_own_tokenizer_and_renderer_is_compared_too(tmp_path: Path) -> None:
    data = Path(importlib.util.find_spec("mistral_common").origin).parent / "data"
    folder = write_llama(tmp_path / "mistral", vocab_size=131_072)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    (folder / "consolidated.safetensors").touch()  # by this vLLM knows such a model
    renderer = Renderer(str(folder))
    assert not renderer.has_template
    comparer, rows = add_all(renderer, [body(system(f"It is 09:3{n}. {rules(20)}"), USER) for n in range(3)])
    assert [row.kind for row in rows[1:]] == ["system message changed"] * 2
    assert all(row.lost_tokens > row.prompt_tokens * 0.7 for row in rows[1:])
    assert [place.moved_hit_rate > 0.5 for place in advise(comparer, rows)] == [True]
    text = renderer.prompt(Record(1, "completions", {"prompt": "Once upon a time"}, {}))
    assert renderer.tokenizer.decode(text.ids) == "<s>Once upon a time", "as vLLM begins completions"
