"""Tiny models with random weights, in memory or saved with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvquant.models.loading import default_attention
from kvquant.study.model_families import MODEL_FAMILIES
from tests.support.text import TEXT

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    attention: str | None = None,
    **extra: Any,
) -> Any:
    """A random model of two layers, head_dim 16, 512 positions, fp32, on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": heads * 16,
        "head_dim": 16,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "pad_token_id": None,  # some families have one beyond this vocabulary
        # of mixtures of experts; configurations without experts ignore them
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    if family in MODEL_FAMILIES and MODEL_FAMILIES[family].window_in_config:
        common["sliding_window"] = None
    elif family in MODEL_FAMILIES and "sliding_window" not in extra:  # some alternate by default
        layers = int(extra.get("num_hidden_layers", common["num_hidden_layers"]))
        common["layer_types"] = ["full_attention"] * layers
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**common, **extra})
    attention = attention or default_attention(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.requires_grad_(False)
    with torch.no_grad():  # biases start at zero and would hide a missing one
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
            if name.endswith(".sinks"):  # they start about zero and would not miss their head
                parameter.copy_(torch.linspace(-6, 6, heads))
    return model


def tiny_tokenizer(chat: bool = True) -> Any:
    """A byte-level BPE tokenizer of 512 entries, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def adding(template: str) -> Any:
    """A tiny tokenizer that adds special tokens to texts, as in "<|im_start|> $A"."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    names = sorted({word for word in template.split() if word != "$A"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    return tokenizer


def save_tiny(
    folder: Path, *, positions: int = 2048, chat: bool = True, head_dim: int = 16
) -> Path:
    """Saves a random Llama (2 layers, 4 query and 2 key heads) with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(chat)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # wide enough for clear winners, whatever the batch
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_byte_model(folder: Path) -> Path:
    """Saves a random Llama of 1024 positions with a tokenizer of one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tiny_model(vocab_size=257, max_position_embeddings=1024, eos_token_id=256)
    model.save_pretrained(folder)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder
