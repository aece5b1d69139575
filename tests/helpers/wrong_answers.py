"""Plausible wrong answers to the exercises: a fact dropped, the change moved by a line, an order that changes, ..."""

from __future__ import annotations

HEAD_1 = "def messages(rules, policies, tools, request):\n    static = f'{rules}\\n{policies}\\n{tools}'\n"
TAIL_1 = (
    "    return [{'role': 'system', 'content': system}, {'role': 'user', 'content': about + request['question']}]\n"
)
WRONG_1 = {
    "the date is dropped": f"""{HEAD_1}
    system, about = static, f"{{request['user']}} ({{request['id']}}): "
{TAIL_1}""",
    "the date is rounded to the hour": f"""{HEAD_1}
    system, about = static, f"{{request['user']}} ({{request['id']}}) at {{request['date'][:13]}}:00: "
{TAIL_1}""",
    "the clock is one line further down": f"""{HEAD_1}
    system = f"You are a helpful agent.\\nCurrent time: {{request['date']}}\\n{{static}}"
    about = f"{{request['user']}} ({{request['id']}}): "
{TAIL_1}""",
    "the tools are sorted by the question": f"""{HEAD_1}
    words = set(request['question'].lower().split())
    lines = sorted(static.splitlines(), key=lambda line: -len(words & set(line.lower().split())))
    system, about = '\\n'.join(lines), f"{{request['user']}} ({{request['id']}}) at {{request['date']}}: "
{TAIL_1}""",
    "only the date is moved": f"""{HEAD_1}
    system = f"{{rules}}\\n{{request['user']}}\\n{{policies}}\\n{{request['id']}}\\n{{tools}}"
    about = f"Current time: {{request['date']}}\\n"
{TAIL_1}""",
}
RIGHT_1 = {
    "texts in tags": """
def messages(rules, policies, tools, request):
    system = f"<rules>{rules}</rules>\\n<policies>{policies}</policies>\\n<tools>{tools}</tools>"
    about = f"{request['user']} ({request['id']}) at {request['date']}: {request['question']}"
    return [{"role": "system", "content": system}, {"role": "user", "content": about}]
""",
    "another order": """
def messages(rules, policies, tools, request):
    about = " | ".join(request.values())
    return [{"role": "system", "content": tools + "\\n" + policies + "\\n" + rules}, {"role": "user", "content": about}]
""",
}
REMEMBERS = {  # answers that keep something from the calls before
    "a list of all requests": """
seen = []
def messages(rules, policies, tools, request):
    seen.append("; ".join(request.values()))
    system = rules + "\\n" + policies + "\\n" + tools
    return [{"role": "system", "content": system}, {"role": "user", "content": "\\n".join(seen)}]
""",
    "a default that is changed": """
def messages(rules, policies, tools, request, seen={}):
    seen[len(seen)] = "; ".join(request.values())
    system = rules + "\\n" + policies + "\\n" + tools
    return [{"role": "system", "content": system}, {"role": "user", "content": "\\n".join(seen.values())}]
""",
    "chance": """
import random
def messages(rules, policies, tools, request):
    system = rules + "\\n" + policies + "\\n" + tools
    said = "; ".join(request.values()) + str(random.random())
    return [{"role": "system", "content": system}, {"role": "user", "content": said}]
""",
}

