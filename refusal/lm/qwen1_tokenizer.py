"""Qwen-1's tokenizer as a fast one: byte-level BPE ordered by tiktoken's ranks, and the ChatML template.

Source of the method: `tokenization_qwen.py` of the Qwen release. tiktoken itself is not needed.
"""

import base64
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from refusal.io.errors import UserError

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, TURN, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The pattern of tokenization_qwen.py. AutoTokenizer, in a folder with a qwen2 config, puts Qwen2's in its place: the same one.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Converter(TikTokenConverter):
    """Of ranks that are read already: tiktoken's own reader, which this replaces, keeps a copy of the file elsewhere."""

    @staticmethod
    def load_tiktoken_bpe(ranks: Any) -> dict[bytes, int]:
        return ranks


def chat_tokenizer(ranks_file: Path, max_length: int) -> PreTrainedTokenizerFast:
    """`fast_tokenizer` with its ChatML template, its tokens for the end of a turn and for padding, and its longest input."""
    return PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(ranks_file),
        eos_token=TURN_END,
        pad_token=END,
        chat_template=CHATML,
        model_max_length=max_length,
    )


def fast_tokenizer(ranks_file: Path) -> Tokenizer:
    """The fast tokenizer of a `qwen.tiktoken`: lines `<base64 of the token's bytes> <rank>`, ranks 0, 1, 2, ... in any order.

    Ids are tiktoken's: a pair of pieces merges if its bytes are a token, lowest rank first. Special tokens follow the ranks;
    their text is always read as the token, as Qwen's own tokenizer does. Raises UserError naming a malformed line.
    """
    ranks: dict[bytes, int] = {}
    for n, line in enumerate(ranks_file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{ranks_file}: line {n} is not a base64 token and its rank: download it again.") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{ranks_file}: ranks are not 0 to {len(ranks) - 1}, or a byte has none: download it again.")
    tokenizer = _Converter(ranks, PATTERN, extra_special_tokens=SPECIALS).converted()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer
