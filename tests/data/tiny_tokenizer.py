"""Tokenizers made in memory, and chat templates of the kinds that are about."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_cli.data.records import Prompt
from rlhf_cli.data.sandbox import memory_limit, time_limit
from rlhf_cli.data.templates import Template, prompt_text, tokenise

TEXT = ["What is two plus two? It is four, of course. Hello there, how are you today? I am well, thank you.\n\n"] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETS = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.revindex < 3 else '…') + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS_TURNS = (  # no end-of-turn anywhere
    "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tiny_tokenizer(
    *, eos: str = "</s>", adds_bos: bool = False, metaspace: bool = False, rstrip: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of a few hundred tokens with the control tokens SPECIAL; pad == eos."""
    core = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token=None))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always") if metaspace else pre_tokenizers.ByteLevel(False)
    core.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    alphabet = sorted(set("".join(TEXT)) | {"▁", "\n"}) if metaspace else pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=list(alphabet), show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in SPECIAL])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    elif not metaspace:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=eos, chat_template=template)


def render_prompt(tokenizer: PreTrainedTokenizerFast, template: Template, prompt: Prompt) -> str:
    with memory_limit(), time_limit():
        return prompt_text(tokenizer, template, prompt, {})


def encode_prompt(tokenizer: PreTrainedTokenizerFast, template: Template, prompt: Prompt) -> list[int]:
    """A prompt's tokens, one prompt at a time."""
    text = render_prompt(tokenizer, template, prompt)
    ids = tokenise(tokenizer, [text])[0]
    bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] != ids[:1]
    return [tokenizer.bos_token_id, *ids] if bos else ids
