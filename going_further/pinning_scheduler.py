"""A scheduler for vLLM that keeps chosen prefixes in the KV cache: no other request can take their blocks.

  python -m vllm.entrypoints.openai.api_server --model M \\
      --scheduler-cls going_further.pinning_scheduler.PinningScheduler \\
      --additional-config '{"pinning": {"share": 0.25, "system_message": true}}'

share           at most this part of the KV cache is pinned (default: 0.25)
system_message  pin the system message of every chat request by itself: a prompt that starts as the chat template
                starts a system message, up to its first end-of-message token (default: false)
end_of_message  the id of that token; without it, token and start are found in the template of the model's tokenizer.
                Give it where the server runs with another template (--chat-template). Then every prompt is pinned up
                to its first such token, also one that has no system message.

A request asks through `SamplingParams.extra_args`, over HTTP in `vllm_xargs`:
{"pin_tokens": N} pins the whole blocks of the prompt's first N tokens, {"unpin": "prefix"} releases every pin that this
prompt starts with, {"unpin": "all"} every pin. All of it happens when the request ends. Whoever may send requests may
do so: nobody else should reach the server. Pins do not age. A clock in the system message makes every request another
pin, until the share is full of what nobody sends again: {"unpin": "all"} gives it back.

The scheduler answers in the one field of an output that it may fill in, `kv_transfer_params["pinning"]`: how many
tokens of this prompt are pinned now, how many blocks all pins withhold, and why a pin was refused. A request whose pin
is refused is served all the same. Over HTTP the field comes with a chat answer that is not streamed; the log has each
refusal that was asked for, and for system messages each kind of refusal once.
"""

from __future__ import annotations

import inspect
import re

from jinja2 import TemplateError

try:
    from vllm import __version__
    from vllm.logger import init_logger
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
except ImportError as error:
    raise ImportError(f"this vLLM is not one that pins work with, 0.26 to 0.32: {error}") from error

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that it goes where vLLM's own log goes

# All that is relied on and that vLLM does not call public: owner, attribute, and the parameters that it must take.
RELIES_ON = (
    (Scheduler, "__init__", "vllm_config kv_cache_config block_size"),
    (Scheduler, "_free_request", "request delay_free_blocks"),  # returns a tuple, first the kv_transfer_params
    (Scheduler, "reset_prefix_cache", "reset_running_requests reset_connector"),
    (KVCacheConfig, "__init__", "kv_cache_groups"),
    (KVCacheGroupSpec, "__init__", "kv_cache_spec"),
    (KVCacheManager, "get_blocks", "request_id"),
    (KVCacheBlocks, "__init__", "blocks"),  # a sequence of KVCacheBlock for each group
    (KVCacheBlock, "__init__", "block_id"),
    (BlockPool, "touch", "blocks"),
    (BlockPool, "free_blocks", "ordered_blocks"),
    (KVCacheBlock, "block_hash", ""),  # set once the block is full and computed, or about to be in this step
    (Request, "__init__", "request_id prompt_token_ids sampling_params"),  # and num_prompt_tokens
    (Request, "num_output_tokens", ""),
)


def check_internals() -> None:
    """Raise RuntimeError where this vLLM lacks something in `RELIES_ON`."""
    for owner, name, parameters in RELIES_ON:
        found = getattr(owner, name, None)
        has = inspect.signature(found).parameters if callable(found) else ()
        missing = f"{owner.__name__}.{name}" if found is None else ", ".join(set(parameters.split()) - set(has))
        if missing:
            where = "" if found is None else f" of {owner.__name__}.{name}"
            raise RuntimeError(f"vLLM {__version__} has no {missing}{where}: pins work with vLLM 0.26 to 0.32")
    if not str(returned := inspect.signature(Scheduler._free_request).return_annotation).startswith("tuple"):
        answer = f"Scheduler._free_request of vLLM {__version__} returns {returned}, no tuple"
        raise RuntimeError(f"{answer}: pins work with vLLM 0.26 to 0.32")


