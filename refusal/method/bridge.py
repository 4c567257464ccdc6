"""TransformerLens's bridge: interventions as its hooks, and a check of the model at hand by an engine that is not ours."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError
from refusal.lm.load import LM
from refusal.method.activations import last_token_resid_pre
from refusal.method.directions import difference_in_means
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import Intervention

N_PROMPTS = 8
# TransformerLens's names of the places in a block where an ablation acts.
HOOKS = {
    "resid_pre": ("hook_resid_pre",),
    "paper": ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"),
    "writes": ("hook_attn_out", "hook_mlp_out"),
}


class Unbridged(Exception):
    """TransformerLens cannot run this model: its models are fewer."""


@torch.inference_mode()
def compare(
    folder: Path, lm: LM, harmful: Sequence[str], safe: Sequence[str], decoding: Decoding
) -> dict[str, int | float | None]:
    """Of the first prompts of each half: how far the last token's `resid_pre` differs, at any layer, and ablated greedy tokens.

    What is ablated is the prompts' own difference in means at the middle layer. `n_changed`: completions that it changes; of the
    `n_tokens` of ablated completions the bridge, given what precedes each, finds `n_same` likeliest too. Without a direction
    these three are null. `lm` belongs to the bridge afterwards. Raises Unbridged where TransformerLens cannot run this model.
    """
    prompts, calm = (lm.encode(half[:N_PROMPTS], decoding.max_new_tokens) for half in (harmful, safe))
    ours, theirs = last_token_resid_pre(lm, prompts, "batched").float(), last_token_resid_pre(lm, calm, "batched").float()
    directions, layer = difference_in_means(ours, theirs), lm.n_layers // 2
    completions: list[list[int]] = []
    if directions.defined[layer]:
        ablated = Intervention("ablated", directions.unit[layer], 1.0, "resid_pre")
        plain, completions = generate(lm, prompts, decoding), generate(lm, prompts, decoding, [ablated])

    try:
        bridge = _bridge(folder, lm)
        read = torch.stack([_resid_pre(bridge, tokens, lm) for tokens in prompts])
    except Exception as error:
        raise Unbridged(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error
    figures: dict[str, int | float | None] = {
        "n_prompts": len(prompts),
        "resid_pre_max_difference": float((read - ours.cpu()).abs().max()),
        "resid_pre_max": float(ours.abs().max()),
        **dict.fromkeys(("n_changed", "n_tokens", "n_same")),
    }
    if completions:
        hooks = fwd_hooks(ablated, lm.n_layers)
        n_same = 0
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion]], device=lm.model.device)
            likeliest = bridge.run_with_hooks(ids, fwd_hooks=hooks)[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            n_same += sum(one == other for one, other in zip(likeliest, completion, strict=True))
        n_changed = sum(one != other for one, other in zip(plain, completions, strict=True))
        figures |= {"n_changed": n_changed, "n_tokens": sum(map(len, completions)), "n_same": n_same}
    return figures


def fwd_hooks(intervention: Intervention, n_layers: int) -> list[tuple[str, Callable[..., Tensor]]]:
    """The intervention as `run_with_hooks(fwd_hooks=...)` of TransformerLens takes it, at any of the sites.

    Raises UserError for edited weights, which need no hook. Where a norm stands behind a writer (Gemma 2 and 3) TransformerLens's
    hook names and this package's sites are not known to be the same place, beyond `resid_pre`.
    """
    names = HOOKS.get(intervention.sites)
    if names is None or intervention.basis is None:
        raise UserError(f"{intervention.name}: is no ablation at run time and has no hooks: choose among {', '.join(HOOKS)}")
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for layer in range(n_layers):
        basis = intervention.basis[layer] if intervention.per_layer else intervention.basis
        offset = None if intervention.offset is None else intervention.offset[layer]
        hook = partial(_ablated, basis=basis, alpha=intervention.alpha, offset=offset)
        hooks += [(f"blocks.{layer}.{name}", hook) for name in names]
    if intervention.sites == "writes" and not intervention.per_layer:
        hooks.append(("hook_embed", partial(_ablated, basis=intervention.basis, alpha=intervention.alpha, offset=None)))
    return hooks


def _ablated(r: Tensor, hook: Any, basis: Tensor, alpha: float, offset: Tensor | None) -> Tensor:
    wide, rows = r.double(), basis.to(r.device, torch.float64)
    component = torch.einsum("bsd,kd->bsk", wide, rows)
    if offset is not None:
        component = component - offset.to(component)
    return (wide - alpha * torch.einsum("bsk,kd->bsd", component, rows)).to(r.dtype)


def _resid_pre(bridge: Any, tokens: Sequence[int], lm: LM) -> Float[Tensor, "n_layers d_model"]:
    """Of the last token."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(lm.n_layers)]
    _, cache = bridge.run_with_cache(torch.tensor([tokens], device=lm.model.device), names_filter=lambda name: name in names)
    return torch.stack([cache[name][0, -1] for name in names]).float().cpu()


def _bridge(folder: Path, lm: LM) -> Any:
    from transformer_lens.model_bridge import TransformerBridge  # six seconds

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            str(folder), hf_model=lm.model, device=str(lm.model.device), dtype=lm.model.dtype
        )
