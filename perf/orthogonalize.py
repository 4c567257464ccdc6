"""Editing a checkpoint on disk, compared with a plain copy of the same bytes and with the usual load, edit and save.

`python -m perf.orthogonalize SOURCE TARGET` is the process whose memory is measured.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from perf import harness, workload
from refusal.io.errors import UserError
from refusal.lm.checkpoint import INDEX, Entry, data_of, header_bytes
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, Report, orthogonalize

D_MODEL, WIDTH, VOCAB, HEADS = 4096, 11008, 32_000, 32  # the shape of a Llama of 7 billion
TIMED, LARGE = 5, 19  # blocks: 2.5 and 8.2 GB of bfloat16
GB = 1e9


def entries(n_layers: int) -> Iterator[Entry]:
    """The tensors of a Llama of so many blocks, in the order of its file."""
    block = {
        **{f"self_attn.{name}_proj": (D_MODEL, D_MODEL) for name in "qkvo"},
        **{f"mlp.{name}_proj": (WIDTH, D_MODEL) for name in ("gate", "up")},
        "mlp.down_proj": (D_MODEL, WIDTH),
        "input_layernorm": (D_MODEL,),
        "post_attention_layernorm": (D_MODEL,),
    }
    blocks = {f"model.layers.{layer}.{name}": shape for layer in range(n_layers) for name, shape in block.items()}
    shapes = {"model.embed_tokens": (VOCAB, D_MODEL), **blocks, "model.norm": (D_MODEL,), "lm_head": (VOCAB, D_MODEL)}
    for name, shape in shapes.items():
        yield Entry(f"{name}.weight", "BF16", shape, 2 * torch.Size(shape).numel())


def synthetic(folder: Path, n_layers: int, shard_bytes: int = 2_000_000_000) -> Path:
    """A sharded checkpoint in bfloat16, of noise repeated from tensor to tensor, written without holding it."""
    folder.mkdir()
    shards: list[list[Entry]] = [[]]
    for entry in entries(n_layers):
        if sum(e.n_bytes for e in shards[-1]) + entry.n_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    noise = data_of((0.02 * torch.randn(VOCAB * D_MODEL, generator=torch.Generator().manual_seed(0))).bfloat16())
    weight_map = {}
    for n, shard in enumerate(shards):
        file = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {entry.name: file for entry in shard}
        with (folder / file).open("wb") as out:
            out.write(header_bytes(shard, {}))
            for entry in shard:
                out.write(noise[: entry.n_bytes])
            os.fsync(out.fileno())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = {"hidden_size": D_MODEL, "intermediate_size": WIDTH, "num_hidden_layers": n_layers, "vocab_size": VOCAB}
    LlamaConfig(**sizes, num_attention_heads=HEADS, dtype="bfloat16", tie_word_embeddings=False).save_pretrained(folder)
    return folder


def copy(source: Path, target: Path) -> None:
    """Read, write and fsync of every byte, through one buffer."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as file, (target / path.name).open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 22)
            out.flush()
            os.fsync(out.fileno())


def ours(source: Path, target: Path, form: str = "safetensors") -> Report:
    intervention = Intervention("perf", workload.random_directions(1, D_MODEL))
    (report,) = orthogonalize(source, [Edit(target, intervention, format="lora" if form == "lora" else "safetensors")])
    return report


@torch.no_grad()
def reload(source: Path, target: Path) -> None:
    """Load the whole model, edit its matrices, save it."""
    model, v = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), workload.random_directions(1, D_MODEL)[0]
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            w = linear.weight.float()
            linear.weight.copy_(w - torch.outer(v, v @ w))
    embedding = model.model.embed_tokens.weight
    embedding.copy_(embedding.float() - torch.outer(embedding.float() @ v, v))
    model.save_pretrained(target)


def run(console: Console, rounds: int = 3) -> dict[str, float]:
    """Times on a checkpoint that the page cache holds; memory on one of 8 GB, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        free, needed = shutil.disk_usage(folder).free / GB, 2.2 * sum(entry.n_bytes for entry in entries(LARGE)) / GB
        if free < needed:
            raise UserError(f"{folder.parent}: {free:.0f} GB are free, {needed:.0f} are needed: set TMPDIR to a folder with room")
        return _timed(console, folder, rounds) | _memory(console, folder)


def _timed(console: Console, folder: Path, rounds: int) -> dict[str, float]:
    source, target = synthetic(folder / "source", TIMED), folder / "target"

    def into_empty(write: Callable[[Path, Path], object]) -> None:
        shutil.rmtree(target, ignore_errors=True)
        write(source, target)

    copy(source, target)  # its pages are in memory from here on, for all arms alike
    measured = harness.measure({write.__name__: partial(into_empty, write) for write in (copy, ours, reload)}, console, rounds)
    size, notes = _size(source), {"ours": "one edit, embedding included", "reload": "no fsync"}
    console.print(measured.table(f"orthogonalization, {size:.1f} GB of bfloat16, page cache warm", "copy", notes))
    ours(source, folder / "lora", "lora")
    lora = _size(folder / "lora")
    console.print(f"as an adapter: {1000 * lora:.2f} MB, {size / lora:.0f} times smaller")
    for path in (source, target, folder / "lora"):
        shutil.rmtree(path)
    return {
        "ratio_to_copy": measured.ratio("ours", "copy").median,
        "ratio_to_reload": measured.ratio("reload", "ours").median,
        "seconds": measured.median("ours"),
        "checkpoint_gb": size,
        "peak_mb_reload": measured.peak_mb["reload"],
        "checkpoint_over_lora": size / lora,
    }


def _memory(console: Console, folder: Path) -> dict[str, float]:
    source = synthetic(folder / "large", LARGE)
    size, largest = _size(source), 2 * VOCAB * D_MODEL / 1e6
    _, seconds, peak = harness.in_subprocess(["-m", "perf.orthogonalize", str(source), str(folder / "edited")])
    beyond = peak - 2 * largest
    console.print(
        f"a checkpoint of {size:.1f} GB, whole process: {peak:.0f} MB of anonymous memory at most, "
        f"{beyond:.0f} beyond two of the largest tensors ({largest:.0f} MB each), {seconds:.1f} s"
    )
    return {"large_checkpoint_gb": size, "large_seconds": seconds, "peak_mb": peak, "peak_minus_two_largest_mb": beyond}


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / GB


if __name__ == "__main__":
    torch.set_num_threads(workload.THREADS)
    ours(Path(sys.argv[1]), Path(sys.argv[2]))
