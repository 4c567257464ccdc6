"""Editing a checkpoint on disk: ours beside a plain copy of the same bytes and the usual load, edit and save.

`python -m perf.orthogonalize SOURCE TARGET` is the process whose memory is measured.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from perf import harness, workload
from refusal.io.errors import UserError
from refusal.lm.checkpoint import INDEX, header_bytes, write_all
from refusal.method.orthogonalize import Edit, Report, orthogonalize

D_MODEL, WIDTH, VOCAB, HEADS = 4096, 11008, 32_000, 32  # the shape of a Llama of 7 billion
TIMED, LARGE = 5, 19  # blocks: 2.5 and 8.2 GB of bfloat16
GB = 1e9


def shapes(n_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama of so many blocks, in the order of its file."""
    yield "model.embed_tokens.weight", (VOCAB, D_MODEL)
    for layer in range(n_layers):
        block = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            yield f"{block}self_attn.{name}_proj.weight", (D_MODEL, D_MODEL)
        yield f"{block}mlp.gate_proj.weight", (WIDTH, D_MODEL)
        yield f"{block}mlp.up_proj.weight", (WIDTH, D_MODEL)
        yield f"{block}mlp.down_proj.weight", (D_MODEL, WIDTH)
        yield f"{block}input_layernorm.weight", (D_MODEL,)
        yield f"{block}post_attention_layernorm.weight", (D_MODEL,)
    yield "model.norm.weight", (D_MODEL,)
    yield "lm_head.weight", (VOCAB, D_MODEL)


def synthetic(folder: Path, n_layers: int, shard_bytes: int = 2_000_000_000) -> Path:
    """A sharded checkpoint in bfloat16, of noise repeated from tensor to tensor, written without holding it."""
    folder.mkdir()
    shards: list[dict] = [{}]
    for name, shape in shapes(n_layers):
        n_bytes, at = 2 * torch.Size(shape).numel(), max((t["data_offsets"][1] for t in shards[-1].values()), default=0)
        if at + n_bytes > shard_bytes:
            shards.append({})
            at = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n_bytes]}
    noise = (0.02 * torch.randn(VOCAB * D_MODEL, generator=torch.Generator().manual_seed(0))).bfloat16().view(torch.uint8).numpy()
    weight_map = {}
    for n, shard in enumerate(shards):
        file = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (folder / file).open("wb", buffering=0) as out:
            write_all(out, header_bytes(shard))
            for fields in shard.values():
                write_all(out, noise[: fields["data_offsets"][1] - fields["data_offsets"][0]])
            os.fsync(out.fileno())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D_MODEL, "intermediate_size": WIDTH}
    config |= {"num_hidden_layers": n_layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB}
    config |= {"dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copy(source: Path, target: Path) -> None:
    """Read, write and fsync of every byte, through one buffer."""
    target.mkdir()
    view = memoryview(bytearray(1 << 22))
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file, (target / path.name).open("wb", buffering=0) as out:
            while n := file.readinto(view):
                write_all(out, view[:n])
            os.fsync(out.fileno())


def ours(source: Path, target: Path, form: str = "safetensors") -> Report:
    (report,) = orthogonalize(source, [Edit(target, _direction(), 1.0, format="lora" if form == "lora" else "safetensors")])
    return report


@torch.no_grad()
def reload(source: Path, target: Path) -> None:
    """Load the whole model, edit its matrices, save it."""
    model, v = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), _direction()
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
        _check_space(folder, 2.2 * 2 * sum(torch.Size(shape).numel() for _, shape in shapes(LARGE)))
        scalars = _timed(console, folder, rounds)
        return scalars | _memory(console, folder)


def _timed(console: Console, folder: Path, rounds: int) -> dict[str, float]:
    source, target = synthetic(folder / "source", TIMED), folder / "target"

    def arm(write):
        def run() -> None:
            shutil.rmtree(target, ignore_errors=True)
            write(source, target)

        return run

    arms = {"copy": arm(copy), "ours": arm(ours), "reload": arm(reload)}
    copy(source, target)  # its pages are in memory from here on, for all arms alike
    found = harness.measure(arms, console, rounds)
    notes = {
        "copy": "read, write, fsync of the same bytes",
        "ours": "one edit, embedding included",
        "reload": "load the whole model, edit, save; no fsync",
    }
    size = sum(path.stat().st_size for path in source.iterdir()) / GB
    console.print(found.table(f"orthogonalization, {size:.1f} GB of bfloat16, page cache warm", "copy", notes))
    ours(source, folder / "lora", "lora")
    lora = sum(path.stat().st_size for path in (folder / "lora").iterdir())
    console.print(f"as an adapter: {lora / 1e6:.2f} MB, {size * GB / lora:.0f} times smaller")
    for path in (source, target, folder / "lora"):
        shutil.rmtree(path)
    return {
        "ratio_to_copy": found.ratio("ours", "copy").median,
        "ratio_to_reload": found.ratio("reload", "ours").median,
        "seconds": found.median("ours"),
        "checkpoint_gb": size,
        "peak_mb_reload": found.peak_mb["reload"],
        "checkpoint_over_lora": size * GB / lora,
    }


def _memory(console: Console, folder: Path) -> dict[str, float]:
    source = synthetic(folder / "large", LARGE)
    size = sum(path.stat().st_size for path in source.iterdir()) / GB
    largest = 2 * VOCAB * D_MODEL / 1e6
    _, seconds, peak = harness.in_subprocess(["-m", "perf.orthogonalize", str(source), str(folder / "edited")])
    console.print(
        f"a checkpoint of {size:.1f} GB, whole process: {peak:.0f} MB of anonymous memory at most, "
        f"{peak - 2 * largest:.0f} beyond two of the largest tensors ({largest:.0f} MB each), {seconds:.1f} s"
    )
    return {
        "large_checkpoint_gb": size,
        "large_seconds": seconds,
        "peak_mb": peak,
        "peak_minus_two_largest_mb": peak - 2 * largest,
    }


def _direction() -> torch.Tensor:
    return workload.random_directions(1, D_MODEL)[0]


def _check_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: {free / GB:.0f} GB are free and {needed / GB:.0f} are needed: set TMPDIR to a folder with room"
        )


if __name__ == "__main__":
    torch.set_num_threads(workload.THREADS)
    ours(Path(sys.argv[1]), Path(sys.argv[2]))
