"""What the exercises are about: texts, requests, turns, tenants; and pure functions that read the facts back.

All is the same for every model: texts are made by characters, not by tokens.
"""

from __future__ import annotations

import random
import re

from going_further.common import clock, system_prompt

USERS = ("Ada Brown, customer C-10482", "Boris Vidal, customer C-20963", "Chen Liu, customer C-31544")
QUESTIONS = (
    "Where is my parcel? It should have arrived on Monday.",
    "How do I send back the shoes from my last order?",
    "The invoice shows my old address. Can you correct it?",
    "Was my refund approved?",
    "Please cancel the second item and keep the rest.",
    "Can the delivery come in the evening?",
)
KEYS = (
    *("traveller", "company", "home_airport", "destination", "departure", "return", "cabin", "seat", "meal", "luggage"),
    *("hotel", "room", "breakfast", "loyalty_card", "budget", "spent", "currency", "invoice_to", "visa", "transfer"),
    *("meeting", "contact", "insurance", "notes"),
)
TURNS, TURNS_KEPT = 9, 3
TENANTS = ("Nordlicht Books", "Casa Verde Garden", "Pico Cycle Works")
NOBODY = {"user": "Nobody, customer C-00000", "question": "No question yet."}
MARKER = "// __CACHE_END__"


def about_tokens(text: str) -> int:
    return len(text) // 4


def static_texts(tokens: int) -> tuple[str, str, str]:
    """Return rules, policies and tools of about so many tokens, the tools most of them."""
    rules, _, rest = system_prompt(tokens, about_tokens).partition("\n# Policies\n")
    policies, _, tools = rest.partition("\n# Tools\n")
    return rules.strip(), policies.strip(), tools.strip()


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def text_of(messages: list[dict]) -> str:
    return "\n".join(message["content"] for message in messages)


def lost(messages: list[dict], static: dict[str, str], values: dict[str, str]) -> list[str]:
    """Return what messages do not carry: lines of the static texts, once each, and values, word for word."""
    text, missing = text_of(messages), []
    for name, content in static.items():
        for line in lines_of(content):
            if (times := text.count(line)) != 1:
                missing.append(f"{name}: the line {line[:30]!r} is there {times} times")
    return missing + [f"the {name} {value!r} is missing" for name, value in values.items() if value not in text]


def foreign(messages: list[dict], values: dict[str, str], all_values: list[dict[str, str]]) -> list[str]:
    """Return which values of other requests the messages of one request show, that of `values`."""
    text = text_of(messages)
    others = {(name, value) for other in all_values for name, value in other.items() if value != values[name]}
    return [f"the {name} {value!r} of another request is there" for name, value in sorted(others) if value in text]


# --- exercise 1 ---


def requests() -> list[dict]:
    """Return the requests, with a date, a user, an id and a question each; no two have a date or an id in common."""
    dice = random.Random(1)
    return [
        {"date": clock(n), "user": USERS[n % 3], "id": f"req-{dice.randrange(16**8):08x}", "question": question}
        for n, question in enumerate(QUESTIONS)
    ]


# --- exercise 2 ---


def turns() -> list[dict]:
    """Return all turns: the first one brings a memory of many keys, each later one changes three of them."""
    dice, made = random.Random(2), []
    for n in range(TURNS):
        keys = KEYS if n == 0 else dice.sample(KEYS, 3)
        values = {
            key: f"{key.replace('_', ' ')} number {dice.randrange(1000, 10_000)}, told in turn {n}" for key in keys
        }
        user = f"Message {n}: please look at the plan again, {values[keys[0]]} is what I have in mind."
        answer = f"Answer {n}: I have noted what you said and looked at the plan; nothing else has to change for now."
        made.append({"user": user, "learned": values, "answer": answer})
    return made


def read_memory(messages: list[dict]) -> dict[str, str]:
    """Return what the messages say of the keys: the last line "key = value" counts."""
    found = re.findall(r"^[ \t]*(?:[-*] )?(\w+) = (.*?)[ \t]*$", text_of(messages), re.MULTILINE)
    return {key: value for key, value in found if key in KEYS}


def lost_memory(messages: list[dict], instructions: str, so_far: list[dict]) -> list[str]:
    """Return what a turn does not carry: of the instructions, the memory and the last turns."""
    said = {f"text of turn {len(so_far) - at}": turn["user"] for at, turn in enumerate(so_far[:-4:-1], start=1)}
    said |= {f"answer of turn {len(so_far) - at}": t["answer"] for at, t in enumerate(so_far[-2:-4:-1], start=2)}
    missing, read = lost(messages, {"instructions": instructions}, said), read_memory(messages)
    for key, value in known(so_far).items():
        if read.get(key) != value:
            told = f"reads {read[key]!r}" if key in read else f"is missing: there is no line '{key} = ...'"
            missing.append(f"{key} {told}, it is {value!r}")
    return missing


def known(so_far: list[dict]) -> dict[str, str]:
    values = {}
    for turn in so_far:
        values |= turn["learned"]
    return values


# --- exercise 3 ---


def tenant(name: str, tokens: int) -> dict:
    """Return a tenant with policies of its own, about so many tokens of them."""
    dice, text = random.Random(name), ""
    for number in range(1, 1000):
        what = dice.choice(("returns", "refunds", "deliveries", "vouchers", "repairs", "pickups", "invoices"))
        days, limit = dice.randrange(5, 60), dice.randrange(20, 900)
        text += f"Policy {number} on {what}: within {days} days, up to {limit} euros without a supervisor.\n"
        if about_tokens(text) >= tokens:
            break
    return {"name": name, "policies": text.strip()}


def visitors() -> list[dict]:
    return [{"user": user, "question": question} for user, question in zip(USERS, QUESTIONS, strict=False)]


def without_markers(messages: list[dict]) -> list[dict]:
    return [{**message, "content": message["content"].replace(MARKER, "")} for message in messages]
