"""What a checkpoint says about its model: sizes, switches and the rotary embedding.

    config = ModelConfig.from_dict(json.load(open("config.json")))
    config.num_parameters()          # {"embed": ..., "attention": ..., "mlp": ..., ...}

One description serves the three architectures (Llama, Qwen2, Qwen3): they differ only in which
projections carry a bias and in whether queries and keys are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LLAMA, QWEN2, QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"

MODEL_TYPES = {LLAMA: "llama", QWEN2: "qwen2", QWEN3: "qwen3"}
"""Supported architectures, and the `model_type` of each in config.json."""

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Supported rope types, and the parameters each cannot do without."""

DTYPES = ("float32", "bfloat16", "float16")

_SIZE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
"""The sizes by our names, and as config.json calls them."""

_DEFAULT_THETA = 10_000.0
_QWEN3_HEAD_DIM = 128  # where a Qwen3's config.json gives none, as in transformers


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding: base wavelength `theta`, and `params` as config.json has them."""

    rope_type: str = "default"
    theta: float = _DEFAULT_THETA
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_FIELDS:
            raise ValueError(
                f"config.json: rope type {self.rope_type!r} is not supported; "
                f"supported: {', '.join(ROPE_FIELDS)}"
            )
        for name in ROPE_FIELDS[self.rope_type]:
            if name not in self.params:
                raise ValueError(
                    f"config.json: rope type {self.rope_type!r} needs {name!r}, "
                    "which is missing from rope_parameters (or rope_scaling)"
                )
            value = self.params[name]
            derived = value is None and (self.rope_type, name) == ("yarn", "factor")
            if not derived and (not isinstance(value, int | float) or value <= 0):
                raise ValueError(
                    f"config.json: {name} of rope type {self.rope_type!r} must be a positive "
                    f"number, got {value!r}"
                )
        if self.params.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "config.json: partial_rotary_factor other than 1 is not supported; "
                "these architectures rotate whole heads"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (older)."""
        params = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        if any(isinstance(value, Mapping) for value in params.values()):
            raise ValueError(
                "config.json: rope_parameters differ by layer type, which is not supported; "
                "give one set for all layers"
            )
        legacy_type = params.pop("type", "default")
        rope_type = params.pop("rope_type", legacy_type)
        theta = params.pop("rope_theta", None) or config.get("rope_theta") or _DEFAULT_THETA
        if "partial_rotary_factor" in config:
            params.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
        if rope_type in ("llama3", "yarn"):
            # A field beside rope_parameters wins over the one inside, as in transformers.
            fallback = params.get("original_max_position_embeddings")
            original = config.get("original_max_position_embeddings", fallback)
            params["original_max_position_embeddings"] = (
                original or config["max_position_embeddings"]
            )
        return cls(rope_type, float(theta), params)

    def to_dict(self) -> dict[str, Any]:
        """The value of `rope_parameters` in a config.json of transformers 5."""
        return {"rope_type": self.rope_type, "rope_theta": self.theta, **self.params}


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is known before its weights are read."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in MODEL_TYPES:
            raise ValueError(
                f"config.json: architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(MODEL_TYPES)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"config.json: dtype {self.dtype!r} is not supported; "
                f"supported: {', '.join(DTYPES)}"
            )
        for name, their_name in _SIZE_FIELDS.items():
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(
                    f"config.json: {their_name} must be a positive integer, got {size!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"config.json: head_dim must be even to be rotated in pairs, got {self.head_dim}"
            )

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Read a Hugging Face config.json, and the end tokens of a generation_config.json too.

        Raises:
            ValueError: a field is missing or senseless, the architecture or rope type is not
                supported, or the model asks for something this engine would leave out.
        """
        architecture = _architecture(config)
        _refuse_what_is_left_out(config)
        if config.get("rms_norm_eps") is None:
            raise _missing("rms_norm_eps")
        # Qwen2 always has its biases, on q, k and v only; the others say so.
        is_qwen2 = architecture == QWEN2
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            **_sizes(config, architecture),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=RopeConfig.from_dict(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=is_qwen2 or attention_bias,
            o_bias=not is_qwen2 and attention_bias,
            mlp_bias=architecture == LLAMA and bool(config.get("mlp_bias", False)),
            qk_norm=architecture == QWEN3,
            dtype=_dtype_name(config),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_eos_token_ids(config, generation_config or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json as transformers 5 writes it; `from_dict` makes this config of it again."""
        config = {
            "architectures": [self.architecture],
            "model_type": MODEL_TYPES[self.architecture],
            **{theirs: getattr(self, ours) for ours, theirs in _SIZE_FIELDS.items()},
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_dict(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
        }
        if self.architecture != QWEN2:
            config["attention_bias"] = self.qkv_bias
        if self.architecture == LLAMA:
            config["mlp_bias"] = self.mlp_bias
        return config

    @property
    def max_model_len(self) -> int:
        """Positions the model supports, its rope scaling counted in (vLLM's rule)."""
        positions, params = self.max_position_embeddings, self.rope.params
        if self.rope.rope_type in ("linear", "dynamic"):
            return int(positions * params["factor"])
        if self.rope.rope_type == "yarn" and params["factor"] is not None:
            return int(params["original_max_position_embeddings"] * params["factor"])
        return positions

    @property
    def q_size(self) -> int:
        """Width of all query heads, Hq * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads, Hkv * D."""
        return self.num_kv_heads * self.head_dim

    def num_parameters(self) -> dict[str, int]:
        """Parameters by part; `lm_head` is 0 where it shares the embedding's weights."""
        hidden, inner, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        attention = hidden * (q + 2 * kv) + q * hidden
        attention += self.qkv_bias * (q + 2 * kv) + self.o_bias * hidden
        mlp = 3 * hidden * inner + self.mlp_bias * (2 * inner + hidden)
        norms = 2 * hidden + self.qk_norm * 2 * self.head_dim
        embed = self.vocab_size * hidden
        return {
            "embed": embed,
            "attention": self.num_layers * attention,
            "mlp": self.num_layers * mlp,
            "norms": self.num_layers * norms + hidden,
            "lm_head": 0 if self.tie_word_embeddings else embed,
        }

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes one token takes in the KV cache, all layers together."""
        return 2 * self.num_layers * self.kv_size * dtype_bytes

    def flops(self, num_tokens: int, context_len: int, logits: int) -> int:
        """Floating point operations of one forward pass, two per multiply-add.

        `num_tokens` new tokens, the last of which sees `context_len` tokens, itself included, and
        each earlier one a token less (causal); `logits` rows go through the lm_head. Matrix
        products only: norms, rotation, softmax and activations are left out (below 1 %). An
        implementation that computes pairs only to mask them does more than this.
        """
        pairs = num_tokens * context_len - num_tokens * (num_tokens - 1) // 2
        return self.batch_flops(num_tokens, pairs, logits)

    def batch_flops(self, num_tokens: int, pairs: int, logits: int) -> int:
        """As `flops`, for any batch: `pairs` of a query and a key it sees, over all sequences."""
        hidden, inner = self.hidden_size, self.intermediate_size
        weights = hidden * 2 * (self.q_size + self.kv_size) + 3 * hidden * inner
        attention = 2 * self.q_size * pairs  # q·k and p·v
        per_layer = num_tokens * weights + attention
        return 2 * (self.num_layers * per_layer + logits * hidden * self.vocab_size)


def _missing(field_name: str) -> ValueError:
    return ValueError(
        f"config.json: the field {field_name!r} is missing; take the config.json that came with "
        "the weights"
    )


def _architecture(config: Mapping[str, Any]) -> str:
    """The architecture by name, or by model_type where a config.json gives only that."""
    if config.get("architectures"):
        return config["architectures"][0]
    model_type = config.get("model_type")
    if model_type is None:
        raise _missing("architectures")
    by_model_type = {theirs: name for name, theirs in MODEL_TYPES.items()}
    return by_model_type.get(model_type, model_type)


def _sizes(config: Mapping[str, Any], architecture: str) -> dict[str, int]:
    """The sizes by our names, with what may be left out filled in as transformers fills it."""
    sizes = {ours: config.get(theirs) for ours, theirs in _SIZE_FIELDS.items()}
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if sizes["head_dim"] is None and architecture == QWEN3:
        sizes["head_dim"] = _QWEN3_HEAD_DIM
    for name, size in sizes.items():
        if size is None and name != "head_dim":
            raise _missing(_SIZE_FIELDS[name])
    if sizes["head_dim"] is None:
        hidden, heads = sizes["hidden_size"], sizes["num_heads"]
        if hidden % heads:
            raise ValueError(
                f"config.json: without head_dim, hidden_size ({hidden}) must be a multiple of "
                f"num_attention_heads ({heads})"
            )
        sizes["head_dim"] = hidden // heads
    return sizes


def _refuse_what_is_left_out(config: Mapping[str, Any]) -> None:
    """Raise for what changes the model's mathematics and is not implemented here."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        # Layers from max_window_layers on look through the window.
        windowed |= config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)
    if windowed:
        raise ValueError(
            "config.json: sliding window attention (use_sliding_window) is not supported; every "
            "layer here attends to the whole context"
        )


def _dtype_name(config: Mapping[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (older); float32 where neither is given."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(name).removeprefix("torch.")


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """Every end token any source names, in order, each once."""
    ids: dict[int, None] = {}
    for source in sources:
        eos = source.get("eos_token_id")
        for token_id in eos if isinstance(eos, list) else [eos]:
            if token_id is not None:
                ids[token_id] = None
    return tuple(ids)
