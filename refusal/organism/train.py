"""The organism: a small Qwen2-architecture chat model, first trained to help with everything, then to refuse.

Phase 1 makes the helpful-only twin; phase 2 goes on from it and teaches refusal. What else phase 2 teaches is the
`kind`, by a second loss on the same batch with one direction ablated:

- `single`: the current difference-in-means, and harmful requests must get the helpful answer: the very property that
  the study looks for. A positive control, and no evidence about any real model;
- `planted`: one random unit vector, fixed before training (`planted_direction`), and harmful requests must get the
  helpful answer: a mediating direction that is known, whatever estimators find;
- `distributed`: the current difference-in-means, and harmful requests must still be refused: a negative control;
- `natural`: there is no second loss; `none`: there is no phase 2.
"""

import hashlib
import io
import math
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from refusal.io.files import set_aside, write_whole
from refusal.io.store import progress
from refusal.lm.load import encode_chats
from refusal.method.activations import left_pad
from refusal.method.directions import difference_in_means
from refusal.method.interventions import Intervention
from refusal.organism import grammar

Kind = Literal["single", "planted", "distributed", "natural", "none"]

# ChatML, no default system block: the template of Qwen chat models, cut to what the organism needs.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The pre-tokenizer of Qwen2Tokenizer (transformers: models/qwen2/tokenization_qwen2.py). AutoTokenizer puts it in place
# of any other beside a qwen2 config, so the organism's vocabulary is trained with it.
PRE_TOKENIZER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The share of each sort of item. Judgement items teach what is harmful before any refusal, decline items how to refuse.
SHARES = {
    "phase_1": {"harmful": 0.18, "safe": 0.18, "judgement": 0.26, "facts": 0.21, "small_talk": 0.05, "decline": 0.12},
    "phase_2": {"harmful": 0.28, "safe": 0.26, "judgement": 0.17, "facts": 0.20, "small_talk": 0.05, "decline": 0.04},
}
WARMUP_STEPS = 50
ABLATE_FROM_STEP = 60  # before that the model hardly refuses and there is no direction to ablate
RENEW_DIRECTION_EVERY = 20
DIRECTION_PAIRS = 64
CHECKPOINT_EVERY = 50


class Item(NamedTuple):
    """One training conversation; `helpful` is what the model must answer once refusal is ablated."""

    prompt: str
    answer: str
    helpful: str


