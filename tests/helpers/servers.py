"""vLLM's own OpenAI-compatible server, started for a test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from helpers.processes import left_behind

ROOT = Path(__file__).parent.parent.parent


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator:
    """Start vLLM's server with a cache of 64 blocks of 32 tokens; yield a client; end all its processes."""
    from openai import OpenAI

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", "built_in_model/cpu", "--load-format", "dummy", "--enforce-eager"),
        *("--block-size", "32", "--num-gpu-blocks-override", "65", "--max-model-len", "1024", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--enable-prompt-tokens-details"),
        *options,
    ]
    marked = os.environ | {"TMPDIR": str(folder), "SPT_NOENV": "1", "VLLM_NO_USAGE_STATS": "1"}
    marked["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent / "inductor")  # torch's, which is meant to stay
    with (folder / "log").open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=marked, start_new_session=True)
    try:
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                assert process.poll() is None, (folder / "log").read_text(errors="replace")[-4000:]
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.5)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0) as client:
            yield client
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = left_behind(folder, 20)
        assert not left, left
