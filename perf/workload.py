"""The workload of record: the same model and prompts for every section, from seeds; and what machine they ran on."""

import os
import platform
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from refusal.lm.load import LM
from stages.record import cpu_name

THREADS = 2
N_PROMPTS, SHORTEST, LONGEST, SHARED = 256, 20, 60, 12  # tokens; the first SHARED of each prompt are the same
MAX_NEW_TOKENS = 64
BATCH_SIZE = 32  # of the arms that stand for common practice
PAD_ID = 0


def prompts(n: int = N_PROMPTS, seed: int = 0) -> list[list[int]]:
    """Token ids of `n` prompts of SHORTEST to LONGEST tokens in no order; the first m are the same whatever `n` >= m is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    shared = draw(10, 32_000, SHARED)
    return [shared + draw(10, 32_000, draw(SHORTEST, LONGEST + 1, 1)[0] - SHARED) for _ in range(n)]


def model(
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, shape: tuple[int, ...] = (32_000, 768, 2048, 12, 12)
) -> PreTrainedModel:
    """A Qwen2 of 134 M parameters, randomly initialised: 12 blocks, d_model 768, untied, 110 M of them used by a token."""
    vocab_size, hidden_size, intermediate_size, n_layers, n_heads = shape
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = Qwen2ForCausalLM(config)
    made.config._attn_implementation = "sdpa"
    made.to(device, dtype)
    return made.eval().requires_grad_(False)


def lm(model: PreTrainedModel) -> LM:
    """A model of `model` with no tokens that end an answer, and no tokenizer."""
    return LM(model, None, "perf", frozenset(), PAD_ID)  # type: ignore[arg-type]


def matrix_products(model: PreTrainedModel, n_tokens: int, rows: int, blocks: int, n_logits: int = 0) -> None:
    """The products of a forward with weights and nothing else: `n_tokens` through `blocks` blocks, `rows` at a time.

    Timed as an arm, this is the bound: no attention, norm, cache or copy, at a number of rows that suits the machine.
    `n_logits` of the tokens are multiplied with the unembedding too.
    """
    config = model.config
    weights = [
        (m.weight, m.bias) for block in model.model.layers[:blocks] for m in block.modules() if isinstance(m, torch.nn.Linear)
    ]
    head = model.lm_head.weight
    inputs = {
        width: torch.ones(rows, width, dtype=head.dtype, device=head.device)
        for width in {config.hidden_size, config.intermediate_size, *(w.shape[1] for w, _ in weights)}
    }
    with torch.inference_mode():
        for n in _chunks(n_tokens, rows):
            for weight, bias in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]][:n], weight, bias)
        for n in _chunks(n_logits, rows):
            torch.nn.functional.linear(inputs[head.shape[1]][:n], head)
    if head.is_cuda:
        torch.cuda.synchronize()


def machine() -> dict[str, object]:
    """What the figures depend on: processor, cores, memory, threads, versions, and the GPU if there is one."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def random_directions(n: int, d_model: int, seed: int = 0) -> Tensor:
    """Unit vectors [n, d_model]."""
    drawn = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _chunks(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]
