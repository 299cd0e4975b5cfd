"""One decoder-only transformer for Llama, Qwen2 and Qwen3.

    model = Transformer(config, dtype=torch.float32, device="cpu")
    model.load_weights(checkpoint.weights("cpu"))
    hidden = model(input_ids, positions, attend)          # [...] -> [..., H]
    logits = model.compute_logits(hidden)                 # [..., V]

Leading dimensions are free: [T] when requests are packed behind each other, [B, T] when padded.
The model never learns where keys and values live: it hands them to `attend`, which the milestone
gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ModelConfig
from common.layers import (
    AttendFn,
    Linear,
    LinearFactory,
    LinearModule,
    Ops,
    copy_checked,
    empty_parameter,
)
from common.rope import RotaryEmbedding


class DecoderLayer(nn.Module):
    """The weights of one layer; q, k and v are one matrix, gate and up another."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        linear: LinearFactory,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        q, kv = config.q_size, config.kv_size

        def make(name: str, in_features: int, shard_sizes: list[int], bias: bool) -> LinearModule:
            name = f"model.layers.{index}.{name}"
            return linear(in_features, shard_sizes, bias, name=name, dtype=dtype, device=device)

        self.qkv_proj = make("self_attn.qkv_proj", hidden, [q, kv, kv], config.qkv_bias)
        self.o_proj = make("self_attn.o_proj", q, [hidden], config.o_bias)
        self.gate_up_proj = make("mlp.gate_up_proj", hidden, [inner, inner], config.mlp_bias)
        self.down_proj = make("mlp.down_proj", inner, [hidden], config.mlp_bias)
        self.input_norm = empty_parameter(hidden, dtype=dtype, device=device)
        self.post_attention_norm = empty_parameter(hidden, dtype=dtype, device=device)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = empty_parameter(config.head_dim, dtype=dtype, device=device)
            self.k_norm = empty_parameter(config.head_dim, dtype=dtype, device=device)

    def shards(self) -> Iterator[tuple[str, LinearModule, int]]:
        """Each projection of the checkpoint: its name, the module that holds it, which shard."""
        for module, *names in (
            (self.qkv_proj, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (self.o_proj, "self_attn.o_proj"),
            (self.gate_up_proj, "mlp.gate_proj", "mlp.up_proj"),
            (self.down_proj, "mlp.down_proj"),
        ):
            for index, name in enumerate(names):
                yield name, module, index

    def finish_loading(self) -> None:
        """Let every projection settle into the layout it computes with."""
        for module in (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj):
            module.finish_loading()

    def norms(self) -> Iterator[tuple[str, Tensor]]:
        """Each norm of the checkpoint: the name of its tensor and where it goes."""
        yield "input_layernorm.weight", self.input_norm
        yield "post_attention_layernorm.weight", self.post_attention_norm
        if self.q_norm is not None:
            yield "self_attn.q_norm.weight", self.q_norm
            yield "self_attn.k_norm.weight", self.k_norm


class Transformer(nn.Module):
    """Embedding, layers, final norm and lm_head, for inference only."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int | None = None,
        ops: Ops | None = None,
        linear: LinearFactory = Linear,
    ) -> None:
        """Allocate the weights; their values come with `load_weights`.

        max_positions: how many positions the rope table covers, by default all the model supports.
        """
        super().__init__()
        self.config = config
        self.ops = ops or Ops()
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = empty_parameter(vocab, hidden, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, linear, dtype=dtype, device=device)
            for index in range(config.num_layers)
        )
        self.norm = empty_parameter(hidden, dtype=dtype, device=device)
        tied = config.tie_word_embeddings
        # A tied head computes with the embedding's weights and needs no memory of its own.
        self.lm_head = Linear(
            hidden, [vocab], False, name="lm_head", dtype=dtype, device="meta" if tied else device
        )
        if tied:
            self.lm_head.weight = self.embed_tokens
        self.rope = RotaryEmbedding(
            config, max_positions=max_positions or config.max_model_len, dtype=dtype, device=device
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: AttendFn,
        rope_lens: Tensor | None = None,
    ) -> Tensor:
        """input_ids, positions, rope_lens: [...] int64 -> hidden [..., H] after the final norm.

        rope_lens: see `RotaryEmbedding.forward`; only models with dynamic rope look at it.
        """
        config, ops, eps = self.config, self.ops, self.config.rms_norm_eps
        q_heads, kv_heads = config.num_heads, config.num_kv_heads
        heads = (*input_ids.shape, q_heads + 2 * kv_heads, config.head_dim)
        cos, sin = self.rope(positions, rope_lens)

        x, residual = F.embedding(input_ids, self.embed_tokens), None
        for index, layer in enumerate(self.layers):
            x, residual = ops.norm_linear(x, residual, layer.input_norm, eps, layer.qkv_proj)
            q, k, v = x.view(heads).split((q_heads, kv_heads, kv_heads), dim=-2)
            x = ops.attention(attend, index, q, k, v, layer.q_norm, layer.k_norm, eps, cos, sin)
            x = ops.linear(x.flatten(-2), layer.o_proj)
            x, residual = ops.norm_gate_up(
                x, residual, layer.post_attention_norm, eps, layer.gate_up_proj
            )
            x = ops.linear(x, layer.down_proj)
        return ops.add_rms_norm(x, residual, self.norm, eps)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden[..., H] -> logits[..., V] in the model's dtype."""
        return self.ops.linear(hidden, self.lm_head)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every tensor of a checkpoint (Hugging Face names) into its place.

        One tensor is alive at a time where `weights` is lazy. Raises ValueError naming tensors
        that are missing, not of this model, or of another shape than the configuration asks for.
        """
        places = self._places()
        missing, unexpected = dict.fromkeys(places), []
        for name, tensor in weights:
            if name in places:
                try:
                    places[name](tensor)
                except ValueError as error:
                    raise ValueError(f"weights: {name} {error}") from None
                missing.pop(name, None)
            elif not self._is_redundant(name):
                unexpected.append(name)
            del tensor  # before the next one is read
        if missing or unexpected:
            raise ValueError(
                f"weights do not belong to this config.json ({self.config.architecture}): "
                f"missing {_listed(missing)}; unexpected {_listed(unexpected)}"
            )
        for layer in self.layers:
            layer.finish_loading()
        self.lm_head.finish_loading()

    def _places(self) -> dict[str, Callable[[Tensor], None]]:
        """For each tensor name of a checkpoint, what takes the tensor in."""
        places = {
            "model.embed_tokens.weight": partial(copy_checked, self.embed_tokens),
            "model.norm.weight": partial(copy_checked, self.norm),
        }
        if not self.config.tie_word_embeddings:
            places["lm_head.weight"] = partial(self.lm_head.load_shard, "weight", 0)
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            for name, norm in layer.norms():
                places[f"{prefix}.{name}"] = partial(copy_checked, norm)
            for name, module, shard in layer.shards():
                for kind in module.kinds:
                    places[f"{prefix}.{name}.{kind}"] = partial(module.load_shard, kind, shard)
        return places

    def _is_redundant(self, name: str) -> bool:
        """Tensors some checkpoints carry although they follow from others."""
        tied_head = name == "lm_head.weight" and self.config.tie_word_embeddings
        return tied_head or name.endswith("rotary_emb.inv_freq")


def _listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more
