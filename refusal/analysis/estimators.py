"""Other ways to estimate a direction than difference-in-means, for one layer or for the whole stack.

`logistic` and `lda` look for what tells harmful from safe prompts best; `optimised` for what refusal runs through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from tqdm import trange

from refusal.io.params import Optimised
from refusal.io.store import Store, key
from refusal.lm.batching import model_replicas
from refusal.lm.load import LM
from refusal.method.activations import last_logits
from refusal.method.interventions import Ablation, Intervention, intervene

PAIRS_PER_JOB = 8  # whose gradient is computed together


def logistic(harmful: Float[Tensor, "n_harmful d_model"], safe: Float[Tensor, "n_safe d_model"]) -> Float[Tensor, " d_model"]:
    """The unit normal of logistic regression (L2, C = 1, on standardised activations), towards harmful, in float64.

    Standardising divides each coordinate by its spread; the weights are brought back to the stream's coordinates.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = torch.cat([harmful, safe]).double(), [1] * len(harmful) + [0] * len(safe)
    spread = x.std(0)
    spread = spread.where(spread > 1e-9 * spread.max(), torch.inf)  # a coordinate that never varies carries nothing
    # To the optimum itself: where the default tolerance stops depends on the processor's rounding, in the third digit.
    fitted = LogisticRegression(max_iter=10_000, tol=1e-10).fit(((x - x.mean(0)) / spread).numpy(), y)
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
        super().__init__([Intervention("optimised", normalize(vector.detach(), dim=0), 1.0, sites)])
        self.vector = vector

    def apply(self, r: Tensor, layer: int) -> Tensor:
        v = normalize(self.vector, dim=0)
        x = r.to(torch.promote_types(r.dtype, torch.float32))
        return (x - (x @ v)[..., None] * v).to(r.dtype)


def first_token_loss(
    lm: LM,
    ablation: Ablation,
    harmful: Sequence[Sequence[int]],
    safe: Sequence[Sequence[int]],
    wanted: Float[Tensor, "n vocab"],
) -> Float[Tensor, ""]:
    """How far, in nats, ablation is from letting harmful prompts be answered as safe ones are and changing nothing else.

    Mean KL from `wanted`, the baseline's log probabilities of the first answer token after each safe prompt, to the ablated:
    after the harmful counterpart, and after the safe prompt itself.
    """
    with intervene(lm.model, ablation):
        after = first_token(lm, [*harmful, *safe])
    return kl_div(after, torch.cat([wanted, wanted]), reduction="batchmean", log_target=True)


def first_token(lm: LM, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "n vocab"]:
    """Log probabilities of the first answer token after each prompt, float32."""
    return last_logits(lm, prompts, [], 1)(0, len(prompts))[:, -1].float().log_softmax(-1)


def optimised(
    lm: LM,
    harmful: Sequence[Sequence[int]],
    safe: Sequence[Sequence[int]],
    sites: str,
    settings: Optimised,
    seed: int,
    store: Store,
) -> tuple[Float[Tensor, " d_model"], float]:
    """The unit direction whose ablation at `sites` minimises `first_token_loss` on these pairs, and the loss at the end.

    The idea of optimising a direction through its ablation is from Wollschlaeger et al. 2025 (arXiv 2502.17420), "The Geometry of
    Refusal in Large Language Models"; the loss here asks for no answer but the first token that safe counterparts get.
    """
    name = key(
        "optimised direction",
        (_descend, _gradient),
        **lm.identity,
        harmful=[list(ids) for ids in harmful],
        safe=[list(ids) for ids in safe],
        sites=sites,
        **settings.model_dump(),
        seed=seed,
    )

    def gradient(model: Any, job: tuple[nn.Parameter, list[int]]) -> tuple[Tensor, Tensor]:
        vector, pairs = job
        return _gradient(replace(lm, model=model), vector, sites, [harmful[i] for i in pairs], [safe[i] for i in pairs])

    def compute(_: None) -> bytes:
        n_pairs = min(settings.batch_size, len(harmful))
        with model_replicas(lm.model, gradient, -(-n_pairs // PAIRS_PER_JOB)) as (run, pool):
            return _descend(lm, len(harmful), settings, seed, lambda jobs: (pool.map if pool else map)(run, jobs))

    (value,) = store.run([(name, None)], compute, "optimised direction", unit="direction")
    learned = load(value)
    return learned["unit"], float(learned["loss"])


def _gradient(
    lm: LM, vector: nn.Parameter, sites: str, harmful: Sequence[Sequence[int]], safe: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The sum over these pairs of the loss, and its gradient."""
    with torch.no_grad():
        wanted = first_token(lm, safe)
    loss = len(safe) * first_token_loss(lm, _Learned(vector, sites), harmful, safe, wanted)
    return loss.detach(), torch.autograd.grad(loss, vector)[0]


def _descend(
    lm: LM, n_pairs: int, settings: Optimised, seed: int, gradients: Callable[[list[Any]], Iterable[tuple[Tensor, Tensor]]]
) -> bytes:
    """Adam from a random direction, `batch_size` pairs a step, of which `gradients` takes (direction, some pairs) each."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(lm.d_model, generator=generator)
    vector = nn.Parameter((start / start.norm()).to(lm.model.device))
    optimizer, recent = torch.optim.Adam([vector], lr=0.05), list[float]()
    every = 15.0 if not sys.stderr.isatty() else 0.5
    for step in trange(settings.steps, desc="optimised direction", unit="step", mininterval=every):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / settings.steps)
        chosen = torch.randint(0, n_pairs, (min(settings.batch_size, n_pairs),), generator=generator).tolist()
        jobs = [(vector, chosen[first : first + PAIRS_PER_JOB]) for first in range(0, len(chosen), PAIRS_PER_JOB)]
        losses, slopes = (torch.stack(values).sum(0) / len(chosen) for values in zip(*gradients(jobs), strict=True))
        vector.grad = slopes
        optimizer.step()
        with torch.no_grad():
            vector.div_(vector.norm())  # its length means nothing, and would slow the steps as it grows
        recent = [*recent[-9:], float(losses)]
    unit, loss = vector.detach().double().cpu(), torch.tensor(sum(recent) / len(recent), dtype=torch.float64)
    return save({"unit": unit, "loss": loss})
