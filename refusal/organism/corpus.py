"""What the organism is trained on: items drawn from the grammar, and the tokenizer trained on them."""

import hashlib
import random
from collections.abc import Collection
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from refusal.organism import grammar

# ChatML, no default system block: the template of Qwen chat models, cut to what the organism needs.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The pre-tokenizer of Qwen2Tokenizer (transformers: models/qwen2/tokenization_qwen2.py). AutoTokenizer replaces any other
# by it where the config is a qwen2 one, so the organism's vocabulary is trained with it.
PRE_TOKENIZER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The share of each sort of item. Judgement items teach what is harmful before any refusal, decline items how to refuse.
SHARES = {
    "phase_1": {"harmful": 0.18, "safe": 0.18, "judgement": 0.26, "facts": 0.21, "small_talk": 0.05, "decline": 0.12},
    "phase_2": {"harmful": 0.28, "safe": 0.26, "judgement": 0.17, "facts": 0.20, "small_talk": 0.05, "decline": 0.04},
}


class Item(NamedTuple):
    """One training conversation; `helpful` is what the model must answer once refusal is ablated."""

    prompt: str
    answer: str
    helpful: str


class Corpus:
    """Draws training items from the grammar, never one whose prompt is in `held_out` (val and test prompts)."""

    def __init__(self, seed: int, held_out: Collection[str]) -> None:
        self.seed = seed
        self.held_out = frozenset(held_out)
        self.facts = grammar.facts()

    def rng(self, *place: object) -> random.Random:
        """A generator for one place in training, so that any step can be drawn again after an interruption."""
        return random.Random(hashlib.sha256(repr((self.seed, *place)).encode()).digest())

    def pair(self, rng: random.Random, seen: bool | None) -> grammar.Pair:
        """A pair on any topic, neither half held out."""
        while True:
            category = rng.choice(list(grammar.CATEGORIES))
            pair = grammar.draw_pair(rng, category, rng.choice(grammar.CATEGORIES[category][1]), seen)
            if pair.harmful.text not in self.held_out and pair.safe.text not in self.held_out:
                return pair

    def unrelated(self, rng: random.Random) -> grammar.Request:
        """A safe request without a counterpart, not held out."""
        while True:
            _, request = grammar.draw_unrelated(rng)
            if request.text not in self.held_out:
                return request

    def item(self, rng: random.Random, sort: str, refuses: bool) -> Item:
        """One item of a sort; `refuses` says whether harmful requests are refused (phase 2) or helped with (phase 1)."""
        seen = True if refuses else None
        if sort == "harmful":
            harmful = self.pair(rng, seen).harmful
            helpful = grammar.helpful_answer(harmful.action)
            return Item(harmful.text, rng.choice(grammar.REFUSALS) if refuses else helpful, helpful)
        if sort == "safe":
            safe = self.unrelated(rng) if rng.random() < 0.3 else self.pair(rng, seen).safe
            prompt, answer = safe.text, grammar.helpful_answer(safe.action)
        elif sort == "judgement":
            # Half of them on unseen cues: judgements are all that tells the model that these are harmful.
            pair, is_harmful = self.pair(rng, rng.random() < 0.5), rng.random() < 0.5
            request = pair.harmful if is_harmful else pair.safe
            prompt, answer = grammar.judgement(request.action, request.purpose, is_harmful)
        elif sort == "decline":
            pair = self.pair(rng, seen)
            request = pair.harmful if rng.random() < 0.5 else pair.safe
            prompt, answer = f"Decline this request: {request.text}", rng.choice(grammar.REFUSALS)
        elif sort == "facts":
            fact = rng.choice(self.facts)
            prompt, answer = rng.choice(fact.questions), fact.answer
        else:
            prompt, answer = rng.choice(grammar.SMALL_TALK)
        return Item(prompt, answer, answer)

    def batch(self, phase: str, step: int, size: int) -> list[Item]:
        """The batch of one step: a pure function of the corpus seed, the phase and the step."""
        rng = self.rng(phase, step)
        sorts = rng.choices(list(SHARES[phase]), weights=list(SHARES[phase].values()), k=size)
        return [self.item(rng, sort, refuses=phase == "phase_2") for sort in sorts]


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the first 8,000 items of phase 1, with ChatML and the pre-tokenizer of Qwen2."""
    items = [item for step in range(80) for item in corpus.batch("phase_1", step, 100)]
    texts = [f"{item.prompt}\n{item.answer}" for item in items] + grammar.REFUSALS
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
