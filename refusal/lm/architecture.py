"""Which tensors of an architecture write into the residual stream, in the live model and in its checkpoint.

Interventions ask for modules of the model, weight edits for tensor names on disk. The two differ for mixtures of experts:
transformers 5 fuses the experts' matrices into one 3-D parameter when it loads and splits them again when it saves.

To add an architecture: check in its `modeling_*.py` that a block is `x + attn_out(x)` then `x + mlp_out(x)`, add its
`model_type` to `_PRE_NORM` or `_POST_NORM`, its tensor names to `_WRITERS` if they are new, and a line to
`tests/tiny.py`, whose architectures every identity is tested on.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from refusal.io.errors import UserError

# A block adds the output of attention and MLP to the stream: x + attn(norm(x)), x + mlp(norm(x)) ...
_PRE_NORM = {"gemma", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"}
# ... or normalises it once more first: x + norm(attn(norm(x))), x + norm(mlp(norm(x))).
_POST_NORM = {"gemma2", "gemma3_text"}
# By `model_type` of config.json: decoder-only transformers, their blocks under `model.layers`, their stream `hidden_size` wide.
SUPPORTED = tuple(sorted(_PRE_NORM | _POST_NORM))

# Linear layers keep [out, in], so the d_model axis of a weight is the last but one, fused experts
# [expert, out, in] included; a bias has no other axis than its own.
_WRITERS = re.compile(
    r"model\.layers\.\d+\."
    r"(?:self_attn\.o_proj"  # W_O of all of them
    r"|mlp\.down_proj"  # W_out of a dense MLP
    r"|mlp\.experts\.\d+\.down_proj"  # Qwen3-MoE on disk
    r"|block_sparse_moe\.experts\.\d+\.w2"  # Mixtral on disk
    r")\.(?P<kind>weight|bias)"
    r"|model\.layers\.\d+\.mlp\.experts\.down_proj"  # both in memory, and on disk if saved so
)


@dataclass(frozen=True)
class Architecture:
    """Where the residual stream of one model begins and what is added to it.

    `norm_after_writer`: an RMSNorm stands between writer and stream (Gemma 2 and 3). Projecting the writer's matrix
    then does not project what reaches the stream: the norm divides by the size of the projected output and not
    of the original one, and its elementwise scale turns what is left back towards the direction. The identity
    "`writes` ablation equals the orthogonalized checkpoint" fails there at every alpha but 0; it is exact elsewhere.

    Gemma multiplies embeddings by sqrt(d_model) inside the embedding module; a scalar commutes with the projection.
    """

    model_type: str
    n_layers: int
    d_model: int
    n_experts: int  # 0 for a dense model
    tied: bool  # the unembedding shares the embedding's tensor
    norm_after_writer: bool

    embedding_name = "model.embed_tokens.weight"  # [vocab, d_model]
    unembedding_name = "lm_head.weight"  # [vocab, d_model]

    def writer_axis(self, name: str, include_embedding: bool = False) -> int | None:
        """The axis of tensor `name` that is d_model, counted from the end, or None if it doesn't write to the stream.

        -2 for weights ([d_model, in] or fused experts [expert, d_model, in]); -1 for biases, and for the embedding
        where `include_embedding`.
        """
        if name == self.embedding_name:
            return -1 if include_embedding else None
        match = _WRITERS.fullmatch(name)
        if match is None:
            return None
        return -1 if match["kind"] == "bias" else -2

    def missing_writers(self, names: set[str]) -> list[str]:
        """Writers that every checkpoint of this architecture has and `names` lacks (one that is quantized, say)."""
        missing = []
        for layer in range(self.n_layers):
            block = f"model.layers.{layer}."
            if block + "self_attn.o_proj.weight" not in names:
                missing.append(block + "self_attn.o_proj.weight")
            if {block + "mlp.down_proj.weight", block + "mlp.experts.down_proj"} & names:
                continue
            expert = "block_sparse_moe.experts.{}.w2" if self.model_type == "mixtral" else "mlp.experts.{}.down_proj"
            mlp = [expert.format(e) for e in range(self.n_experts)] or ["mlp.down_proj"]
            missing += [f"{block}{m}.weight" for m in mlp if f"{block}{m}.weight" not in names]
        return missing

    def embedding(self, model: nn.Module) -> nn.Module:
        """The module whose output [batch, seq, d_model] starts the stream."""
        return model.get_submodule("model.embed_tokens")

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks; block l takes `resid_pre` of layer l as its first argument, `hidden_states`."""
        return cast(nn.ModuleList, model.get_submodule("model.layers"))

    def attn_out(self, block: nn.Module) -> nn.Module:
        """The module of a block whose output [batch, seq, d_model] (first of a tuple) attention adds to the stream."""
        return block.get_submodule("post_attention_layernorm" if self.norm_after_writer else "self_attn")

    def mlp_out(self, block: nn.Module) -> nn.Module:
        """The module of a block whose output [batch, seq, d_model] (first of a tuple) the MLP adds to the stream."""
        return block.get_submodule("post_feedforward_layernorm" if self.norm_after_writer else "mlp")


def architecture_of(config, folder: Path | None = None) -> Architecture:
    """The architecture of the model that a transformers config describes, or a config.json's dictionary (of `folder`).

    Raises UserError for a `model_type` that is not in SUPPORTED, quantized weights, or a config that transformers cannot read.
    """
    where = "config.json" if folder is None else f"{folder}/config.json"
    fields = config if isinstance(config, dict) else {"model_type": config.model_type}
    kind = fields.get("model_type")
    if kind not in SUPPORTED:
        raise UserError(
            f"{where}: model_type {kind!r} is not supported (only {', '.join(SUPPORTED)}): "
            "say in refusal/lm/architecture.py which of its tensors write into the residual stream."
        )
    if fields.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config: quantized weights cannot be edited: use an unquantized checkpoint.")
    if config is fields:
        from transformers import CONFIG_MAPPING  # slow to import

        try:
            config = CONFIG_MAPPING[kind].from_dict(fields)  # with what config.json leaves to the defaults
        except Exception as error:  # any value of config.json meets code that assumes another
            why = " ".join(str(error).split())
            raise UserError(f"{where}: transformers cannot read it as {kind} ({why}): fetch it again.") from None
    return Architecture(
        model_type=kind,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_experts=getattr(config, "num_local_experts" if kind == "mixtral" else "num_experts", 0) or 0,
        tied=bool(config.tie_word_embeddings),
        norm_after_writer=kind in _POST_NORM,
    )


def same_model(edited: Architecture, where: Path, ours: Architecture, base: Path) -> None:
    """Raises UserError where an architecture is another one than the base's."""
    for what in ("model_type", "n_layers", "d_model"):
        if getattr(ours, what) != getattr(edited, what):
            raise UserError(
                f"{where}: its {what} is {getattr(edited, what)}, and that of {base} is {getattr(ours, what)}: "
                "give the base that the edit was made of."
            )
