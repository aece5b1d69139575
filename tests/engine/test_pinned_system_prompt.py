"""Pinned system prompts: the demonstration on the real engine, vLLM's real scheduler alone, and its real server."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import logging.handlers
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.processes import left_behind
from helpers.servers import serving

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "built_in_model" / "cpu"
SCHEDULER = "going_further.pinning_scheduler.PinningScheduler"


# --- the demonstration ---


@pytest.fixture(scope="module")
def run_demonstration(tmp_path_factory: pytest.TempPathFactory):
    def run(*options: str) -> tuple[subprocess.CompletedProcess[str], dict]:
        path = tmp_path_factory.mktemp("run") / "out.json"
        command = [sys.executable, "-m", "going_further.pinned_system_prompt", *options, "--json", str(path)]
        with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:  # short, for the sake of sockets
            environ = os.environ | {"TMPDIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
            assert left_behind(Path(folder)) == []
        assert "Traceback" not in done.stderr
        assert max(map(len, done.stdout.splitlines()), default=0) <= 80, done.stdout
        return done, json.loads(path.read_text()) if path.exists() else {}

    return run


def cached(result: dict, experiment: str, arm: str) -> list[int]:
    rows = [m for m in result["measurements"] if (m["experiment"], m["arm"]) == (experiment, arm)]
    return [m["cached_tokens"] for m in rows]


@pytest.fixture(scope="module")
def demonstration(run_demonstration):
    return run_demonstration("--prefix-tokens", "1000", "--requests", "3")


def test_every_prediction_and_claim_of_the_demonstration_holds(demonstration, check_result) -> None:
    done, result = demonstration
    assert done.returncode == 0, done.stdout + done.stderr
    check_result(result, "pinned_system_prompt")
    assert len(done.stdout.splitlines()) <= 40


def test_after_the_flood_nothing_is_left_without_a_pin_and_all_whole_blocks_with_one(demonstration) -> None:
    _, result = demonstration
    blocks = 1000 // 128
    assert cached(result, "before the flood", "bad") == cached(result, "before the flood", "good")
    assert cached(result, "main", "bad") == [0, 0, 0]
    assert cached(result, "main", "good") == [0, 128 * (blocks + 1), 128 * (blocks + 1)], "and instructions of 1024"


def test_what_the_pin_withholds_is_what_flood_and_tenant_lose(demonstration) -> None:
    _, result = demonstration
    pinned = cached(result, "main", "good")[-1]
    lost = sum(cached(result, "flood again", "bad")) - sum(cached(result, "flood again", "good"))
    assert lost == pinned * 2, "in two rounds"
    assert set(cached(result, "tenant", "bad")) == {pinned}
    assert set(cached(result, "tenant", "good")) == {0}


def test_the_scheduler_says_why_it_refuses_a_second_pin(demonstration) -> None:
    done, _ = demonstration
    assert "pins would withhold 16 blocks, 9 are allowed" in done.stdout


def test_deeper_runs_on_another_architecture_template_and_block_size(
    run_demonstration, check_result, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "llama")
    sizes = ["--prefix-tokens", "1000", "--requests", "2", "--block-size", "32", "--deeper"]
    done, result = run_demonstration("--model", str(model), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    check_result(result, "pinned_system_prompt")
    left = [cached(result, f"flood {eighths}/8", "bad")[1] for eighths in (2, 4, 5, 6, 7, 8)]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-2] > left[-1] == 0, "the larger the flood, the less is left"


def test_without_prefix_caching_the_claims_fail(run_demonstration) -> None:
    done, result = run_demonstration("--prefix-tokens", "600", "--requests", "2", "--no-prefix-caching")
    assert done.returncode == 1
    failed = {claim["claim"] for claim in result["claims"] if not claim["holds"]}
    assert "with a pin all its whole blocks are left" in failed
    assert "its blocks are not in the prefix cache" in done.stdout


# --- vLLM's scheduler alone: what no timing on an engine would reach for certain ---

BLOCK = 32
BLOCKS = 41  # of which vLLM keeps one


class Desk:
    """vLLM's scheduler with `PinningScheduler` on top, fed by hand: what it schedules is taken as computed."""

    def __init__(self, windows: tuple[int | None, ...] = (None,), pinning: dict | None = None, **more) -> None:
        import torch
        from vllm import AsyncEngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from going_further.pinning_scheduler import PinningScheduler

        config = AsyncEngineArgs(
            model=str(MODEL), load_format="dummy", block_size=BLOCK, additional_config={"pinning": pinning or {}},
            scheduler_cls=SCHEDULER, **dict(max_model_len=640, max_num_batched_tokens=640) | more,
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = BLOCKS
        shape = dict(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        specs = [SlidingWindowSpec(**shape, sliding_window=w) if w else FullAttentionSpec(**shape) for w in windows]
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = PinningScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=BLOCKS, kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec([f"layer {n}"], spec) for n, spec in enumerate(specs)],
            ),
            structured_output_manager=StructuredOutputManager(config), block_size=BLOCK, log_stats=True,
        )  # fmt: skip
        self.numbers = itertools.count()

    def send(self, ids: list[int], max_tokens: int = 1, **asks: object):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=asks or None)
        params.update_from_generation_config({}, 2)
        request = Request(str(next(self.numbers)), ids, params, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> list:
        """Schedule, and return what the requests put out: one token each, once the whole prompt is computed."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled = self.scheduler.schedule()
        names = list(scheduled.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        sampled = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
        output = ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, sampled_token_ids=sampled)
        by_client = self.scheduler.update_from_output(scheduled, output)
        return [output for outputs in by_client.values() for output in outputs.outputs]

    def finish(self) -> dict[str, dict | None]:
        """Step until nothing is left to do; return the answers by request."""
        answers = {}
        for _ in range(400):
            for output in self.step():
                answers[output.request_id] = (output.kv_transfer_params or {}).get("pinning")
            if not self.scheduler.requests:
                return answers
        pytest.fail(f"still waiting: {list(self.scheduler.requests)}")

    def ask(self, ids: list[int], **asks: object) -> tuple[int, dict | None]:
        """Return the cached tokens and the scheduler's answer."""
        request = self.send(ids, **asks)
        outputs = self.step()
        assert [output.request_id for output in outputs] == [request.request_id]
        answer = (outputs[0].kv_transfer_params or {}).get("pinning")
        return outputs[0].prefill_stats.num_cached_tokens, answer

    def flood(self) -> None:
        for _ in range(BLOCKS):
            self.ask(unique(4 * BLOCK))

    def free_blocks(self) -> int:
        return self.scheduler.block_pool.get_num_free_blocks()


counter = itertools.count(100_000)


def unique(length: int) -> list[int]:
    return [next(counter) for _ in range(length)]


def test_a_pinned_prefix_survives_a_flood_and_an_unpinned_one_does_not() -> None:
    desk, pinned, other = Desk(), unique(5 * BLOCK + 9), unique(5 * BLOCK + 9)
    assert desk.ask(pinned, pin_tokens=5 * BLOCK + 9) == (
        0,
        {"pinned_tokens": 5 * BLOCK, "withheld_blocks": 5, "refused": None},
    )
    assert desk.ask(other) == (0, None), "who asks for nothing gets no answer"
    assert desk.ask(other)[0] == 5 * BLOCK
    desk.flood()
    assert desk.ask(other)[0] == 0
    assert desk.ask(pinned)[0] == 5 * BLOCK
    assert desk.free_blocks() == BLOCKS - 1 - 5


def test_only_whole_blocks_are_pinned() -> None:
    desk, ids = Desk(), unique(5 * BLOCK)
    assert desk.ask(ids, pin_tokens=3 * BLOCK - 1)[1]["pinned_tokens"] == 2 * BLOCK
    desk.flood()
    assert desk.ask(ids)[0] == 2 * BLOCK


def test_equal_prefixes_count_once_and_a_longer_one_counts_what_it_adds() -> None:
    desk, prefix = Desk(), unique(4 * BLOCK)
    for _ in range(3):
        assert desk.ask(prefix + unique(BLOCK), pin_tokens=4 * BLOCK)[1]["withheld_blocks"] == 4
    longer = prefix + unique(3 * BLOCK)
    assert desk.ask(longer, pin_tokens=6 * BLOCK)[1] == {
        "pinned_tokens": 6 * BLOCK,
        "withheld_blocks": 6,
        "refused": None,
    }
    assert desk.free_blocks() == BLOCKS - 1 - 6


def test_the_same_prefix_computed_twice_at_once_counts_once() -> None:
    desk, prefix = Desk(), unique(4 * BLOCK)
    for _ in range(2):
        desk.send(prefix, pin_tokens=4 * BLOCK)  # whole blocks: the last one is computed by both
    assert {answer["withheld_blocks"] for answer in desk.finish().values()} == {4}
    assert desk.free_blocks() == BLOCKS - 1 - 4


def test_a_release_gives_back_the_pins_of_its_own_prompt_and_no_others() -> None:
    desk, one, two = Desk(), unique(4 * BLOCK), unique(3 * BLOCK)
    desk.ask(one + unique(9), pin_tokens=4 * BLOCK)
    desk.ask(two + unique(9), pin_tokens=3 * BLOCK)
    assert desk.ask(one + unique(9), unpin="prefix")[1] == {"released": 1, "withheld_blocks": 3, "refused": None}
    desk.flood()
    assert desk.ask(one + unique(9))[0] == 0
    assert desk.ask(two + unique(9))[0] == 3 * BLOCK


def test_a_block_of_two_pins_stays_until_both_are_released() -> None:
    desk, prefix = Desk(), unique(2 * BLOCK)
    longer = prefix + unique(2 * BLOCK)
    desk.ask(longer + unique(9), pin_tokens=4 * BLOCK)
    desk.ask(prefix + unique(9), pin_tokens=2 * BLOCK)
    assert desk.ask(prefix + unique(9), unpin="prefix")[1] == {"released": 1, "withheld_blocks": 4, "refused": None}
    desk.flood()
    assert desk.ask(longer + unique(9))[0] == 4 * BLOCK
    assert desk.ask(longer + unique(9), unpin="prefix")[1] == {"released": 1, "withheld_blocks": 0, "refused": None}
    assert desk.free_blocks() == BLOCKS - 1


def test_the_cache_is_reset_once_all_pins_are_released() -> None:
    desk = Desk()
    for _ in range(2):
        desk.ask(unique(2 * BLOCK), pin_tokens=2 * BLOCK)
    assert not desk.scheduler.reset_prefix_cache()
    assert desk.ask(unique(9), unpin="all")[1] == {"released": 2, "withheld_blocks": 0, "refused": None}
    assert desk.scheduler.reset_prefix_cache()


def test_before_vllm_sleeps_or_changes_weights_pins_are_released_and_the_cache_is_reset() -> None:
    desk, prefix = Desk(), unique(2 * BLOCK)
    desk.ask(prefix + unique(9), pin_tokens=2 * BLOCK)
    desk.send(unique(3 * BLOCK), max_tokens=50)
    desk.step()
    assert desk.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert (desk.scheduler.pins, desk.scheduler.withheld) == ({}, set())
    desk.finish()
    assert desk.ask(prefix + unique(9)) == (0, None)
    assert desk.free_blocks() == BLOCKS - 1


def test_pins_never_exceed_their_share_and_beyond_it_a_request_runs_unpinned() -> None:
    desk = Desk(pinning={"share": 0.25})  # 10 of 40 blocks
    assert desk.ask(unique(6 * BLOCK), pin_tokens=6 * BLOCK)[1]["refused"] is None
    found, answer = desk.ask(unique(5 * BLOCK), pin_tokens=5 * BLOCK)
    assert (found, answer["pinned_tokens"], answer["withheld_blocks"]) == (0, 0, 6)
    assert answer["refused"] == "pins would withhold 11 blocks, 10 are allowed"
    assert desk.ask(unique(4 * BLOCK), pin_tokens=4 * BLOCK)[1]["withheld_blocks"] == 10


def test_a_request_of_the_greatest_length_always_fits_beside_the_pins() -> None:
    desk = Desk(pinning={"share": 0.9})  # of 40 blocks, 20 of which such a request may need
    for _ in range(12):
        desk.ask(unique(2 * BLOCK), pin_tokens=2 * BLOCK)
    assert desk.free_blocks() == 20
    assert desk.ask(unique(639))[0] == 0


def test_a_request_ended_while_its_prompt_is_half_computed_pins_nothing() -> None:
    from vllm.v1.request import RequestStatus

    desk, ids = Desk(max_num_batched_tokens=4 * BLOCK, max_num_seqs=4), unique(10 * BLOCK)
    request = desk.send(ids, pin_tokens=2 * BLOCK)
    assert desk.step() == [], "the first chunk of three"
    desk.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert desk.free_blocks() == BLOCKS - 1


def test_a_request_ended_while_it_answers_is_pinned() -> None:
    from vllm.v1.request import RequestStatus

    desk, ids = Desk(), unique(4 * BLOCK)
    request = desk.send(ids, max_tokens=50, pin_tokens=4 * BLOCK)
    assert len(desk.step()) == 1
    desk.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert desk.free_blocks() == BLOCKS - 1 - 4


def test_preemption_takes_no_pinned_block_and_pins_when_the_request_is_done() -> None:
    desk, prefix = Desk(), unique(6 * BLOCK)
    desk.ask(prefix + unique(9), pin_tokens=6 * BLOCK)
    requests = [desk.send(unique(10 * BLOCK), max_tokens=200, pin_tokens=2 * BLOCK) for _ in range(3)]
    answers = desk.finish()
    assert sum(request.num_preemptions for request in requests) > 0, "three times 17 blocks do not fit into 34"
    assert [answer["refused"] for answer in answers.values() if answer].count(None) == 2
    assert desk.ask(prefix + unique(9))[0] == 6 * BLOCK
    assert desk.free_blocks() == BLOCKS - 1 - 10, "10 of 40 may be pinned"


def test_a_request_ended_while_it_is_preempted_pins_nothing() -> None:
    from vllm.v1.request import RequestStatus

    desk = Desk()
    requests = [desk.send(unique(10 * BLOCK), max_tokens=300, pin_tokens=2 * BLOCK) for _ in range(3)]
    while not (preempted := [r for r in requests if r.status == RequestStatus.PREEMPTED]):
        desk.step()
    assert preempted[0].num_output_tokens > 0
    desk.scheduler.finish_requests([r.request_id for r in preempted], RequestStatus.FINISHED_ABORTED)
    assert (desk.scheduler.pins, desk.scheduler.withheld) == ({}, set())
    desk.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert desk.free_blocks() == BLOCKS - 1 - 2 * (3 - len(preempted))


@pytest.mark.parametrize("value", [0, -1, 200, 1.5, "64", True, [64], "all of it"])
def test_a_senseless_wish_is_refused_and_the_request_served(value: object) -> None:
    desk = Desk()
    assert "whole number" in desk.ask(unique(3 * BLOCK), pin_tokens=value)[1]["refused"]
    assert '"prefix" or "all"' in desk.ask(unique(3 * BLOCK), unpin=value)[1]["refused"]
    assert desk.free_blocks() == BLOCKS - 1


def test_a_prefix_shorter_than_a_block_is_refused() -> None:
    assert "shorter than a block of 32" in Desk().ask(unique(3 * BLOCK), pin_tokens=BLOCK - 1)[1]["refused"]


def chat(tokenizer, *messages: tuple[str, str]) -> list[int]:
    text = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


LONG = "The agent reads, decides, answers and remembers what was said before. " * 12


def test_the_system_message_of_a_chat_is_pinned_by_itself_and_no_other_message(tokenizer) -> None:
    desk = Desk(pinning={"system_message": True})
    ids = chat(tokenizer, ("system", LONG), ("user", LONG))
    length = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1
    assert desk.ask(ids)[1] == {
        "pinned_tokens": length // BLOCK * BLOCK,
        "withheld_blocks": length // BLOCK,
        "refused": None,
    }
    assert desk.ask(chat(tokenizer, ("user", LONG)))[1] is None
    assert desk.ask(chat(tokenizer, ("system", "Be kind."), ("user", LONG)))[1] is None, "shorter than a block"
    assert desk.ask(ids, unpin="prefix")[1]["released"] == 1


def test_a_given_end_of_message_token_ends_the_first_message_whatever_it_is(tokenizer) -> None:
    desk = Desk(pinning={"system_message": True, "end_of_message": tokenizer.eos_token_id})
    assert desk.ask(chat(tokenizer, ("user", LONG)))[1]["refused"] is None
    assert desk.ask(unique(5 * BLOCK))[1] is None


def test_a_refused_system_message_stands_in_the_log_once(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(pinning={"system_message": True, "share": 0.03})
    log, records = logging.getLogger("vllm.going_further.pinning_scheduler"), queue.SimpleQueue()
    caplog.set_level(logging.WARNING, log.name)  # the replayer, in the same process, asks vLLM for less
    log.addHandler(handler := logging.handlers.QueueHandler(records))
    for longer in ("", "And it is kind. " * 8, "And it is patient. " * 16):
        desk.ask(chat(tokenizer, ("system", LONG + longer), ("user", "a")))
    log.removeHandler(handler)
    assert records.qsize() == 1
    assert records.get().getMessage().startswith("a system message is not pinned: pins would withhold")


def test_marks_of_a_system_message_are_found_in_the_template(tokenizer) -> None:
    from going_further.pinning_scheduler import system_message_marks

    start = tokenizer.encode("<|im_start|>system")
    assert system_message_marks(tokenizer) == (start, tokenizer.convert_tokens_to_ids("<|im_end|>"))


HEADED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
DATED = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}<|im_start|>system\n"
    "{% if tools %}Environment: shell\n{% endif %}Today Date: {{ strftime_now('%H:%M:%S') }}\n\n{{ system }}<|im_end|>"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(("template", "start"), [(HEADED, "<|im_start|>system"), (DATED, "<|im_start|>")])
def test_the_start_of_a_system_message_holds_no_date_and_nothing_of_tools(template: str, start: str) -> None:
    from transformers import AutoTokenizer

    from going_further.pinning_scheduler import system_message_marks

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    assert system_message_marks(tokenizer)[0] == tokenizer.encode(start)
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "Hello."}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert tokenizer.encode(text)[: len(tokenizer.encode(start))] == tokenizer.encode(start)


