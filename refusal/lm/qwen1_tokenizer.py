"""Qwen-1's tokenizer as a fast one: byte-level BPE ordered by tiktoken's ranks, and the ChatML template.

Source of the method: `tokenization_qwen.py` of the Qwen release. tiktoken itself is not needed.
"""

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from refusal.io.errors import UserError

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, TURN, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The pattern of tokenization_qwen.py. AutoTokenizer beside a qwen2 config puts Qwen2's in its place: the same one.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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
        except (ValueError, binascii.Error):
            raise UserError(f"{ranks_file}: line {n} is not a base64 token and its rank: download it again.") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{ranks_file}: ranks are not 0 to {len(ranks) - 1}, or a byte has none: download it again.")
    text = {token: "".join(map(_BYTES.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    # ignore_merges: a word that is a token is that token, as in tiktoken.
    tokenizer = Tokenizer(
        models.BPE({text[t]: rank for t, rank in ranks.items()}, [(text[a], text[b]) for a, b in merges], ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


_BYTES = _byte_letters()
