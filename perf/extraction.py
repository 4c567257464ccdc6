"""Last-token `resid_pre` of every layer and prompt: ours beside three common ways, and beside the products that must be done."""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from perf import harness, workload
from refusal.io.store import Store
from refusal.lm.load import encode_chats, load_model, load_tokenizer
from refusal.lm.stream import stream_of
from refusal.method.activations import collect, left_pad
from refusal.method.directions import difference_in_means

ORGANISM = Path("models/base")
WORDS = (
    ("paint", "mend", "carry", "wash", "draw", "find", "keep", "choose"),
    ("chair", "basket", "kite", "lamp", "coat", "clock", "table", "boat"),
)


def ours(model: PreTrainedModel, ids: list[list[int]], folder: Path, method: str = "batched") -> Tensor:
    """What the activations stage does: through a resume store that holds nothing yet, into a file, and back from it."""
    place = next(folder / str(n) for n in count() if not (folder / str(n)).exists())
    place.mkdir()
    collect(workload.lm(model), {"all": ids}, method, workload.BATCH_SIZE, Store(place / "store.sqlite"), place / "rows")
    return load_file(place / "rows")["all"]


@torch.inference_mode()
def padded(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """The paper's way: left-padded batches in the order given, logits included, hooks that keep all positions in float64."""
    parts = []
    for start in range(0, len(ids), workload.BATCH_SIZE):
        batch, mask = left_pad(ids[start : start + workload.BATCH_SIZE], workload.PAD_ID)
        kept: list[Tensor] = []

        def keep(_, args: tuple, kept: list[Tensor] = kept) -> None:
            kept.append(args[0].to(torch.float64).cpu())

        handles = [block.register_forward_pre_hook(keep) for block in model.model.layers]
        model(input_ids=batch.to(model.device), attention_mask=mask.to(model.device))
        for handle in handles:
            handle.remove()
        parts.append(torch.stack([layer[:, -1] for layer in kept], 1))
    return torch.cat(parts)


@torch.inference_mode()
def sequential(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """One prompt a forward, logits included, all hidden states kept and the last position taken."""
    rows = []
    for tokens in ids:
        states = model(input_ids=torch.tensor([tokens], device=model.device), output_hidden_states=True).hidden_states
        rows.append(torch.stack([layer[0, -1] for layer in states[:-1]]).cpu())
    return torch.stack(rows)


def bridge_of(model: PreTrainedModel, folder: Path) -> Callable[[list[list[int]]], Tensor]:
    """TransformerLens: `run_with_cache` of the `resid_pre` hooks on left-padded batches, with their mask."""
    from transformer_lens.model_bridge import TransformerBridge

    model.save_pretrained(folder)
    stream_of(model)  # found before the bridge puts modules of its own in the model's place
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=model, device=str(model.device), dtype=model.dtype)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.config.num_hidden_layers)]

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> Tensor:
        parts = []
        for start in range(0, len(ids), workload.BATCH_SIZE):
            batch, mask = left_pad(ids[start : start + workload.BATCH_SIZE], workload.PAD_ID)
            _, cache = bridge.run_with_cache(
                batch.to(model.device), attention_mask=mask.to(model.device), names_filter=lambda name: name in names
            )
            parts.append(torch.stack([cache[name][:, -1] for name in names], 1).cpu())
        return torch.cat(parts)

    return run


def run(console: Console, rounds: int = 3) -> dict[str, float]:
    """Times all arms on the workload of record; prints bfloat16, the organism and a GPU beside it."""
    model, ids = workload.model(), workload.prompts()
    shared, blocks = workload.SHARED, model.config.num_hidden_layers - 1
    n_tokens = shared + sum(len(tokens) - shared for tokens in ids)
    with tempfile.TemporaryDirectory() as folder:
        bridge = bridge_of(model, Path(folder) / "bridge")
        arms: dict[str, Callable[[], object]] = {
            "ours": lambda: ours(model, ids, Path(folder)),
            "padded": lambda: padded(model, ids),
            "sequential": lambda: sequential(model, ids),
            "bridge": lambda: bridge(ids),
            "products": lambda: workload.matrix_products(model, n_tokens, 1024, blocks),
        }
        for arm in (lambda: ours(model, ids[:4], Path(folder)), lambda: padded(model, ids[:4]), lambda: bridge(ids[:4])):
            arm()
        found = harness.measure(arms, console, rounds)
        notes = {
            "ours": "method batched, resume store and file included",
            "padded": f"batches of {workload.BATCH_SIZE}, logits, all positions to float64",
            "sequential": "one prompt a forward, logits",
            "bridge": f"TransformerLens run_with_cache, batches of {workload.BATCH_SIZE}",
            "products": f"the bound: matrix products of {n_tokens} tokens in {blocks} blocks, nothing else",
        }
        console.print(found.table(f"extraction, {len(ids)} prompts, float32", "ours", notes))
        exact = unit(found.values["sequential"])
        cosines = {arm: float((unit(found.values[arm]) * exact).sum(-1).min()) for arm in ("ours", "padded", "bridge")}
        console.print(
            "least cosine to sequential over layers: " + ", ".join(f"{a} {1 - c:.1e} below 1" for a, c in cosines.items())
        )
        scalars = {
            "ratio_to_padded": found.ratio("padded", "ours").median,
            "ratio_to_sequential": found.ratio("sequential", "ours").median,
            "ratio_to_bridge": found.ratio("bridge", "ours").median,
            "fraction_of_bound": found.ratio("products", "ours").median,
            "cosine_min": cosines["ours"],
            "seconds": found.median("ours"),
            "peak_mb": found.peak_mb["ours"],
            "peak_mb_padded": found.peak_mb["padded"],
        }
        del arms, bridge
        return scalars | beside(console, model, ids, Path(folder))


def unit(rows: Tensor) -> Tensor:
    """Unit directions [n_layers, d_model] of the first half of the prompts against the second."""
    half = len(rows) // 2
    return difference_in_means(rows[:half], rows[half:]).unit.double()


def beside(console: Console, model: PreTrainedModel, ids: list[list[int]], folder: Path) -> dict[str, float]:
    """Ratios to `padded` that are not of record: fewer prompts in bfloat16, the organism's own, all of them on a GPU."""
    settings: dict[str, tuple[PreTrainedModel, list[list[int]]]] = {"bfloat16": (workload.model(torch.bfloat16), ids[:12])}
    if ORGANISM.is_dir():
        requests = [f"How do I {verb} a {noun}?" for verb in WORDS[0] for noun in WORDS[1]]
        settings["organism"] = load_model(ORGANISM), encode_chats(load_tokenizer(ORGANISM), requests)
    if torch.cuda.is_available():
        settings["gpu"] = workload.model(torch.bfloat16, "cuda"), ids
    scalars = {}
    for name, (other, prompts) in settings.items():
        arms = {"ours": partial(ours, other, prompts, folder), "padded": partial(padded, other, prompts)}
        ratio = harness.measure(arms, console).ratio("padded", "ours")
        scalars[f"{name}_ratio_to_padded"] = ratio.median
        console.print(f"{name}, {len(prompts)} prompts: padded takes {ratio} times as long")
    return scalars