def check_attributes(scheduler: Scheduler) -> None:
    """Raise RuntimeError where a scheduler that has been made lacks what is read from it."""
    for path in ("vllm_config", "kv_cache_config", "block_size", "kv_cache_manager", "kv_cache_manager.block_pool"):
        owner = scheduler
        for name in path.split("."):
            if not hasattr(owner, name):
                raise RuntimeError(f"the scheduler of vLLM {__version__} has no {path}: pins work with 0.26 to 0.32")
            owner = getattr(owner, name)


def system_message_marks(tokenizer) -> tuple[list[int], int]:
    """Return the tokens a chat template starts a system message with, and the token that ends it; or ValueError.

    Templates may write the date, or what they say of tools, before the text. So the start ends with the first token
    that a chat without a system message has not; where it has all of them (there is always a system message), with the
    last special one.
    """
    advice = 'give its id as {"pinning": {"end_of_message": ID}}'
    text = "The text of a system message."
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "A question."}]
    try:
        start, _, rest = tokenizer.apply_chat_template(messages, tokenize=False).partition(text)
        without = tokenizer.apply_chat_template(messages[1:], tokenize=False)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    except (TemplateError, ValueError, AttributeError) as error:
        raise ValueError(f"no chat template to find the end-of-message token in, {advice}: {error}") from error
    end = tokenizer.encode(rest, add_special_tokens=False)[:1]
    if not special.intersection(end):
        raise ValueError(f"this chat template does not end a system message with a special token: {advice}")
    marks = tokenizer.encode(start.rstrip(), add_special_tokens=False)  # a line's end may join what follows
    others = tokenizer.encode(without, add_special_tokens=False)
    new = [n for n, token in enumerate(marks) if others[n : n + 1] != [token]][:1]
    return marks[: 1 + max(new or [n for n, token in enumerate(marks) if token in special], default=-1)], end[0]


