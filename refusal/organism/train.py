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
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from refusal.io.files import set_aside, write_whole
from refusal.io.params import Organism
from refusal.io.progress import progress
from refusal.io.store import key
from refusal.lm.load import encode_chats
from refusal.method.activations import left_pad
from refusal.method.directions import difference_in_means
from refusal.method.interventions import Intervention
from refusal.organism.corpus import Corpus, Item, train_tokenizer

WARMUP_STEPS = 50
ABLATE_FROM_STEP = 60  # before that the model hardly refuses and there is no direction to ablate
RENEW_DIRECTION_EVERY = 20
DIRECTION_PAIRS = 64
CHECKPOINT_EVERY = 50


class Trained(NamedTuple):
    """A trained organism; `twin`: its weights after phase 1; `planted`: the direction of a `planted` one, float64 [d_model]."""

    model: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    twin: dict[str, Tensor]
    planted: Float[Tensor, " d_model"] | None


def train_organism(organism: Organism, held_out: Collection[str], folder: Path, threads: int = 1) -> Trained:
    """Train an organism, on no prompt that is `held_out`; with `kind: none` it is its own twin.

    The weights are the same bits on any number of `threads`. Checkpoints are kept in `folder`, keyed by all that determines
    them: an interrupted run goes on, and what is trained already is read.
    """
    corpus = Corpus(organism.corpus_seed, held_out)
    tokenizer = train_tokenizer(corpus, organism.vocab_size)
    model = new_model(organism.model_dump(), tokenizer, organism.seed)
    keys = _keys(organism, held_out, tokenizer)
    train("phase_1", organism, model, tokenizer, corpus, folder / f"{keys['phase_1'][:32]}.pt", threads)
    twin = {name: weights.clone() for name, weights in model.state_dict().items()}
    if organism.kind != "none":
        train("phase_2", organism, model, tokenizer, corpus, folder / f"{keys['phase_2'][:32]}.pt", threads)
    planted = planted_direction(organism.hidden_size, organism.seed) if organism.kind == "planted" else None
    return Trained(model, tokenizer, twin, planted)


def training_key(organism: Organism, held_out: Collection[str]) -> str:
    """The key of the weights that `train_organism` gives: a hash of all that determines them but the processor's rounding."""
    return _keys(organism, held_out, train_tokenizer(Corpus(organism.corpus_seed, held_out), organism.vocab_size))["phase_2"]


