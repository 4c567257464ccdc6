"""One model in memory that becomes any edit of its base and back again: only what an edit may change is read and put in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from refusal.io.errors import UserError
from refusal.lm.adapter import base_folder, merge
from refusal.lm.architecture import architecture_of
from refusal.lm.checkpoint import read_shards
from refusal.lm.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SwappableLM:
    """A base checkpoint, loaded once, and the edits of it that `refusal.method.orthogonalize` wrote.

    Raises UserError as `load_model` does.
    """

    def __init__(self, base: Path, dtype: str, device: str) -> None:
        self.base, self.dtype, self.device = base, dtype, device
        self.model = load_model(base, dtype, device)
        self.architecture = architecture_of(self.model.config)
        self.active_checkpoint = base
        head: Any = self.model.get_output_embeddings()
        embedding: Any = self.model.get_input_embeddings()
        if head.weight is embedding.weight:
            # An edit unties them: the unembedding keeps the values that both have.
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)

    @torch.no_grad()
    def load_weights(self, folder: Path) -> PreTrainedModel:
        """The model with the weights of `folder`, the base itself or an edit of it: what `load_model(folder)` would give.

        Every writer and the embedding are copied, whatever the edit left out, so any may follow any. Where accelerate keeps
        layers off the device there is nothing in place to copy to, and the checkpoint is loaded whole. Raises UserError for
        a folder whose tensors are not the base's by name and shape.
        """
        if folder == self.active_checkpoint:
            return self.model
        if any(parameter.is_meta for parameter in self.model.parameters()):
            self.model, self.active_checkpoint = load_model(folder, self.dtype, self.device), folder
            return self.model
        base = base_folder(folder)
        if base is not None:
            self._put(base)
            merge(self.model, folder, base)
        else:
            if _shapes(folder) | _shapes(self.base) != _shapes(folder):  # untied, it has an unembedding more
                raise UserError(
                    f"{folder}: holds other tensors than {self.base}, so it is no edit of it; run orthogonalize again"
                )
            self._put(folder)
        self.active_checkpoint = folder
        return self.model

    def _put(self, folder: Path) -> None:
        for shard in read_shards(folder):
            with safe_open(shard.path, "pt") as file:
                for entry in shard.entries:
                    if self.architecture.writer_axis(entry.name, include_embedding=True) is None:
                        continue
                    name, expert = self.architecture.in_memory(entry.name)
                    parameter = self.model.get_parameter(name)
                    (parameter if expert is None else parameter[expert]).copy_(file.get_tensor(entry.name))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for shard in read_shards(folder) for entry in shard.entries}
