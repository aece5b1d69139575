"""Exercises to the four lessons and the replayer: `python run_all_examples.py --exercise N` checks an answer."""
