"""An independent engine on the model at hand: TransformerLens's bridge must read and ablate what this package does."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal.lm.load import LM
from refusal.method.activations import last_token_resid_pre
from refusal.method.directions import difference_in_means
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import Intervention

N_PROMPTS = 8


@torch.inference_mode()
def compare(
    folder: Path, lm: LM, harmful: Sequence[str], safe: Sequence[str], decoding: Decoding
) -> dict[str, int | float | None]:
    """Of the first prompts of each half: how far the last token's `resid_pre` differs, at any layer, and ablated greedy tokens.

    What is ablated is the prompts' own difference in means at the middle layer. `n_changed`: completions that it changes; of the
    `n_tokens` of ablated completions the bridge, given what precedes each, finds `n_same` likeliest too. Without a direction
    these three are null. `lm` belongs to the bridge afterwards. Raises what the bridge raises for a model it does not know.
    """
    prompts, calm = (lm.encode(half[:N_PROMPTS], decoding.max_new_tokens) for half in (harmful, safe))
    ours, theirs = last_token_resid_pre(lm, prompts, "batched").float(), last_token_resid_pre(lm, calm, "batched").float()
    directions, layer = difference_in_means(ours, theirs), lm.n_layers // 2
    v = directions.unit[layer]
    completions: list[list[int]] = []
    if directions.defined[layer]:
        plain = generate(lm, prompts, decoding)
        completions = generate(lm, prompts, decoding, [Intervention("ablated", v, 1.0, "resid_pre")])

    bridge, names = _bridge(folder, lm), [f"blocks.{i}.hook_resid_pre" for i in range(lm.n_layers)]
    read = []
    for tokens in prompts:
        _, cache = bridge.run_with_cache(torch.tensor([tokens], device=lm.model.device), names_filter=lambda name: name in names)
        read.append(torch.stack([cache[name][0, -1] for name in names]).float().cpu())
    figures: dict[str, int | float | None] = {
        "n_prompts": len(prompts),
        "resid_pre_max_difference": float((torch.stack(read) - ours.cpu()).abs().max()),
        "resid_pre_max": float(ours.abs().max()),
        **dict.fromkeys(("n_changed", "n_tokens", "n_same")),
    }
    if completions:
        hooks = [(name, partial(_ablated, v=v.to(lm.model.device))) for name in names]
        n_same = 0
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion]], device=lm.model.device)
            likeliest = bridge.run_with_hooks(ids, fwd_hooks=hooks)[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            n_same += sum(one == other for one, other in zip(likeliest, completion, strict=True))
        n_changed = sum(one != other for one, other in zip(plain, completions, strict=True))
        figures |= {"n_changed": n_changed, "n_tokens": sum(map(len, completions)), "n_same": n_same}
    return figures


def _ablated(r: Tensor, hook: Any, v: Tensor) -> Tensor:
    wide = r.double()
    return (wide - torch.einsum("bsd,d->bs", wide, v)[..., None] * v).to(r.dtype)


def _bridge(folder: Path, lm: LM) -> Any:
    from transformer_lens.model_bridge import TransformerBridge  # six seconds

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            str(folder), hf_model=lm.model, device=str(lm.model.device), dtype=lm.model.dtype
        )
