"""Other ways to estimate a direction than difference-in-means, for one layer or for the whole stack.

`logistic` and `lda` look for what tells harmful from safe prompts best; `optimised` for what refusal runs through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from tqdm import trange

from refusal.io import store as stores
from refusal.io.store import Store
from refusal.lm.replicas import crew
from refusal.method.activations import left_pad
from refusal.method.interventions import Ablation, intervene

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = 8  # pairs whose gradient is one job


def logistic(harmful: Float[Tensor, "n_harmful d_model"], safe: Float[Tensor, "n_safe d_model"]) -> Float[Tensor, " d_model"]:
    """The unit normal of logistic regression (L2, C = 1, on standardised activations), towards harmful, in float64.

    Standardising divides each coordinate by its spread; the weights are brought back to the stream's coordinates.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = torch.cat([harmful, safe]).double(), [1] * len(harmful) + [0] * len(safe)
    spread = x.std(0)
    spread = spread.where(spread > 1e-9 * spread.max(), torch.inf)  # a coordinate that never varies carries nothing
    fitted = LogisticRegression(max_iter=2000).fit(((x - x.mean(0)) / spread).numpy(), y)
    weights = torch.from_numpy(fitted.coef_[0]) / spread
    return weights / weights.norm()


def lda(harmful: Float[Tensor, "n_harmful d_model"], safe: Float[Tensor, "n_safe d_model"]) -> Float[Tensor, " d_model"]:
    """The unit vector along C^-1 (mean harmful - mean safe), C the covariance within the two sets, in float64.

    Fisher's linear discriminant; C is shrunk as Ledoit and Wolf 2004 ("A well-conditioned estimator for
    large-dimensional covariance matrices"), without which it has no inverse where d_model exceeds the prompts. Where nothing
    varies within the sets (one pair, say) there is nothing to whiten by, and it is the difference itself.
    """
    from sklearn.covariance import ledoit_wolf

    harmful, safe = harmful.double(), safe.double()
    within = torch.cat([harmful - harmful.mean(0), safe - safe.mean(0)])
    weights = harmful.mean(0) - safe.mean(0)
    if within.any():
        weights = torch.linalg.solve(torch.from_numpy(ledoit_wolf(within.numpy(), assume_centered=True)[0]), weights)
    return weights / weights.norm()


class _Learned(Ablation):
    """The ablation of one direction at alpha 1, through which gradients reach the direction."""

    def __init__(self, vector: nn.Parameter, sites: str):
        super().__init__(normalize(vector.detach(), dim=0).reshape(1, 1, -1), torch.ones(1), sites)
        self.vector = vector

    def apply(self, r: Tensor, layer: int) -> Tensor:
        v = normalize(self.vector, dim=0)
        x = r.to(torch.promote_types(r.dtype, torch.float32))
        return (x - (x @ v)[..., None] * v).to(r.dtype)


def first_token_loss(
    model: PreTrainedModel,
    edit: Ablation,
    harmful: Sequence[Sequence[int]],
    safe: Sequence[Sequence[int]],
    wanted: Float[Tensor, "n vocab"],
    pad_id: int,
) -> Float[Tensor, ""]:
    """How far, in nats, ablation is from letting harmful prompts be answered as safe ones are and changing nothing else.

    Mean KL from `wanted`, the unedited model's log probabilities of the first answer token after each safe prompt, to the
    edited model's: after the harmful counterpart, and after the safe prompt itself.
    """
    with intervene(model, edit):
        after = first_token(model, [*harmful, *safe], pad_id)
    return kl_div(after, torch.cat([wanted, wanted]), reduction="batchmean", log_target=True)


def first_token(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> Float[Tensor, "n vocab"]:
    """Log probabilities of the first answer token after each prompt, float32."""
    ids, mask = left_pad(prompts, pad_id)
    out = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0).to(model.device),
        use_cache=False,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float().log_softmax(-1)


def optimised(
    model: PreTrainedModel,
    weights: str,
    harmful: Sequence[Sequence[int]],
    safe: Sequence[Sequence[int]],
    sites: str,
    pad_id: int,
    steps: int,
    batch_size: int,
    seed: int,
    store: Store,
) -> tuple[Float[Tensor, " d_model"], float]:
    """The unit direction whose ablation at `sites` minimises `first_token_loss` on these pairs, and the loss at the end.

    Adam from a random direction, `batch_size` pairs a step; the model's weights stay as they are. The idea of optimising
    a direction through its ablation is from Wollschlaeger et al. 2025 (arXiv 2502.17420), "The Geometry of Refusal in Large
    Language Models"; the loss here asks for no answer but the first token that safe counterparts get.
    """
    key = stores.key(
        "optimised direction",
        (optimised,),
        weights=weights,
        dtype=str(model.dtype),
        device=model.device.type,
        harmful=[list(ids) for ids in harmful],
        safe=[list(ids) for ids in safe],
        sites=sites,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )

    def gradient(one: PreTrainedModel, job: tuple[nn.Parameter, list[int]]) -> tuple[Tensor, Tensor]:
        """The sum over these pairs of the loss, and its gradient."""
        vector, part = job
        bad, good = [harmful[i] for i in part], [safe[i] for i in part]
        with torch.no_grad():
            wanted = first_token(one, good, pad_id)
        loss = len(part) * first_token_loss(one, _Learned(vector, sites), bad, good, wanted, pad_id)
        return loss.detach(), torch.autograd.grad(loss, vector)[0]

    def descend(side_by_side: Callable[[list[Any]], Iterable[tuple[Tensor, Tensor]]]) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(model.config.hidden_size, generator=generator)
        vector = nn.Parameter((start / start.norm()).to(model.device))
        optimizer = torch.optim.Adam([vector], lr=0.05)
        recent: list[float] = []
        for step in trange(steps, desc="optimised direction", unit="step", mininterval=15.0 if not sys.stderr.isatty() else 0.5):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 - step / steps)
            chosen = torch.randint(0, len(harmful), (min(batch_size, len(harmful)),), generator=generator).tolist()
            jobs = [(vector, chosen[first : first + PART]) for first in range(0, len(chosen), PART)]
            losses, slopes = (torch.stack(values).sum(0) / len(chosen) for values in zip(*side_by_side(jobs), strict=True))
            vector.grad = slopes
            optimizer.step()
            with torch.no_grad():
                vector.div_(vector.norm())  # its length means nothing, and would slow the steps as it grows
            recent = [*recent[-9:], float(losses)]
        return save(
            {"unit": vector.detach().double().cpu(), "loss": torch.tensor(sum(recent) / len(recent), dtype=torch.float64)}
        )

    def compute(_: None) -> bytes:
        with crew(model, gradient, -(-min(batch_size, len(harmful)) // PART)) as (run, pool):
            return descend(lambda jobs: (pool.map if pool else map)(run, jobs))

    (value,) = store.run([(key, None)], compute, "optimised direction", unit="direction")
    found = load(value)
    return found["unit"], float(found["loss"])