HEAD_2 = """
def written(learned):
    return ''.join(f'{key} = {value}\\n' for key, value in learned.items())

def memory(turns):
    return {key: value for turn in turns for key, value in turn['learned'].items()}

def said(turns, texts):
    chat = []
    for turn, text in zip(turns, texts):
        chat += [{'role': 'user', 'content': text + turn['user']}, {'role': 'assistant', 'content': turn['answer']}]
    return chat[:-1]

def messages(instructions, turns):
"""
WRONG_2 = {
    "what was learned earlier is dropped": f"""{HEAD_2}
    texts = [''] * (len(turns) - 1) + [written(turns[-1]['learned'])]
    return [{{'role': 'system', 'content': instructions}}, *said(turns, texts)]
""",
    "the memory is further down, behind the instructions": f"""{HEAD_2}
    system = instructions + '\\n' + written(memory(turns))
    return [{{'role': 'system', 'content': system}}, *said(turns, [''] * len(turns))]
""",
    "the memory moves with the last message": f"""{HEAD_2}
    texts = [''] * (len(turns) - 1) + [written(memory(turns))]
    return [{{'role': 'system', 'content': instructions}}, *said(turns, texts)]
""",
    "the log is sorted by key": f"""{HEAD_2}
    log = sorted(((key, value) for turn in turns for key, value in turn['learned'].items()), key=lambda entry: entry[0])
    system = instructions + '\\n' + ''.join(f'{{key}} = {{value}}\\n' for key, value in log)
    return [{{'role': 'system', 'content': system}}, *said(turns, [''] * len(turns))]
""",
    "the log is sorted by key, at the end": f"""{HEAD_2}
    log = sorted(((key, value) for turn in turns for key, value in turn['learned'].items()), key=lambda entry: entry[0])
    texts = [''] * (len(turns) - 1) + [''.join(f'{{key}} = {{value}}\\n' for key, value in log)]
    return [{{'role': 'system', 'content': instructions}}, *said(turns, texts)]
""",
    "it compacts at every other turn": f"""{HEAD_2}
    since = len(turns) // 2 * 2
    first = max(0, since - 3)
    texts = [written(turn['learned']) if n >= since else '' for n, turn in enumerate(turns)][first:]
    system = instructions + '\\n' + written(memory(turns[:since]))
    return [{{'role': 'system', 'content': system}}, *said(turns[first:], texts)]
""",
}
RIGHT_2 = {
    "it compacts once": f"""{HEAD_2}
    since = 5 if len(turns) > 5 else 0
    first = max(0, since - 2)
    texts = [written(turn['learned']) if n >= since else '' for n, turn in enumerate(turns)][first:]
    system = instructions + '\\n' + written(memory(turns[:since]))
    return [{{'role': 'system', 'content': system}}, *said(turns[first:], texts)]
""",
    "the memory as a list with dashes": f"""{HEAD_2}
    texts = [''.join(f'- {{key}} = {{value}}\\n' for key, value in turn['learned'].items()) for turn in turns]
    return [{{'role': 'system', 'content': instructions}}, *said(turns, texts)]
""",
    "the whole memory is appended at every turn": f"""{HEAD_2}
    texts = [written(memory(turns[: n + 1])) for n in range(len(turns))]
    return [{{'role': 'system', 'content': instructions}}, *said(turns, texts)]
""",
}

HEAD_3 = "END = '// __CACHE_END__'\n\ndef messages(shared, tenant, request):\n"
TAIL_3 = "    return [{'role': 'system', 'content': system}, {'role': 'user', 'content': question}]\n"
WRONG_3 = {
    "the user is dropped": f"""{HEAD_3}
    system = f"{{shared}}\\n{{END}}\\n{{tenant['name']}}\\n{{tenant['policies']}}\\n{{END}}"
    question = request['question']
{TAIL_3}""",
    "the tenant is one line further down": f"""{HEAD_3}
    first, rest = shared.split('\\n', 1)
    system = f"{{first}}\\nFor {{tenant['name']}}.\\n{{rest}}\\n{{END}}\\n{{tenant['policies']}}\\n{{END}}"
    question = f"{{request['user']}}: {{request['question']}}"
{TAIL_3}""",
    "the policies are sorted by the question": f"""{HEAD_3}
    letters = set(request['question'])
    lines = sorted(tenant['policies'].splitlines(), key=lambda line: -len(letters & set(line)))
    text = '\\n'.join(lines)
    system = f"{{shared}}\\n{{END}}\\n{{tenant['name']}}\\n{{text}}\\n{{END}}"
    question = f"{{request['user']}}: {{request['question']}}"
{TAIL_3}""",
    "both boundaries stand behind the shared text": f"""{HEAD_3}
    system = f"{{shared}}\\n{{END}}{{END}}\\n{{tenant['name']}}\\n{{tenant['policies']}}"
    question = f"{{request['user']}}: {{request['question']}}"
{TAIL_3}""",
    "the first boundary stands behind the tenant's text": f"""{HEAD_3}
    system = f"{{shared}}\\n{{tenant['name']}}\\n{{tenant['policies']}}\\n{{END}}{{END}}"
    question = f"{{request['user']}}: {{request['question']}}"
{TAIL_3}""",
}

