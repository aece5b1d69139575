"""Check an answer to an exercise on a real vLLM engine.

    python -m exercises.check N         your answer in exercises/exercise_N.py
    python -m exercises.check N FILE    an answer in another file

The functions of the file are called first; a fault of theirs is told with its
line. Then their prompts are sent, one at a time, and what was found in the
cache is held against what the best layout could find: whole blocks of the
tokens that stay the same, less one block a request. Prompts must still carry
all that they are about. What is lost is shown with its place. Exit status: 0
solved, 1 not solved or a fault in the file, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from exercises import diagnosis, layouts, routing
from exercises.student import load
from going_further.common import HERE, Run, engine_parser, run_command, run_lesson

EXERCISES = {  # the function that the student writes, and what checks it
    "1": ("messages", layouts.exercise_1),
    "2": ("messages", layouts.exercise_2),
    "3": ("messages", layouts.exercise_3),
    "4": ("route", routing.exercise_4),
    "5": ("breaks", diagnosis.exercise_5),
}


def check(args: argparse.Namespace) -> int:
    name, prepare = EXERCISES[args.exercise]
    path = args.file or HERE / "exercises" / f"exercise_{args.exercise}.py"
    measure = prepare(load(path.resolve(), name))  # all of the student's code runs here, before vLLM is imported
    if args.exercise == "4":
        args.workers = routing.ENGINES

    async def measure_and_tell(run: Run) -> None:
        run.result["exercise"] = {"number": int(args.exercise), "file": path.name}
        await measure(run)
        solved = all(claim["holds"] for claim in run.claims)
        solved = solved and all(m.cached_tokens == m.predicted_cached_tokens for m in run.measurements)
        run.print(f"\n[bold]{'Solved' if solved else 'Not solved'}[/]: exercise {args.exercise}")

    return run_lesson(args, measure_and_tell)


def main() -> int:
    parser = engine_parser(__doc__)
    numbers = ", ".join(EXERCISES)
    parser.add_argument("exercise", metavar="N", choices=EXERCISES, help=f"the number of an exercise: {numbers}")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="your answer (default: exercise_N.py)")
    parser.add_argument("--check-options", action="store_true", help=argparse.SUPPRESS)  # by the runner
    args = parser.parse_args()
    if args.json and args.file and args.json.exists() and args.file.exists() and args.json.samefile(args.file):
        parser.error("--json names the answer itself, which would be lost")
    if args.check_options:
        return 0
    return run_command("check.py", lambda: check(args))


if __name__ == "__main__":
    sys.exit(main())
