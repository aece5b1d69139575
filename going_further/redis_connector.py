"""A KV connector for vLLM that keeps the KV of every full block in Redis or Valkey, for all workers that ask there.

  PYTHONHASHSEED=0 REDIS_PASSWORD=... python -m vllm.entrypoints.openai.api_server --model M --no-async-scheduling \\
    --kv-transfer-config '{
      "kv_connector": "RedisConnector", "kv_connector_module_path": "going_further.redis_connector",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"url": "redis://127.0.0.1:6379", "namespace": "kv", "ttl_seconds": 3600}}'

url          of the server: redis://, rediss:// or unix://; its password comes from the environment, REDIS_PASSWORD
namespace    what all keys begin with (default: "kv"). It stands for the weights, adapters (LoRA) included, whose names
             alone are in the hash: new weights need another one
ttl_seconds  how long a block is kept after it was last asked for (default: for ever, or as the server evicts)

The key of a block is vLLM's own hash over the block and all before it (SHA-256, salt included), its value the block's
keys and values of all layers. A worker that is asked for a prompt counts the leading blocks that it lacks and the
store has; they are loaded before the step, and only what is left is computed. Blocks that became full are stored at
the end of their step. What goes wrong with the store costs time, no request: not reached, it has nothing (a step
waits two seconds for one that does not answer); a block that was evicted after it was counted is computed. All
workers need the same PYTHONHASHSEED and hash algorithm, or none finds what another stored. Whoever can write to the
store decides what the models read: nobody else should reach it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from urllib.parse import urlsplit

import torch
from valkey import Valkey
from valkey.exceptions import ValkeyError

try:
    from vllm import __version__ as vllm_version
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.logger import init_logger
    from vllm.v1.kv_cache_interface import FullAttentionSpec
except ImportError as error:
    raise ImportError(f"this vLLM is not one that this connector works with, 0.26 to 0.32: {error}") from error

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that it goes where vLLM's own log goes

TIMEOUT = 2.0  # seconds that a step, and all requests with it, wait for a store that does not answer
BATCH = 64  # blocks that are moved at once: each is in memory several times
TAG_BYTES = 16  # of a value: what kind of worker wrote it
STORE_ERRORS = (ValkeyError, OSError, TypeError, ValueError)  # the last two: an answer that is none of a store


def key_prefix(vllm_config, namespace: str) -> str:
    """Return what all keys of workers begin with that can use each other's blocks."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    weights = (model.model, model.revision, model.quantization, model.hf_overrides)
    kind = (weights, model.dtype, cache.cache_dtype, cache.block_size, cache.prefix_caching_hash_algo)
    return f"{namespace}:{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}:"


@dataclasses.dataclass
class Transfers(KVConnectorMetadata):
    """What one step moves: number of a block in the KV cache -> its key in the store."""

    load: dict[int, str] = dataclasses.field(default_factory=dict)
    save: dict[int, str] = dataclasses.field(default_factory=dict)