RIGHT_3 = {
    "a label": f"""{HEAD_3}
    system = f"{{shared}}\\n{{END}}Tenant: {{tenant['name']}}. Policies: {{tenant['policies']}}{{END}}"
    question = f"{{request['user']}}: {{request['question']}}"
{TAIL_3}"""
}
FITS_THE_SAMPLE = {  # answers that tell the model of everybody, so that it cannot know whom it serves
    "all tenants are named": f"""{HEAD_3}
    everybody = "Nordlicht Books, Casa Verde Garden or Pico Cycle Works"
    system = f"{{shared}}\\nFor {{everybody}}.\\n{{END}}\\n{{tenant['policies']}}{{END}}"
    question = f"{{request['user']}}: {{request['question']}}"
{TAIL_3}""",
    "all users are named": f"""{HEAD_3}
    users = "Ada Brown, customer C-10482; Boris Vidal, customer C-20963; "
    users += "Chen Liu, customer C-31544; Nobody, customer C-00000"
    system = f"{{shared}}\\n{{END}}\\n{{tenant['name']}}\\n{{tenant['policies']}}\\n{{users}}\\n{{END}}"
    question = request['question']
{TAIL_3}""",
}

HEAD_4 = """
import hashlib
import math

def digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

def most(workers):
    return math.ceil(1.25 * (sum(workers.values()) + 1) / len(workers))

def route(session, workers):
"""
WRONG_4 = {  # and the claim that must catch it
    "modulo": (f"{HEAD_4}    return sorted(workers)[digest(session) % len(workers)]\n", "only its own sessions move"),
    "rendezvous without a bound": (
        f"{HEAD_4}    return max(workers, key=lambda name: digest(session + name))\n",
        "a hot session overruns no worker",
    ),
    "the hash of one Python process": (
        f"{HEAD_4}    room = [name for name in workers if workers[name] < most(workers)]\n"
        "    return max(room, key=lambda name: hash((session, name)))\n",
        "routers in other processes agree",
    ),
    "the list as it comes": (
        f"{HEAD_4}    names = [name for name in workers if workers[name] < most(workers)]\n"
        "    return names[digest(session) % len(names)]\n",
        "the order in which workers are listed decides nothing",
    ),
    "sorted by load, then by hash": (
        f"{HEAD_4}    return min(workers, key=lambda name: (workers[name], digest(session + name)))\n",
        "a session comes back to its worker while that has room",
    ),
    "everything to one worker with room": (
        f"{HEAD_4}    return min(name for name in workers if workers[name] < most(workers))\n",
        "about the same share",
    ),
}

WRONG_5 = {  # and what must be said of it
    "one is left out": (
        "def breaks():\n    return [(3, 'system message changed', 'message 0 (system) field .budget.used'),\n"
        "            (5, 'tools changed', 'tools[4].function.description')]\n",
        "2 of 3 are",
    ),
    "one line further down": (
        "def breaks():\n    return [(4, 'system message changed', 'message 0 (system) field .budget.used'),\n"
        "            (6, 'tools changed', 'tools[4].function.description'),\n"
        "            (8, 'message removed', 'message 1 (user)')]\n",
        "line 4: nothing is lost there",
    ),
    "one has another place": (
        "def breaks():\n    return [(3, 'system message changed', 'message 0 (system) field .budget.limit'),\n"
        "            (5, 'tools changed', 'tools[4].function.description'),\n"
        "            (7, 'message removed', 'message 1 (user)')]\n",
        "in another place",
    ),
    "all lines are named": (
        "def breaks():\n    return [(3, 'system message changed', 'message 0 (system) field .budget.used'),\n"
        "            (5, 'tools changed', 'tools[4].function.description'),\n"
        "            (7, 'message removed', 'message 1 (user)'),\n"
        "            (8, 'extended', '')]\n",
        "nothing else is named",
    ),
}
