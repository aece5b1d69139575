"""The parts of `python -m going_further.replay_request_log`: readers, rendering, comparing, caches, output."""
