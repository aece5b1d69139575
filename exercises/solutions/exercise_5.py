"""A solution to exercise 5: the account's budget, a tool's description, and the oldest messages, which were cut off.

Measured (built-in model, blocks of 128): 3 of 3 breaks, 4,608 of 4,608 lost tokens explained.
"""

from __future__ import annotations


def breaks() -> list[tuple[int, str, str]]:
    """Return the three breaks, each as line, kind and place."""
    return [
        (3, "system message changed", "message 0 (system) field .budget.used"),
        (5, "tools changed", "tools[4].function.description"),
        (7, "message removed", "message 1 (user)"),
    ]