class PinningScheduler(AsyncScheduler):
    """vLLM's scheduler with one more reference on every pinned block: what is in use is never evicted."""

    def __init__(self, *args, **kwargs) -> None:
        check_internals()
        super().__init__(*args, **kwargs)
        check_attributes(self)
        config, groups = self.vllm_config, self.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            raise ValueError("only a model with full attention in every layer can have a prefix pinned: "
                             f"the KV cache of this one has {len(groups)} groups")  # fmt: skip
        if config.kv_transfer_config is not None:
            raise ValueError("pins and a KV connector both want kv_transfer_params: choose one of them")
        options = {"share": 0.25, "system_message": False, "end_of_message": None}
        given = config.additional_config.get("pinning", {})
        if unknown := set(given) - set(options):
            raise ValueError(f"pinning: unknown {', '.join(unknown)}: choose from {', '.join(options)}")
        options |= given
        share, automatic, end = options.values()
        if type(share) is not float or not 0 < share < 1:
            raise ValueError(f"pinning: share is a part of the KV cache between 0 and 1, not {share!r}")
        if type(automatic) is not bool or type(end) not in (int, type(None)):
            raise ValueError("pinning: system_message is true or false, end_of_message the id of a token")

        # The null block is never handed out, and the longest request must always fit beside all pins: else it would
        # wait for ever.
        usable = config.cache_config.num_gpu_blocks - 1
        beside_longest = usable - -(-config.model_config.max_model_len // self.block_size)
        self.most_blocks = min(int(share * usable), beside_longest)
        if self.most_blocks < 1:
            raise ValueError(f"nothing can be pinned: a share of {share} of {usable} blocks, of which {beside_longest} "
                             "are left beside a request of --max-model-len")  # fmt: skip
        self.automatic, self.starts_with, self.end_of_message = automatic, [], end
        if automatic and end is None:
            tokenizer = cached_tokenizer_from_config(config.model_config)
            self.starts_with, self.end_of_message = system_message_marks(tokenizer)
        self.block_pool = self.kv_cache_manager.block_pool
        self.pins: dict[bytes, list[KVCacheBlock]] = {}  # by the hash of the last block, which covers all before it
        self.told: set[str] = set()  # kinds of refusal that stand in the log
        self.withheld: set[int] = set()  # ids of the blocks of all pins: one block may belong to several
        logger.info("pins may withhold %d of %d blocks", self.most_blocks, usable)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple:
        """End a request. What it asks for is done first, while its blocks are still its own."""
        answer = self._obey(request)
        freed = super()._free_request(request, delay_free_blocks)
        return freed if answer is None else ({"pinning": answer}, *freed[1:])

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM does it: while a block is in use the cache is not reset. The log says why.

        With `reset_running_requests` the KV of running requests is given up, and that of pins as well: vLLM asks for it
        before it sleeps or after its weights have changed, and then no KV is worth anything.
        """
        if self.pins and reset_running_requests:
            logger.warning("%d pinned prefixes are released: all KV is given up", len(self.pins))
            self._release("all", [])
        elif self.pins:
            logger.warning("%d pinned prefixes keep the cache from being reset: release them first", len(self.pins))
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _obey(self, request: Request) -> dict | None:
        """Pin or release as a request asks, or its system message; nothing here may raise, or the engine would end."""
        if request.sampling_params is None or request.num_output_tokens == 0:
            return None  # it was ended before its first token: not all of its prompt may be computed
        asked = request.sampling_params.extra_args or {}
        blocks = self.kv_cache_manager.get_blocks(request.request_id).blocks[0]
        if "unpin" in asked:
            return self._release(asked["unpin"], blocks)
        if "pin_tokens" in asked:
            who, tokens = f"request {request.request_id}", asked["pin_tokens"]
        else:
            who, tokens = "a system message", self._system_message_tokens(request.prompt_token_ids or [])
        if tokens is None:
            return None
        if type(tokens) is not int or not 0 < tokens <= request.num_prompt_tokens:
            refused = "pin_tokens is no whole number between 1 and the length of the prompt"
        else:
            tokens -= tokens % self.block_size
            refused = self._pin(blocks[: tokens // self.block_size], tokens)
        kind = re.sub(r"\d+", "N", f"{refused}")
        if refused and ("pin_tokens" in asked or kind not in self.told):
            logger.warning("%s is not pinned: %s", who, refused)
            self.told.add(kind)
        return {"pinned_tokens": 0 if refused else tokens, "withheld_blocks": len(self.withheld), "refused": refused}

    def _system_message_tokens(self, ids: list[int]) -> int | None:
        """Return the length of the system message that a prompt starts with, where it is pinned by itself."""
        if not self.automatic or ids[: len(self.starts_with)] != self.starts_with or self.end_of_message not in ids:
            return None
        tokens = ids.index(self.end_of_message) + 1
        return tokens if tokens >= self.block_size else None

    def _pin(self, prefix: list[KVCacheBlock], tokens: int) -> str | None:
        """Keep these blocks of `tokens` tokens; return why not. A prefix that is pinned already costs nothing more."""
        if tokens == 0:
            return f"it is shorter than a block of {self.block_size} tokens"
        if len(prefix) * self.block_size < tokens or any(block.block_hash is None for block in prefix):
            return "its blocks are not in the prefix cache"  # which is off, or the request was preempted and aborted
        if prefix[-1].block_hash in self.pins:
            return None
        withheld = self.withheld | {block.block_id for block in prefix}
        if len(withheld) > self.most_blocks:
            return f"pins would withhold {len(withheld)} blocks, {self.most_blocks} are allowed"
        self.block_pool.touch(prefix)
        self.pins[prefix[-1].block_hash], self.withheld = prefix, withheld
        return None

    def _release(self, which: object, blocks: list[KVCacheBlock]) -> dict:
        """Give back all pins, or those that this request's blocks start with."""
        if which not in ("prefix", "all"):
            return {"released": 0, "withheld_blocks": len(self.withheld), "refused": 'unpin is "prefix" or "all"'}
        hashes = list(self.pins) if which == "all" else [b.block_hash for b in blocks if b.block_hash in self.pins]
        for block_hash in hashes:
            self.block_pool.free_blocks(reversed(self.pins.pop(block_hash)))  # the last block is evicted first
        self.withheld = {block.block_id for prefix in self.pins.values() for block in prefix}
        return {"released": len(hashes), "withheld_blocks": len(self.withheld), "refused": None}