@pytest.mark.parametrize(
    "template",
    [
        None,  # write_llama's own: [/system] is text
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}",
        "{{ messages[1].content }}",
    ],
)
def test_a_template_without_an_end_of_the_system_message_is_refused(template: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from going_further.pinning_scheduler import system_message_marks

    model = write_llama(tmp_path / "llama", **{"template": template} if template else {})
    with pytest.raises(ValueError, match=r'give its id as \{"pinning": \{"end_of_message": ID\}\}'):
        system_message_marks(AutoTokenizer.from_pretrained(model))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pinning": {"part": 0.5}}, "unknown part: choose from share, system_message, end_of_message"),
        ({"pinning": {"share": 1.0}}, "share is a part of the KV cache between 0 and 1, not 1.0"),
        ({"pinning": {"share": "half"}}, "between 0 and 1, not 'half'"),
        ({"pinning": {"system_message": "yes"}}, "system_message is true or false"),
        ({"pinning": {"end_of_message": "<|im_end|>"}}, "the id of a token"),
        ({"pinning": {"share": 0.01}}, "nothing can be pinned"),
        ({"max_model_len": 40 * BLOCK}, "of which 0 are left beside a request of --max-model-len"),
        ({"windows": (None, 64)}, "only a model with full attention in every layer"),
        ({"windows": (64,)}, "only a model with full attention in every layer"),
    ],
)
def test_what_cannot_be_pinned_is_refused_at_the_start(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        Desk(**options)


def test_a_kv_connector_is_refused_at_the_start() -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(ValueError, match="pins and a KV connector"):
        Desk(kv_transfer_config=connector)


def test_this_is_all_of_vllm_that_pins_rely_on() -> None:
    from going_further.pinning_scheduler import RELIES_ON

    assert {f"{owner.__name__}.{name}({parameters})" for owner, name, parameters in RELIES_ON} == {
        "Scheduler.__init__(vllm_config kv_cache_config block_size)",
        "Scheduler._free_request(request delay_free_blocks)",
        "Scheduler.reset_prefix_cache(reset_running_requests reset_connector)",
        "KVCacheConfig.__init__(kv_cache_groups)",
        "KVCacheGroupSpec.__init__(kv_cache_spec)",
        "KVCacheBlocks.__init__(blocks)",
        "KVCacheBlock.__init__(block_id)",
        "KVCacheManager.get_blocks(request_id)",
        "BlockPool.touch(blocks)",
        "BlockPool.free_blocks(ordered_blocks)",
        "KVCacheBlock.block_hash()",
        "Request.__init__(request_id prompt_token_ids sampling_params)",
        "Request.num_output_tokens()",
    }


@pytest.mark.parametrize("gone", ["_free_request", "get_blocks", "touch", "free_blocks", "block_hash"])
def test_a_vllm_without_one_of_them_is_an_error_that_names_it(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from going_further.pinning_scheduler import RELIES_ON, check_internals

    owner = next(owner for owner, name, _ in RELIES_ON if name == gone)
    monkeypatch.delattr(owner, gone)
    with pytest.raises(RuntimeError, match=rf"has no {owner.__name__}\.{gone}: pins work with vLLM 0.26 to 0.32"):
        check_internals()


def test_a_scheduler_without_what_is_read_from_it_is_an_error_that_names_it() -> None:
    from going_further.pinning_scheduler import check_attributes

    scheduler = Desk().scheduler
    check_attributes(scheduler)
    del scheduler.kv_cache_manager.block_pool
    with pytest.raises(RuntimeError, match=r"has no kv_cache_manager\.block_pool: pins work with 0.26 to 0.32"):
        check_attributes(scheduler)


def test_a_request_that_is_freed_without_a_tuple_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from going_further.pinning_scheduler import check_internals

    def _free_request(self, request, delay_free_blocks=False) -> None: ...

    monkeypatch.setattr(Scheduler, "_free_request", _free_request)
    with pytest.raises(RuntimeError, match="returns None, no tuple"):
        check_internals()


def test_a_vllm_in_which_a_parameter_is_gone_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.block_pool import BlockPool

    from going_further.pinning_scheduler import check_internals

    monkeypatch.setattr(BlockPool, "touch", lambda self, block: None)
    with pytest.raises(RuntimeError, match=r"has no blocks of BlockPool.touch"):
        check_internals()


# --- behind vLLM's OpenAI-compatible server, with the plain client ---

SYSTEM = "You are the support agent of a web shop. " + LONG * 3


@contextlib.contextmanager
def server(folder: Path, pinning: dict) -> Iterator:
    """Start vLLM's server with a cache of 64 blocks of 32 tokens; yield a client; end all its processes."""
    pins = ("--scheduler-cls", SCHEDULER, "--additional-config", json.dumps({"pinning": pinning}))
    with serving(folder, *pins) as client:
        yield client


def ask(client, *messages: tuple[str, str], **asks: object) -> tuple[int, dict | None]:
    """Return the cached tokens of a chat request and the scheduler's answer."""
    done = client.chat.completions.create(
        model="built_in_model/cpu", messages=[{"role": role, "content": content} for role, content in messages],
        max_tokens=1, extra_body={"vllm_xargs": asks} if asks else None,
    )  # fmt: skip
    details, answer = done.usage.prompt_tokens_details, done.model_extra["kv_transfer_params"]
    return details.cached_tokens if details else 0, answer and answer["pinning"]


def flood(client) -> None:
    for n in range(10):
        ask(client, ("user", f"{n} is the number of this ticket. {LONG * 3}"))


@pytest.fixture(scope="module")
def whole_blocks(tokenizer) -> int:
    ids = chat(tokenizer, ("system", SYSTEM), ("user", "Where is my parcel?"))
    return (ids.index(tokenizer.eos_token_id) + 1) // 32 * 32


def test_behind_the_server_a_plain_client_keeps_its_system_message_through_a_flood(whole_blocks, temporary) -> None:
    with server(temporary, {"share": 0.4, "system_message": True}) as client:
        found = [ask(client, ("system", SYSTEM), ("user", "Where is my parcel?"))[0]]
        found.append(ask(client, ("system", SYSTEM), ("user", "How do I send back shoes?"))[0])
        flood(client)
        after, answer = ask(client, ("system", SYSTEM), ("user", "Please cancel the second item."))
        assert [*found, after] == [0, whole_blocks, whole_blocks]
        assert answer == {"pinned_tokens": whole_blocks, "withheld_blocks": whole_blocks // 32, "refused": None}
        assert ask(client, ("system", f"Another one. {SYSTEM}"), ("user", "Hello."))[1]["pinned_tokens"] == 0
        refusal = f"a system message is not pinned: pins would withhold {whole_blocks // 16} blocks, 25 are allowed"
        assert (temporary / "log").read_text().count(refusal) == 1
        assert ask(client, ("user", "Hello."), unpin="all")[1]["released"] == 1
        flood(client)
        assert ask(client, ("system", SYSTEM), ("user", "Hello."))[0] == 0


def test_behind_the_server_without_the_automatic_pin_only_who_asks_keeps_it(whole_blocks, temporary) -> None:
    with server(temporary, {"share": 0.4}) as client:
        prompt = ("system", SYSTEM), ("user", "Where is my parcel?")
        assert ask(client, *prompt) == (0, None)
        flood(client)
        after, answer = ask(client, *prompt, pin_tokens=whole_blocks)
        assert after == 0
        assert answer == {"pinned_tokens": whole_blocks, "withheld_blocks": whole_blocks // 32, "refused": None}
        flood(client)
        assert ask(client, *prompt)[0] == whole_blocks
        assert ask(client, *prompt, unpin="prefix")[1]["released"] == 1
        flood(client)
        assert ask(client, *prompt) == (0, None)
