"""GPTQ: round a weight matrix column by column, and let later columns make up for each error.

    hessian = Hessian(in_features)
    for x in inputs: hessian.add(x)                                # activations [..., in]
    quantized = quantize(weight, hessian.matrix, QuantizeConfig(bits=4, group_size=128))
    quantized.codes, quantized.scales, quantized.zeros, quantized.g_idx

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (ICLR 2023, https://arxiv.org/abs/2210.17323). The error of a layer is
``||W X - Ŵ X||² = tr(E H Eᵀ)`` with ``E = W - Ŵ`` and ``H = X Xᵀ``; its rows are independent of
each other, so all of them are rounded at once, and matrices that share their input may be stacked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .packing import check_bits

_SMALLEST_SCALE = 2.0**-14
"""float16's smallest normal number; below it, scales would lose digits or become zero."""
_DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class QuantizeConfig:
    """How weights are quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale and a zero point; -1: all of them.
        sym: zero point in the middle of the range, instead of one fitted to each group.
        desc_act: round the columns with the largest activations first ("act-order").
        static_groups: fix all scales before the first error is passed on; with `desc_act`, groups
            then stay runs of neighbouring inputs.
        damp_percent: part of the mean diagonal that is added to the diagonal of H.
        block_size: columns after which errors are passed on to all later ones; for speed only.
        true_sequential: within a decoder layer, later projections are calibrated on what earlier
            quantized ones give.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    damp_percent: float = 0.01
    block_size: int = 128
    true_sequential: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive or -1 (one group): {self.group_size}")
        if not 0.0 < self.damp_percent < 1.0:
            raise ValueError(f"damp_percent must lie between 0 and 1, got {self.damp_percent}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def group_size_for(self, in_features: int, name: str = "this layer") -> int:
        """Inputs per group of a layer; ValueError, naming sizes that do, where it is none."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            fitting = [n for n in range(8, in_features) if in_features % n == 0]
            raise ValueError(
                f"group_size {size} does not divide the {in_features} inputs of {name}; sizes that "
                f"do: {', '.join(map(str, fitting))} or -1 (one group for all)"
            )
        return size


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers: ``Ŵ[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]``, g = g_idx[i].

    codes: uint8 ``[out, in]``; zeros: uint8 ``[out, G]``; scales: float32 ``[out, G]``, rounded to
    what float16 holds; g_idx: int32 ``[in]``; damping: the damp_percent that was used in the end.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    damping: float = 0.0

    def dequantize(self) -> Tensor:
        """float32 ``[out, in]``."""
        groups = self.g_idx.long()
        zeros, scales = self.zeros[:, groups].float(), self.scales[:, groups]
        return (self.codes.float() - zeros) * scales

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Outputs from start to stop: one matrix of those that were quantized together."""
        parts = {name: getattr(self, name)[start:stop] for name in ("codes", "zeros", "scales")}
        return replace(self, **parts)


class Hessian:
    """``X Xᵀ / n`` over all inputs a linear layer sees, without keeping them."""

    def __init__(
        self,
        in_features: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str = "the layer",
    ) -> None:
        self.matrix = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.num_inputs = 0
        self.name = name

    def add(self, x: Tensor) -> None:
        """Count activations in; x ``[..., in]`` of any dtype. ValueError for NaN or infinity."""
        x = x.reshape(-1, x.shape[-1]).to(self.matrix)
        if x.shape[1] != len(self.matrix):
            raise ValueError(
                f"inputs of {self.name} have {x.shape[1]} features, not {len(self.matrix)}"
            )
        if not x.isfinite().all():
            raise ValueError(
                f"activations that enter {self.name} contain NaN or infinity; the weights may be "
                "damaged, or the model overflows in this dtype: calibrate in float32 or bfloat16"
            )
        before, self.num_inputs = self.num_inputs, self.num_inputs + len(x)
        if self.num_inputs:  # a running mean: sums would outgrow float32's digits
            self.matrix.mul_(before / self.num_inputs)
            self.matrix.addmm_(x.T, x, alpha=1.0 / self.num_inputs)


def quantize(
    weight: Tensor, hessian: Tensor, config: QuantizeConfig, name: str = "this layer"
) -> QuantizedWeight:
    """Quantize by GPTQ, and never worse than round-to-nearest by the layer's own objective.

    weight: ``[out, in]``; hessian: ``[in, in]``, in whose dtype everything is computed.

    Each row is the best of three. Fitting a group's grid when its turn comes follows the weights
    as errors have changed them; fitting all grids first is often better where bits are few, since
    errors widen the range and so the steps. And GPTQ is greedy, which now and then ends above
    where it began: such rows are rounded to nearest.

    Raises:
        ValueError: shapes that do not fit, NaN, a group size that does not divide the inputs, or
            a Hessian that is not positive definite however much it is damped.
    """
    config.group_size_for(weight.shape[-1], name)
    _check(weight, hessian, name)
    best = gptq(weight, hessian, config, name)
    candidates = []
    if not config.static_groups and len(best.g_idx) > config.group_size != -1:
        candidates.append(gptq(weight, hessian, config, name, fit_first=True))
    # Rows share g_idx, so rows are mixed on GPTQ's groups; the whole is held against the baseline.
    candidates.append(round_to_nearest(weight, config, name, best.g_idx))
    for other in candidates:
        best = _better_rows(weight, hessian, best, other)
    nearest = round_to_nearest(weight, config, name)
    ours, baseline = objective(weight, best, hessian), objective(weight, nearest, hessian)
    return best if ours.sum() <= baseline.sum() else nearest


def _better_rows(
    weight: Tensor, hessian: Tensor, one: QuantizedWeight, other: QuantizedWeight
) -> QuantizedWeight:
    """Each row from the one that has the smaller error; both have the same groups."""
    other_wins = objective(weight, other, hessian) < objective(weight, one, hessian)
    rows = {
        name: torch.where(other_wins[:, None], getattr(other, name), getattr(one, name))
        for name in ("codes", "zeros", "scales")
    }
    return replace(one, **rows)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    config: QuantizeConfig,
    name: str = "this layer",
    *,
    fit_first: bool = False,
) -> QuantizedWeight:
    """Algorithm 1 of the paper; comments with arrows are its lines.

    Columns are rounded one after the other. An error in one is passed on to the columns that are
    still to come, by as much as makes up for it best (equation 2); what H looks like once a column
    is fixed (equation 3) need not be computed, for row j of the Cholesky factor U of the inverse
    has it already. Within a block of B columns errors are passed on at once; those behind it get
    the errors of the whole block in one product (equation 4, section 3.3's "lazy batch-updates").

    fit_first: fit the grids of all groups to the weights as they come, not as errors change them.
    """
    inputs = weight.shape[1]
    group_size = config.group_size_for(inputs, name)
    w, hessian = weight.to(hessian.dtype, copy=True), hessian.clone()
    dead = hessian.diagonal() == 0  # inputs that are always 0: any weight will do
    hessian.diagonal()[dead] = 1.0
    w[:, dead] = 0.0

    order = column_order(hessian, config)
    groups = torch.arange(inputs, device=w.device) // group_size
    fit_first = fit_first or config.static_groups
    if config.static_groups:
        groups = groups[order]  # of each column in the order of work
    if fit_first:
        scales, zeros = fit_groups(w[:, order], groups, config)
    else:  # each group is fitted when its first column comes up
        scales = w.new_zeros(len(w), inputs // group_size)
        zeros = torch.zeros_like(scales)
    w, hessian = w[:, order], hessian[order][:, order]
    factor, damping = inverse_factor(hessian, config.damp_percent, name)  # H⁻¹ ← Cholesky(H⁻¹)ᵀ
    codes = torch.empty_like(w, dtype=torch.uint8)  # Q
    group_of = groups.tolist()

    for start in range(0, inputs, config.block_size):  # for i = 0, B, 2B, …
        stop = min(start + config.block_size, inputs)
        block = w[:, start:stop]  # a view: what is passed on within the block changes w
        errors = torch.zeros_like(block)  # E ← 0
        for column in range(start, stop):  # for j = i, …, i + B - 1
            at, group = column - start, group_of[column]
            if not fit_first and column % group_size == 0:
                # Within the block weights are up to date; what lies beyond it waits for its end.
                end = column + group_size
                beyond = w[:, stop:end] - errors[:, :at] @ factor[start:column, stop:end]
                members = torch.cat([block[:, at : at + group_size], beyond], dim=1)
                scales[:, group], zeros[:, group] = fit(members, config)
            scale, zero = scales[:, group], zeros[:, group]
            code = encode(block[:, at], scale, zero, config)
            codes[:, column] = code  # Q[:, j] ← quant(W[:, j])
            rounded = (code - zero) * scale
            error = (block[:, at] - rounded) / factor[column, column]
            errors[:, at] = error  # E[:, j - i] ← (W[:, j] - Q[:, j]) / [H⁻¹]jj
            # W[:, j : i + B] ← W[:, j : i + B] - E[:, j - i] · H⁻¹[j, j : i + B]
            block[:, at + 1 :] -= error[:, None] * factor[column, column + 1 : stop]
        # W[:, i + B :] ← W[:, i + B :] - E · H⁻¹[i : i + B, i + B :]
        w[:, stop:] -= errors @ factor[start:stop, stop:]

    back = torch.argsort(order)
    _check_scales(scales, name)
    return QuantizedWeight(
        codes=codes[:, back],
        zeros=zeros.to(torch.uint8),
        scales=scales.float(),
        g_idx=groups[back].to(torch.int32),
        damping=damping,
    )


def round_to_nearest(
    weight: Tensor,
    config: QuantizeConfig,
    name: str = "this layer",
    g_idx: Tensor | None = None,
) -> QuantizedWeight:
    """The baseline: every weight to the nearest point of its group's grid, inputs unseen.

    g_idx: the group of each input, by default runs of neighbours; all of equal size.
    """
    inputs = weight.shape[1]
    group_size = config.group_size_for(inputs, name)
    if g_idx is None:
        g_idx = torch.arange(inputs, device=weight.device, dtype=torch.int32) // group_size
    _check_finite(weight, f"the weight of {name}")
    groups, w = g_idx.long(), weight.float()
    scales, zeros = fit_groups(w, groups, config)
    _check_scales(scales, name)
    codes = encode(w, scales[:, groups], zeros[:, groups], config)
    return QuantizedWeight(codes.to(torch.uint8), zeros.to(torch.uint8), scales, g_idx)


def objective(weight: Tensor, quantized: QuantizedWeight | None, hessian: Tensor) -> Tensor:
    """``||w X - ŵ X||² / n`` of each row -> ``[out]``; their sum is what GPTQ makes small.

    Without `quantized` it is ``||w X||² / n``, the square of the outputs themselves.
    """
    error = weight.to(hessian.dtype)
    if quantized is not None:
        error = error - quantized.dequantize().to(hessian.dtype)
    return ((error @ hessian) * error).sum(dim=1)


def fit(members: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[out]`` each for the weights ``[out, n]`` of a group.

    The range always reaches 0. Scales are rounded to float16 at once, as they are stored, so that
    the error of that is passed on with the others.
    """
    low, high = members.amin(dim=1).clamp(max=0.0), members.amax(dim=1).clamp(min=0.0)
    if config.sym:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / config.max_code
    # A group of zeros has no range and may take any scale; 1 is a number that does no harm.
    scale = torch.where(scale > 0, scale.clamp(min=_SMALLEST_SCALE), 1.0).half().to(members.dtype)
    if config.sym:
        return scale, torch.full_like(scale, (config.max_code + 1) // 2)
    return scale, torch.round(-low / scale).clamp(0, config.max_code)


def fit_groups(w: Tensor, groups: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[out, G]`` of w ``[out, in]``; groups ``[in]`` of equal size."""
    count = int(groups.max()) + 1
    members = w[:, torch.argsort(groups, stable=True)].reshape(len(w) * count, -1)
    scales, zeros = fit(members, config)
    return scales.view(len(w), count), zeros.view(len(w), count)


def encode(w: Tensor, scale: Tensor, zero: Tensor, config: QuantizeConfig) -> Tensor:
    """The nearest codes, as whole numbers in w's dtype."""
    return torch.round(w / scale + zero).clamp_(0, config.max_code)


def column_order(hessian: Tensor, config: QuantizeConfig) -> Tensor:
    """In which order columns are rounded, int64 ``[in]``."""
    if not config.desc_act:
        return torch.arange(len(hessian), device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def inverse_factor(hessian: Tensor, damp_percent: float, name: str) -> tuple[Tensor, float]:
    """Upper triangular U with ``Uᵀ U = (H + damping)⁻¹``, and the damp_percent it took.

    The inverse of what is left of H once columns before j are fixed is a product of rows of U:
    its first row is ``U[j, j] * U[j, j:]`` and its first entry ``U[j, j]²``, so equation 2's step,
    error / entry * row, is ``(error / U[j, j]) * U[j, j:]``. Damping makes up for inputs that
    hardly vary, and for float32's digits; it grows where it is not enough. In float64 throughout.
    """
    exact = hessian.double()
    mean = exact.diagonal().mean()
    for step in _DAMPING_STEPS:
        damped = exact.clone()
        damped.diagonal().add_(damp_percent * step * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper.to(hessian.dtype), damp_percent * step
    raise ValueError(
        f"the Hessian of {name} is not positive definite, even with "
        f"{damp_percent * _DAMPING_STEPS[-1]:g} times its mean diagonal added; calibrate with more "
        "or other text, or accumulate in float64"
    )


def _check(weight: Tensor, hessian: Tensor, name: str) -> None:
    if weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"{name}: a weight [out, in] goes with a Hessian [in, in], "
            f"got {list(weight.shape)} and {list(hessian.shape)}"
        )
    _check_finite(weight, f"the weight of {name}")
    _check_finite(hessian, f"the Hessian of {name}")


def _check_finite(tensor: Tensor, what: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{what} contains NaN or infinity")


def _check_scales(scales: Tensor, name: str) -> None:
    if not scales.isfinite().all():
        raise ValueError(f"the weight of {name} is too large: its scales do not fit into float16")
