"""A tiny target that reads text: byte-level tokenizer, chat template, random weights; conversations as JSONL."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>' -}}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- m['content'] + '<|end|>' -}}{%- endgeneration -%}{%- else -%}{{- m['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "it", "while", "birds", "sang", "of", "spring"]


def make_text_target(folder: Path, template: str = TEMPLATE, seed: int = 0) -> Path:
    """A Hugging Face folder: Llama of 2 layers and hidden 32 with about 300 byte-level tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=3, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Conversations of one question and one answer, ids r0, r1, ..."""
    rows = []
    for number in range(count):
        said = " ".join(WORDS[(number * 3 + i) % len(WORDS)] for i in range(4 + number % 5))
        answer = " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(3 + number % 7))
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"r{number}", "domain": "ab"[number % 2], "conversations": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
