"""Tools for engineers, run as `python -m going_further.NAME`; they build on the lessons."""
