"""The Chinese texts: README.zh-CN.md says what README.md says, lessons.zh-CN.md names only what there is.

The README's recorded tables are the English ones to the byte, and those are held to results/ by test_readme.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from run_all_examples import LESSONS

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE, EXPLAINED = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md", "lessons.zh-CN.md")
)
LANGUAGES = {"README.md", "README.zh-CN.md", "lessons.zh-CN.md"}  # each README links to the others, in its own way
FENCE = r"(?:<!--[^\n]*-->\n+)?```.*?```\n"  # with the marker before it
SPAN = r"`([^`]+)`"
LINK = r"\]\(([^)\s]+)\)"
SCRIPTS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("going_further/*.py"), ROOT / "built_in_model" / "build.py"]
)


def without_blocks(text: str) -> str:
    return re.sub(FENCE, "", text, flags=re.DOTALL)


def headings(text: str) -> list[tuple[int, str]]:
    """Return level and title of every heading."""
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", without_blocks(text), re.MULTILINE)]


def sections(text: str) -> list[str]:
    """Return the text under each heading, without code blocks."""
    return re.split(r"^#+ .+$", without_blocks(text), flags=re.MULTILINE)[1:]


def slugs(text: str) -> list[str]:
    """Return the anchors that GitHub gives to the headings."""
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(text)]


def spans(section: str) -> Counter:
    """Return what stands in code font; a line may end inside of it."""
    return Counter(" ".join(code.split()) for code in re.findall(SPAN, section))


def numbers(section: str) -> Counter:
    """Return the numbers that stand outside of code and of link targets, without thousands separators."""
    prose = re.sub(LINK, "]", re.sub(SPAN, "", section))
    return Counter(number.replace(",", "") for number in re.findall(r"\d+(?:[.,]\d+)*", prose))


def targets(section: str, anchors: list[str]) -> Counter:
    """Return where links lead, an anchor as the place of its heading: titles differ between the languages."""
    places = {f"#{anchor}": f"heading {n}" for n, anchor in enumerate(anchors)}
    found = re.findall(LINK, re.sub(SPAN, "", section))
    return Counter(places.get(target, target) for target in found if target not in LANGUAGES)


def differences(english: str, chinese: str) -> list[str]:
    """Return what the two texts do not have in common and should, a line each."""
    told = []
    if [level for level, _ in headings(english)] != [level for level, _ in headings(chinese)]:
        return ["headings"]
    if re.findall(FENCE, english, re.DOTALL) != re.findall(FENCE, chinese, re.DOTALL):
        told.append("code blocks")
    titles = [title for _, title in headings(english)]
    for title, one, other in zip(titles, sections(english), sections(chinese), strict=True):
        pairs = {
            "code": (spans(one), spans(other)),
            "numbers": (numbers(one), numbers(other)),
            "links": (targets(one, slugs(english)), targets(other, slugs(chinese))),
        }
        for what, (a, b) in pairs.items():
            if a != b:
                told.append(f"{what} under {title!r}: only English {dict(a - b)}, only Chinese {dict(b - a)}")
    return told


def test_both_readmes_have_the_same_headings_blocks_code_numbers_and_links() -> None:
    assert differences(ENGLISH, CHINESE) == []


MUTATIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "a heading less": ("headings", lambda text: text.replace("\n## 模型\n", "\n模型\n")),
    "a heading deeper": ("headings", lambda text: text.replace("\n## 模型\n", "\n### 模型\n")),
    "a figure in a table": ("code blocks", lambda text: text.replace("TTFT fell from ", "TTFT fell from 9", 1)),
    "a marker": ("code blocks", lambda text: text.replace("<!-- pair results/cpu.json -->\n", "")),
    "an option": ("code", lambda text: text.replace("`--seed`", "`--seeds`")),
    "a file": ("code", lambda text: text.replace("`exercises/exercise_1.py`", "`exercises/exercise_2.py`")),
    "a number": ("numbers", lambda text: text.replace("4 GiB", "8 GiB", 1)),
    "a number left out": ("numbers", lambda text: text.replace(" 580 ", " ")),
    "a file that is linked": ("links", lambda text: text.replace("](docs/gpu.md)", "](docs/servers.md)")),
    "an anchor to another heading": ("links", lambda text: text.replace("(#怎样读表)", "(#模型)")),
    "an anchor to none": ("links", lambda text: text.replace("(#怎样读表)", "(#怎样读)")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_text_that_was_changed_is_told_from_the_english_one(name: str) -> None:
    what, mutate = MUTATIONS[name]
    changed = mutate(CHINESE)
    assert changed != CHINESE
    assert any(told.startswith(what) for told in differences(ENGLISH, changed))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, EXPLAINED], ids=["README", "README.zh-CN", "lessons.zh-CN"])
def test_every_link_leads_somewhere(text: str) -> None:
    anchors = slugs(text)
    assert len(anchors) == len(set(anchors))
    for target in re.findall(LINK, re.sub(SPAN, "", without_blocks(text))):
        assert target[1:] in anchors if target.startswith("#") else (ROOT / target).exists(), target


def test_each_readme_links_to_the_other_at_its_top() -> None:
    assert "](README.zh-CN.md)" in sections(ENGLISH)[0]
    assert "](README.md)" in sections(CHINESE)[0]
    assert "](lessons.zh-CN.md)" in sections(CHINESE)[0]


def test_the_chinese_readme_is_as_short_and_begins_with_a_result_and_its_command() -> None:
    lines = CHINESE.splitlines()
    assert len(lines) <= 170
    assert "python3 run_all_examples.py" in lines[:25]
    for text in ("TTFT fell from", "4 GiB", "**学生**", "**教师**", "**工程师**"):
        assert any(text in line for line in lines[:25]), text


# --- lessons.zh-CN.md: the lessons explained ---


def sources(number: int) -> str:
    """Return the texts of a lesson's script and of its exercise, or of all for number 0."""
    numbers = [number] if number else LESSONS
    paths = [ROOT / f"{LESSONS[n].name}.py" for n in numbers] + [ROOT / f"exercises/exercise_{n}.py" for n in numbers]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def unknown(code: str, source: str) -> list[str]:
    """Return what of a piece of code is no file, no option and nothing that the source has."""
    if " ".join(code.split()) in " ".join(source.split()) and not code.startswith("--"):
        return []
    if not code.startswith(("python ", "--")) and not re.fullmatch(r"[\w./]+\.(py|json|md)", code):
        return [code]
    words = [word for word in code.split() if word.startswith("--") or "." in word]
    return [word for word in words if not (f'"{word}"' in SCRIPTS if word.startswith("--") else (ROOT / word).exists())]


