"""One vLLM with the Redis connector, taken through what may happen to it; prints a line of JSON for each scenario."""

from __future__ import annotations

import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", PYTHONHASHSEED="0", VLLM_HOST_IP="127.0.0.1")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.inputs import tokens_input

from going_further.kv_stores import RedisStore
from going_further.shared_store import register_normal_weights

BLOCK, CHUNK, BLOCKS = 32, 256, 60


def prompt(number: int, tokens: int) -> list[int]:
    return [(number * 7 + n * n + n) % 600 + 20 for n in range(tokens)]


class Driver:
    """The engine, its store, and how often the scheduler took a running request's blocks away."""

    def __init__(self, model: str) -> None:
        self.store = RedisStore(None)
        self.llm = LLM(
            model=model, load_format=register_normal_weights(), kv_transfer_config=self.store.transfer_config(),
            block_size=BLOCK, max_model_len=1800, max_num_batched_tokens=CHUNK, max_num_seqs=8, enforce_eager=True,
            num_gpu_blocks_override=BLOCKS, gpu_memory_utilization=0.1, enable_prefix_caching=True,
        )  # fmt: skip
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.preempted, preempt = 0, self.scheduler._preempt_request

        def count(*args: object, **named: object) -> None:
            self.preempted += 1
            preempt(*args, **named)

        self.scheduler._preempt_request = count

    def ask(self, *prompts: list[int], salt: str | None = None, tokens: int = 1) -> list[tuple[int, int, float, int]]:
        """Return of each prompt: tokens found, the likeliest next token, its log probability, how many were written."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1, detokenize=False)
        inputs = [tokens_input(ids, cache_salt=salt) for ids in prompts]
        rows = []
        for output in self.llm.generate(inputs, params, use_tqdm=False):
            [written] = output.outputs
            first = written.token_ids[0]
            rows.append((output.num_cached_tokens, first, written.logprobs[0][first].logprob, len(written.token_ids)))
        return rows

    def tell(self, scenario: str, **facts: object) -> None:
        print("RESULT " + json.dumps({"scenario": scenario, **facts}), flush=True)

    def forget(self) -> None:
        """Empty the worker's own cache: it is as good as another worker. No old value is left to be right by chance."""
        assert self.llm.reset_prefix_cache()
        for layer in get_kv_transfer_group().layers:
            layer.copy_(3 * torch.randn(layer.shape))

    def values(self, keys: list[str]) -> torch.Tensor:
        """Return the numbers that the store holds under these keys, a row for each."""
        rows = [torch.frombuffer(bytearray(self.store.client.get(key)[16:]), dtype=torch.bfloat16) for key in keys]
        return torch.stack(rows).float()


def main() -> None:
    driver = Driver(sys.argv[1])
    long = prompt(1, 1500)
    computed, stored = driver.ask(long), len(driver.store.stored_keys())
    driver.forget()
    driver.tell("chunked prefill", computed=computed, stored=stored, loaded=driver.ask(long))

    driver.forget()
    driver.tell("another salt", found=driver.ask(long, salt="other"))

    many = [prompt(n, 100 + 40 * n) for n in range(2, 8)]
    one_by_one = [driver.ask(ids)[0] for ids in many]
    driver.forget()
    driver.tell("six at once", computed=one_by_one, loaded=driver.ask(*many))

    keys = driver.store.block_keys(driver.llm.llm_engine.vllm_config, long, None)
    right, touch = driver.values(keys), driver.scheduler.connector.touch

    def touch_and_lose(asked: list[str]) -> list[bool]:
        has = touch(asked)
        driver.store.client.delete(*keys[5:7])
        return has

    driver.forget()
    driver.scheduler.connector.touch = touch_and_lose
    lost = driver.ask(long)
    driver.scheduler.connector.touch = touch
    apart = (driver.values(keys) - right).abs().max().item()
    driver.forget()
    loaded = driver.ask(long)
    driver.tell("lost between look-up and load", computed=computed, recomputed=lost, loaded=loaded, apart=apart)

    driver.forget()
    driver.store.client.set(keys[3], b"too short")
    cut = driver.ask(long)
    apart = (driver.values(keys) - right).abs().max().item()
    driver.forget()
    loaded = driver.ask(long)
    driver.tell("a value that is cut off", computed=computed, recomputed=cut, loaded=loaded, apart=apart)

    driver.forget()
    driver.store.client.set(keys[3], bytes(16) + driver.store.client.get(keys[3])[16:])
    driver.tell("another kind of worker's value", computed=computed, recomputed=driver.ask(long))
    driver.store.client.delete(*keys)
    driver.forget()
    driver.ask(long)

    driver.store.client.config_set("maxmemory", 1)
    driver.forget()
    driver.tell("a store that is full", computed=computed, recomputed=driver.ask(long, salt="full"))
    driver.store.client.config_set("maxmemory", 0)

    writers = [prompt(n, 300) for n in range(20, 26)]
    written = driver.ask(*writers, tokens=120)
    driver.forget()
    driver.tell("preempted", times=driver.preempted, written=written, loaded=[driver.ask(ids)[0] for ids in writers])

    driver.store.stop()
    driver.forget()
    gone = driver.ask(long)
    driver.store.start()
    back = driver.ask(prompt(9, 500))
    driver.forget()
    driver.tell("gone and back", computed=computed, gone=gone, back=back, loaded=driver.ask(prompt(9, 500)))
    driver.store.stop()


if __name__ == "__main__":
    main()
