"""A tokenizer with a chat template for the small language model of conftest.py, written as transformers writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "{{ message['role'] }} {{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def write_chat_tokenizer(folder: Path) -> Any:
    """Write a byte-level tokenizer of 40 tokens into a folder and return it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {c: i for i, c in enumerate("<>abcdefghijklmnopqrstuvwxyzĠĊ0123456789")}
    made = tokenizers.Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="< $A", special_tokens=[("<", 0)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<", eos_token=">", chat_template=TEMPLATE)
    found.save_pretrained(folder)
    return found