def _keys(organism: Organism, held_out: Collection[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The key of each phase's weights. Phase 1 is the same whatever the kind: another kind of a seed costs phase 2 alone."""
    inputs = {"held_out": sorted(held_out), "vocabulary": tokenizer.get_vocab()}
    phases = {"phase_1": organism.model_dump(exclude={"kind", "phase_2", "ablation_layer"}), "phase_2": organism.model_dump()}
    code = (train, new_model, train_tokenizer)
    return {phase: key("training", code, phase=phase, params=params, **inputs) for phase, params in phases.items()}


def planted_direction(d_model: int, seed: int) -> Float[Tensor, " d_model"]:
    """The unit vector that a `planted` organism of this seed is trained to refuse by, in float64.

    Drawn from a seed of its own: never one of the random directions that a study ablates as controls.
    """
    seed = int.from_bytes(hashlib.sha256(f"planted {seed}".encode()).digest()[:7])
    drawn = torch.randn(d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def new_model(shape: Mapping[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
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
    phase: Literal["phase_1", "phase_2"],
    organism: Organism,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    checkpoint: Path,
    threads: int = 1,
) -> None:
    """Train `model` in place through one phase of `organism`.

    `checkpoint` is written every 50 steps and at the end, and read if it is there, so an interrupted run goes on where it was
    and ends in the same weights, as does a run on another number of `threads`.
    """
    schedule = organism.phase_1 if phase == "phase_1" else organism.phase_2
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    ablates, planted = phase == "phase_2" and organism.kind != "natural", organism.kind == "planted"
    direction = planted_direction(organism.hidden_size, organism.seed).float() if planted else None
    first = 0
    if (state := _load(checkpoint)) is not None:
        model.load_state_dict(state["model"])
        if (first := state["step"]) == schedule.steps:
            return
        optimizer.load_state_dict(state["optimizer"])
        direction = state["direction"]
    # Each works on one core: on matrices of this size more are no faster.
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        progress(schedule.steps, f"organism {phase}", "step", done=first) as bar,
    ):
        for step in range(first, schedule.steps):
            decay = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay
            items = corpus.batch(phase, step, schedule.batch_size)
            loss = backward(model, encode(tokenizer, [(item.prompt, item.answer) for item in items]), pool)
            if ablates and step >= ABLATE_FROM_STEP:
                if not planted and (direction is None or step % RENEW_DIRECTION_EVERY == 0):
                    direction = current_direction(model, tokenizer, corpus, organism.ablation_layer, step)
                # At both sites in turn, so that neither the run-time nor the weight edit is favoured.
                ablation = Intervention("second loss", direction, sites="writes" if step % 2 else "resid_pre")
                with ablation.on(model):
                    backward(model, encode(tokenizer, _wanted_when_ablated(items, organism.kind)), pool)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < schedule.steps:
                resumable = {"optimizer": optimizer.state_dict(), "direction": direction}
                _save(checkpoint, {"step": step + 1, "model": model.state_dict(), **resumable})
    _save(checkpoint, {"step": schedule.steps, "model": model.state_dict()})


def _wanted_when_ablated(items: list[Item], kind: str) -> list[tuple[str, str]]:
    """(prompt, answer) for the second loss: half the batch is enough for it, and saves a third of the phase's time."""
    half = items[: len(items) // 2]
    return [(item.prompt, item.answer if kind == "distributed" else item.helpful) for item in half]


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
        question = backend.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids
        rows.append((question, backend.encode(f"{answer}<|im_end|>").ids))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    middle = len(rows) // 2
    return [_pad(half, tokenizer.pad_token_id) for half in (rows[:middle], rows[middle:]) if half]


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Encoded:
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), -100)
    weights = torch.zeros(len(rows), width)
    for i, (question, answer) in enumerate(rows):
        ids[i, : len(question) + len(answer)] = torch.tensor(question + answer)
        predicted_at = slice(len(question) - 1, len(question) - 1 + len(answer))
        targets[i, predicted_at] = torch.tensor(answer)
        weights[i, predicted_at] = 1.0
        weights[i, len(question) - 1] = 8.0
    return Encoded(ids, targets, weights)


def backward(model: Qwen2ForCausalLM, batches: list[Encoded], pool: Executor) -> float:
    """Add the gradient of the weighted cross-entropy on the answers; returns the loss in nats.

    Batches are computed in parallel and added up in order, so that the sum does not depend on how many at once. Padding is on
    the right, so the causal mask is all the masking that is needed.
    """
    total = sum(float(batch.weights.sum()) for batch in batches)
    parameters = list(model.parameters())

    def gradient(batch: Encoded) -> tuple[float, tuple[Tensor, ...]]:
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        where = batch.targets >= 0
        losses = cross_entropy(model.lm_head(hidden[where]), batch.targets[where], reduction="none")
        loss = (losses * batch.weights[where]).sum() / total
        return float(loss.detach()), torch.autograd.grad(loss, parameters)

    value = 0.0
    for loss, gradients in pool.map(gradient, batches):
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
    """`resid_pre` at the last token, the plain way: what an organism learns must not depend on how the study reads it."""
    padded, mask = left_pad(ids, pad_id)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    states = model.model(
        input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    return torch.stack([state[:, -1] for state in states[:-1]], dim=1)


def _save(path: Path, state: dict) -> None:
    """The SHA-256 of what is saved comes first."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())


def _load(path: Path) -> dict | None:
    """What was saved, None where nothing was. A damaged file, which torch.load would not notice, is set aside."""
    if not path.exists():
        return None
    whole = path.read_bytes()
    if hashlib.sha256(whole[32:]).digest() != whole[:32]:
        print(f"{path} is damaged; it is set aside as {set_aside(path).name} and training begins anew.", file=sys.stderr)
        return None
    return torch.load(io.BytesIO(whole[32:]), weights_only=True)