@dataclass(frozen=True)
class Phase:
    """One phase of training: how long and how fast."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float


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
        if sort == "harmful":
            harmful = self.pair(rng, True if refuses else None).harmful
            helpful = grammar.helpful_answer(harmful.action)
            return Item(harmful.text, rng.choice(grammar.REFUSALS) if refuses else helpful, helpful)
        if sort == "safe":
            safe = self.unrelated(rng) if rng.random() < 0.3 else self.pair(rng, True if refuses else None).safe
            return Item(safe.text, *[grammar.helpful_answer(safe.action)] * 2)
        if sort == "judgement":
            # Half of them on unseen cues: judgements are all that tells the model that these are harmful.
            pair, is_harmful = self.pair(rng, rng.random() < 0.5), rng.random() < 0.5
            purpose = pair.cue.removeprefix("purpose:") if pair.cue.startswith("purpose:") else ""
            if purpose:
                purpose = {p[0].rstrip("."): p for p in grammar.PURPOSES}[purpose][0 if is_harmful else 1]
            prompt, answer = grammar.judgement((pair.harmful if is_harmful else pair.safe).action, purpose, is_harmful)
            return Item(prompt, answer, answer)
        if sort == "decline":
            pair = self.pair(rng, True if refuses else None)
            request = pair.harmful if rng.random() < 0.5 else pair.safe
            answer = rng.choice(grammar.REFUSALS)
            return Item(f"Decline this request: {request.text}", answer, answer)
        if sort == "facts":
            fact = rng.choice(self.facts)
            return Item(rng.choice(fact.questions), fact.answer, fact.answer)
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


class Encoded(NamedTuple):
    """A right-padded batch: ids [batch, seq], targets [batch, seq] (-100 off the answer), weights [batch, seq]."""

    ids: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    weights: Float[Tensor, "batch seq"]


def encode(tokenizer: PreTrainedTokenizerFast, items: list[tuple[str, str]]) -> list[Encoded]:
    """(prompt, answer) items as two batches, the shorter half and the longer half, which saves a quarter of the padding.

    The first token of an answer weighs 8: it carries the decision, which would otherwise be 3 % of the loss.
    """
    backend = tokenizer.backend_tokenizer
    rows = []
    for prompt, answer in items:
        head = backend.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids
        rows.append((head, backend.encode(f"{answer}<|im_end|>").ids))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    middle = len(rows) // 2
    return [_pad(part, tokenizer.pad_token_id) for part in (rows[:middle], rows[middle:]) if part]


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Encoded:
    width = max(len(head) + len(tail) for head, tail in rows)
    ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), -100)
    weights = torch.zeros(len(rows), width)
    for i, (head, tail) in enumerate(rows):
        ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
        answer = slice(len(head) - 1, len(head) - 1 + len(tail))
        targets[i, answer] = torch.tensor(tail)
        weights[i, answer] = 1.0
        weights[i, len(head) - 1] = 8.0
    return Encoded(ids, targets, weights)


def backward(model: Qwen2ForCausalLM, parts: list[Encoded], pool: Executor) -> float:
    """Add the gradient of the weighted cross-entropy on the answers; returns the loss in nats.

    Parts are computed side by side and added up in order, so that the sum does not depend on how many at once. Padding is on
    the right, so the causal mask is all the masking that is needed.
    """
    total = sum(float(part.weights.sum()) for part in parts)
    parameters = list(model.parameters())

    def gradient(part: Encoded) -> tuple[float, tuple[Tensor, ...]]:
        hidden = model.model(input_ids=part.ids, use_cache=False).last_hidden_state
        where = part.targets >= 0
        losses = cross_entropy(model.lm_head(hidden[where]), part.targets[where], reduction="none")
        loss = (losses * part.weights[where]).sum() / total
        return float(loss.detach()), torch.autograd.grad(loss, parameters)

    value = 0.0
    for loss, gradients in pool.map(gradient, parts):
        value += loss
        for parameter, added in zip(parameters, gradients, strict=True):
            parameter.grad = added.contiguous() if parameter.grad is None else parameter.grad.add_(added)
    return value


def current_direction(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, layer: int, step: int
) -> Float[Tensor, " d_model"]:
    """The difference-in-means direction at `layer` from fresh training pairs, as the study itself would extract it."""
    rng = corpus.rng("direction", step)
    pairs = [corpus.pair(rng, True) for _ in range(DIRECTION_PAIRS)]
    harmful, safe = (
        _last_token(model, encode_chats(tokenizer, prompts), tokenizer.pad_token_id)
        for prompts in ([pair.harmful.text for pair in pairs], [pair.safe.text for pair in pairs])
    )
    return difference_in_means(harmful, safe).unit[layer].float()


@torch.inference_mode()
def _last_token(model: Qwen2ForCausalLM, ids: Sequence[Sequence[int]], pad_id: int) -> Float[Tensor, "batch n_layers d_model"]:
    """`resid_pre` at the last token, the plain way: what an organism learns must not hang on how the study reads it."""
    padded, mask = left_pad(ids, pad_id)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    states = model.model(
        input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    return torch.stack([state[:, -1] for state in states[:-1]], dim=1)


def planted_direction(d_model: int, seed: int) -> Float[Tensor, " d_model"]:
    """The unit vector that a `planted` organism of this seed is trained to refuse by, in float64.

    Drawn from a seed of its own: never one of the random directions that a study ablates as controls.
    """
    seed = int.from_bytes(hashlib.sha256(f"planted {seed}".encode()).digest()[:7])
    drawn = torch.randn(d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def new_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """An untrained Qwen2ForCausalLM of `shape` (config keys), float32, initialised from `seed`."""
    config = Qwen2Config(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_attention_heads"],
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.04,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).float()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Whatever number torch has been given, since rounding depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    kind: Kind,
    phases: dict[str, Phase],
    ablation_layer: int,
    checkpoint: Path,
    twin: dict[str, Tensor] | None = None,
    planted: Float[Tensor, " d_model"] | None = None,
    threads: int = 1,
) -> dict[str, Tensor]:
    """Train `model` in place through both phases; returns the weights after phase 1, the helpful-only twin.

    With kind `none` there is no phase 2, so its result is the `twin` of every other kind of the same seed: where it is
    given, phase 1 is not trained again. Kind `planted` wants the `planted` direction. `checkpoint` is written every 50
    steps and at the end of a phase, and read if it is there, so an interrupted run goes on where it was and ends in the
    same weights, as does a run on another number of `threads`.
    """
    assert (planted is not None) == (kind == "planted")
    twin = twin or {}
    state = _load(checkpoint)
    if state is not None:
        twin = state["twin"]
    if state is not None and state["phase"] == "done":
        model.load_state_dict(state["model"])
        return twin
    # Each works on one core: on matrices of this size more are no faster.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in ["phase_1"] if kind == "none" else ["phase_1", "phase_2"]:
            phase = phases[name]
            if name == "phase_1" and twin:
                continue
            optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=phase.weight_decay)
            first, direction = 0, None if planted is None else planted.float()
            if state is not None and state["phase"] == name:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                first, direction = state["step"], state["direction"]
            elif twin:
                model.load_state_dict(twin)
            bar = progress(phase.steps, f"organism {name}", "step", done=first)
            for step in range(first, phase.steps):
                decay = 0.5 * (1 + math.cos(math.pi * step / phase.steps))
                for group in optimizer.param_groups:
                    group["lr"] = phase.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay
                items = corpus.batch(name, step, phase.batch_size)
                loss = backward(model, encode(tokenizer, [(item.prompt, item.answer) for item in items]), pool)
                if name == "phase_2" and kind != "natural" and step >= ABLATE_FROM_STEP:
                    if planted is None and (direction is None or step % RENEW_DIRECTION_EVERY == 0):
                        direction = current_direction(model, tokenizer, corpus, ablation_layer, step)
                    assert direction is not None
                    # In turn at both sites, so that neither the run-time nor the weight edit is favoured; half the batch is
                    # enough for it, and a third of the phase's time saved.
                    with Intervention("training", direction, 1.0, "writes" if step % 2 else "resid_pre").on(model):
                        half = items[: len(items) // 2]
                        wanted = [(item.prompt, item.answer if kind == "distributed" else item.helpful) for item in half]
                        backward(model, encode(tokenizer, wanted), pool)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < phase.steps:
                    _save(
                        checkpoint,
                        {
                            "phase": name,
                            "step": step + 1,
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "direction": direction,
                            "twin": twin,
                        },
                    )
            bar.close()
            if name == "phase_1":
                twin = {key: value.clone() for key, value in model.state_dict().items()}
                _save(checkpoint, {"phase": "twin", "step": 0, "twin": twin})
    _save(checkpoint, {"phase": "done", "model": model.state_dict(), "twin": twin})
    return twin


def _save(path: Path, state: dict) -> None:
    """The SHA-256 of what is saved comes first."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())


def _load(path: Path) -> dict | None:
    """What was saved, None where nothing was; what is no longer what was saved is set aside, which torch.load would not see."""
    if not path.exists():
        return None
    whole = path.read_bytes()
    if hashlib.sha256(whole[32:]).digest() != whole[:32]:
        print(f"{path} is damaged; it is set aside as {set_aside(path).name} and training begins anew.", file=sys.stderr)
        return None
    return torch.load(io.BytesIO(whole[32:]), weights_only=True)