class TransferStats(KVConnectorStats):
    """What was moved since the last report, by operation: a record of bytes and seconds for each time."""

    def reset(self) -> None:
        self.data = {}

    def record(self, operation: str, num_bytes: int, began: float) -> None:
        seconds = time.perf_counter() - began
        self.data.setdefault(operation, []).append({"num_bytes": num_bytes, "duration_seconds": seconds})

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for operation, records in other.data.items():
            self.data.setdefault(operation, []).extend(records)
        return self

    def reduce(self) -> dict[str, float]:
        return {f"{name} bytes": sum(r["num_bytes"] for r in records) for name, records in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class RedisConnector(KVConnectorBase_V1):
    """Both halves of a connector: the scheduler's counts what the store has, the worker's loads and stores it."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer, groups = vllm_config.kv_transfer_config, kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            raise ValueError("only a model whose KV cache is one group of whole prefixes can have its blocks stored: "
                             f"that of this one has {len(groups)} groups")  # fmt: skip
        if vllm_config.parallel_config.world_size > 1:
            raise ValueError("a worker's part of a model's KV is no other worker's: one GPU a model, please")
        if vllm_config.scheduler_config.async_scheduling:
            raise ValueError("a load that fails would be known one step too late: start with --no-async-scheduling")
        if transfer.kv_load_failure_policy != "recompute":
            raise ValueError('a block may be evicted before it is loaded: set "kv_load_failure_policy": "recompute"')
        options = {"url": None, "namespace": "kv", "ttl_seconds": None} | transfer.kv_connector_extra_config
        if unknown := set(options) - {"url", "namespace", "ttl_seconds"}:
            raise ValueError(f"unknown {', '.join(unknown)}: choose from url, namespace, ttl_seconds")
        url, namespace, self.ttl = options.values()
        if not isinstance(url, str) or not (self.ttl is None or (type(self.ttl) is int and self.ttl > 0)):
            raise ValueError('give {"url": "redis://HOST:PORT"}, and ttl_seconds as a whole number, if at all')
        if urlsplit(url).password is not None:
            raise ValueError("no password in the url, which vLLM writes into its log: put it into REDIS_PASSWORD")
        limits = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
        self.store = Valkey.from_url(url, password=os.environ.get("REDIS_PASSWORD"), **limits)
        self.block_size: int = vllm_config.cache_config.block_size
        self.prefix = key_prefix(vllm_config, namespace)
        self.requests = {}  # scheduler: vLLM's Request, by id, until it is finished
        self.blocks: dict[str, list[int]] = {}  # scheduler: the numbers of a request's blocks
        self.to_load: dict[str, int] = {}  # scheduler: how many blocks the step to come loads for a request
        self.saved: dict[str, int] = {}  # scheduler: how many blocks of a request were stored
        self.failed: set[int] = set()  # worker: blocks that were to be loaded, until vLLM asks
        self.has_failed = False  # worker: in this step
        self.stats = TransferStats()

    def keys(self, block_hashes: list[bytes]) -> list[str]:
        return [self.prefix + block_hash.hex() for block_hash in block_hashes]

    def touch(self, keys: list[str]) -> list[bool]:
        """Say of each key whether the store has it. To ask keeps it there: its time to live begins anew."""
        pipeline = self.store.pipeline(transaction=False)
        for key in keys:
            pipeline.expire(key, self.ttl) if self.ttl else pipeline.touch(key)
        return list(map(bool, pipeline.execute()))

    # --- the scheduler's half ---

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens the store has beyond those of the worker's own cache, and that they load at once."""
        if request.skip_reading_prefix_cache:
            return 0, False
        own, most = num_computed_tokens // self.block_size, (request.num_tokens - 1) // self.block_size
        try:
            has = self.touch(self.keys(request.block_hashes[own:most]))
        except STORE_ERRORS as error:
            logger.warning("the store has nothing: %s", error)
            return 0, False
        return self.block_size * (has.index(False) if False in has else len(has)), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self.requests[request.request_id] = request
        self.to_load[request.request_id] = num_external_tokens // self.block_size

    def build_connector_meta(self, scheduler_output) -> Transfers:
        transfers, scheduled = Transfers(), scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
            self.plan(transfers, new.req_id, new.num_computed_tokens, scheduled[new.req_id])
        running = scheduler_output.scheduled_cached_reqs
        for request, blocks, computed in zip(
            running.req_ids, running.new_block_ids, running.num_computed_tokens, strict=True
        ):
            if request in running.resumed_req_ids:
                self.blocks[request] = []  # it was preempted: all its blocks are new
            self.blocks[request] += blocks[0] if blocks else []
            self.plan(transfers, request, computed, scheduled[request])
        return transfers

    def plan(self, transfers: Transfers, request: str, computed: int, scheduled: int) -> None:
        """Add what a request needs: `computed` tokens have KV before the step, those that it loads among them."""
        blocks, keys = self.blocks[request], self.keys(self.requests[request].block_hashes)
        before, load = computed // self.block_size, self.to_load.pop(request, 0)
        # A block's hash is known once its last token is; and after a failed load blocks are computed once more.
        after = min((computed + scheduled) // self.block_size, len(keys))
        transfers.load |= zip(blocks[before - load : before], keys[before - load : before], strict=True)
        first = min(self.saved.get(request, 0), before)
        transfers.save |= zip(blocks[first:after], keys[first:after], strict=True)
        self.saved[request] = after

    def request_finished(self, request, block_ids: list[int]) -> tuple[bool, None]:
        for of_requests in (self.requests, self.blocks, self.to_load, self.saved):
            of_requests.pop(request.request_id, None)
        return False, None

    # --- the worker's half ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the layers' tensors, in the order of their names, blocks first. Backends have them first or second."""
        count, self.layers = self._kv_cache_config.num_blocks, []
        for name in sorted(kv_caches):
            kv = kv_caches[name]
            dimension = 0 if kv.shape[0] % count == 0 else 1
            if kv.shape[dimension] % count:
                raise ValueError(f"no dimension of {name} counts {count} blocks: {tuple(kv.shape)}")
            self.layers.append(kv.movedim(dimension, 0).unflatten(0, (count, -1)))  # a kernel's block may be smaller
        self.sizes = [layer[0].numel() * layer.element_size() for layer in self.layers]
        shapes = [(tuple(layer.shape[1:]), layer.dtype) for layer in self.layers]  # equal numbers of bytes may differ
        kind = (vllm_version, torch.backends.cpu.get_cpu_capability(), self.layers[0].device.type, shapes)
        self.tag = hashlib.sha256(repr(kind).encode()).digest()[:TAG_BYTES]

    def bind_connector_metadata(self, connector_metadata: Transfers) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.has_failed = False

    def start_load_kv(self, forward_context, **kwargs: object) -> None:
        load, began, moved = list(self._get_connector_metadata().load.items()), time.perf_counter(), 0
        for start in range(0, len(load), BATCH):
            moved += self.load(dict(load[start : start + BATCH]))
        if load:
            self.stats.record("load_get", moved, began)

    def load(self, blocks: dict[int, str]) -> int:
        """Load blocks into the KV cache; return the bytes. What cannot be loaded is `failed`."""
        moved, unusable = 0, []
        try:
            values = self.store.mget(list(blocks.values()))
        except STORE_ERRORS as error:
            logger.warning("%d blocks are computed: %s", len(blocks), error)
            values = [b""] * len(blocks)
        for (block, key), value in zip(blocks.items(), values, strict=True):
            if value is None or len(value) != TAG_BYTES + sum(self.sizes):
                unusable += [] if value == b"" else [key]
            elif value[:TAG_BYTES] != self.tag:
                logger.warning_once("blocks of another kind of worker are in the store: choose another namespace")
            else:
                parts = torch.frombuffer(bytearray(value[TAG_BYTES:]), dtype=torch.uint8).split(self.sizes)
                for layer, part in zip(self.layers, parts, strict=True):
                    layer[block].copy_(part.view(layer.dtype).view(layer[block].shape))
                moved += len(value)
                continue
            self.failed.add(block)
            self.has_failed = True
        if unusable:
            logger.warning("%d blocks are not in the store any more, or cut off: they are computed", len(unusable))
            with contextlib.suppress(*STORE_ERRORS):
                self.store.unlink(*unusable)  # else they would be taken for stored
        return moved

    def wait_for_save(self) -> None:
        save, began, moved = list(self._get_connector_metadata().save.items()), time.perf_counter(), 0
        if self.has_failed:
            return  # the step has computed on what was not there
        try:
            for start in range(0, len(save), BATCH):
                moved += self.save(dict(save[start : start + BATCH]))
        except STORE_ERRORS as error:
            logger.warning("blocks are not stored: %s", type(error).__name__)  # its text may hold what was to be stored
        if moved:
            self.stats.record("save_put", moved, began)

    def save(self, blocks: dict[int, str]) -> int:
        """Store the blocks that the store lacks; return the bytes."""
        sizes, pipeline = [], self.store.pipeline(transaction=False)
        for (block, key), known in zip(blocks.items(), self.touch(list(blocks.values())), strict=True):
            if not known:
                parts = [layer[block].contiguous().view(torch.uint8).flatten() for layer in self.layers]
                value = self.tag + torch.cat(parts).cpu().numpy().tobytes()
                pipeline.set(key, value, ex=self.ttl)
                sizes.append(len(value))
        answers = pipeline.execute(raise_on_error=False)
        if refused := [answer for answer in answers if isinstance(answer, Exception)]:
            logger.warning("the store refuses %d blocks: %s", len(refused), type(refused[0]).__name__)
        return sum(size for size, answer in zip(sizes, answers, strict=True) if not isinstance(answer, Exception))

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self.failed = self.failed, set()
        return failed

    def get_kv_connector_stats(self) -> TransferStats | None:
        stats, self.stats = self.stats, TransferStats()
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict | None = None) -> TransferStats:
        return TransferStats(data=data or {})

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: object) -> None:
        """All layers are stored after the step."""
