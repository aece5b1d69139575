"""Models that the tests make: other architectures, tokenizers and templates than the built-in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CORPUS, BUILT_IN = ROOT / "built_in_model" / "corpus.txt", ROOT / "built_in_model" / "cpu"
FIELD_MODELS = ROOT / "tests" / "field" / "models"
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]{% endif %}"
    "{% endfor %}"
)


def write_llama(folder: Path, template: str = LLAMA_TEMPLATE, **shape: object) -> Path:
    """Write a small Llama shape with a SentencePiece-style tokenizer of its own (700 entries); no weights.

    `shape` replaces entries of config.json.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": template,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 704,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **shape,
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def write_model(folder: Path, name: str, template: str | None = None) -> Path:
    """Return the folder of a model: "built-in", one of tests/field/models, or else a Llama with a template."""
    if name == "built-in":
        return BUILT_IN
    if name.endswith("-like"):
        folder.mkdir()
        for file in ("config.json", "tokenizer.json"):
            shutil.copy(BUILT_IN / file, folder)
        shutil.copy(FIELD_MODELS / f"{name}.json", folder / "tokenizer_config.json")
        return folder
    return write_llama(folder, **({"template": template} if template else {}))