def faults(number: int, section: str) -> list[str]:
    """Return the code and the numbers in a section that neither the lesson nor its exercise has; 0: none of them."""
    source = sources(number)
    known = {figure.replace(",", "") for figure in re.findall(r"\d+(?:[.,]\d+)*", source)}
    found = [word for code in spans(section) for word in unknown(code, source)]
    return [*found, *(figure for figure in numbers(section) if figure not in known)]


def test_each_lesson_has_a_short_section_with_its_name_and_its_exercise() -> None:
    titles = [title for level, title in headings(EXPLAINED) if level == 2]
    assert len(titles) == len(LESSONS)
    for (number, lesson), title, section in zip(LESSONS.items(), titles, sections(EXPLAINED)[1:], strict=True):
        assert f"第 {number} 课 `{lesson.name}.py`" in title
        assert len(section.splitlines()) <= 40
        assert f"`python run_all_examples.py --exercise {number}`" in section
        for part in ("**两组。**", "**为什么。**", "**读表。**", "**`--deeper`**", "**`--predict`**", "**练习。**"):
            assert part in section, part


@pytest.mark.parametrize("number", [0, *LESSONS])
def test_the_explanations_name_only_options_files_outputs_and_numbers_that_there_are(number: int) -> None:
    assert faults(number, sections(EXPLAINED)[number]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "`--predicts`",
        "`exercises/exercise_9.py`",
        "`python run_all_examples.py --exercises 1`",
        "`hit ratio`",
        "23.3 倍",
    ],
)
def test_an_explanation_of_what_is_not_there_is_found(wrong: str) -> None:
    assert faults(1, f"{sections(EXPLAINED)[1]}\n{wrong}\n")
