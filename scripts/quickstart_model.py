"""The quickstart's untrained model: a byte-level BPE tokenizer trained on the corpus, and a tiny Llama with random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

# The trainer counts words on several threads; one makes equal counts come in one order.
os.environ["RAYON_NUM_THREADS"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus(data: Path) -> Iterator[str]:
    """The texts of sft.jsonl."""
    with (data / "sft.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield from json.loads(line).values()


def train_tokenizer(data: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """At most `vocabulary` tokens: five control tokens, 256 bytes, and merges."""
    tokenizer = Tokenizer(models.BPE())
    # Each word is trained with the space before it, first words included, so that a word is one token everywhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, END, *ROLES], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(
    folder: Path, data: Path, seed: int, vocabulary: int, hidden: int = 160, inner: int = 448, layers: int = 4, heads: int = 5
) -> None:
    """Write the tokenizer and random weights, by default about 1.4 M."""
    tokenizer = train_tokenizer(data, vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
