"""Build the model folders that the lessons use when no `--model` is given.

A folder holds a tokenizer, a chat template and the shape of a Qwen2 model, but
no weights: vLLM fills them with random numbers (`load_format="dummy"`). What a
prompt costs to prefill and which of its blocks are found in the cache depend on
the shape and on the tokens, never on the values of the weights.

    python built_in_model/build.py                           rebuild cpu/, 0.5b/, 1.5b/ and 7b/ here
    python built_in_model/build.py --shape 7b --out DIR      write one shape elsewhere

The same corpus and the same release of `tokenizers` give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VOCABULARY = 2048  # entries at most; 0.5b and larger keep the published size of the embedding
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# 0.5b, 1.5b and 7b: the dimensions published in the config.json of Qwen2.5-*-Instruct; the largest that fits is the
# default on a GPU.
# cpu: on two cores a prompt of 4,000 tokens takes some hundred milliseconds when missed, below 40 when found.
SHAPES = {
    "cpu": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
                num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True),
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}  # fmt: skip

# ChatML-style: every message is closed before the next one opens and no message is rendered
# differently because of a later one, so turn n is a prefix of turn n + 1, token for token.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' + call.function.name + ' ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}
{{- '</tool_call>' }}
{%- endfor %}
{%- if tools and loop.first %}
{{- '\\n# Tools' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def train_tokenizer(corpus: str):
    """Return a byte-level BPE `tokenizers.Tokenizer`; digits stay single, so equally long numbers cost the same."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return tokenizer


def write_model(folder: Path, shape: str) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json of `shape` into `folder`."""
    tokenizer = train_tokenizer((HERE / "corpus.txt").read_text(encoding="utf-8"))
    end = SPECIAL_TOKENS.index("<|im_end|>")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **SHAPES[shape],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "eos_token_id": end,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="one shape instead of those in the repository")
    parser.add_argument("--out", help="the folder to write, with --shape")
    if any(re.search(r"[\x00-\x1f\x7f-\x9f]", word) for word in sys.argv[1:]):
        parser.error("there is a control character among the arguments")
    args = parser.parse_args()
    if bool(args.shape) != bool(args.out):  # both, and not empty
        parser.error("--shape and --out belong together: --shape 7b --out DIR")
    targets = {Path(args.out): args.shape} if args.shape else {HERE / shape: shape for shape in SHAPES}
    for folder, shape in targets.items():
        try:
            write_model(folder, shape)
        except OSError as error:
            sys.exit(f"build.py: error: cannot write {folder}: {error.strerror}")
        print(f"wrote {shape} to {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
