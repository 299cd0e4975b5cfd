"""How auto-gptq and gptqmodel store a quantized linear layer: small integers in 32-bit words.

    packed = pack_linear(codes, zeros, scales, g_idx, bits=4)      # codes [out, in], as computed
    packed.qweight                                                 # int32 [in / 8, out], as stored
    packed.dequantize()                                            # float32 [out, in]

What the tensors mean: ``W[o, i] = (q[i, o] - z[g_idx[i], o]) * s[g_idx[i], o]``. Integers form one
little-endian stream of bits down the inputs (qweight) or along the outputs (qzeros): field k takes
the bits from ``k * bits`` on. Fields of 2, 4 and 8 bits never cross a word; of 3 bits, 32 fill
three words exactly and two of them do cross.

Format "gptq" (version 1) stores every zero point less one, "gptq_v2" stores it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

SUPPORTED_BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
FORMATS = (V1, V2)


@dataclass(frozen=True)
class PackedLinear:
    """The tensors of one linear layer as a checkpoint has them; G is the number of groups.

    qweight: int32 ``[in * bits / 32, out]``; qzeros: int32 ``[G, out * bits / 32]``;
    scales: float ``[G, out]``; g_idx: integers ``[in]``, the group of each input; bias: ``[out]``.
    """

    bits: int
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None = None
    checkpoint_format: str = V1

    def __post_init__(self) -> None:
        """Raises ValueError for tensors that do not fit each other or hold senseless values."""
        check_bits(self.bits)
        if self.checkpoint_format not in FORMATS:
            raise ValueError(
                f"checkpoint format {self.checkpoint_format!r} is not one of {', '.join(FORMATS)}"
            )
        for name in ("qweight", "qzeros"):
            dtype = getattr(self, name).dtype
            if dtype != torch.int32:
                raise ValueError(f"{name} holds {dtype}; words of torch.int32 are supported")
        if self.qweight.ndim != 2 or self.scales.ndim != 2:
            raise ValueError(
                f"qweight and scales must have two dimensions, "
                f"got {list(self.qweight.shape)} and {list(self.scales.shape)}"
            )
        (num_words, outputs), groups = self.qweight.shape, self.scales.shape[0]
        inputs = num_words * 32 // self.bits
        self._expect("scales", (groups, outputs))
        self._expect("qzeros", (groups, words(outputs, self.bits, "out_features")))
        self._expect("g_idx", (inputs,))
        if self.bias is not None:
            self._expect("bias", (outputs,))
        if not self.scales.isfinite().all():
            raise ValueError("scales contain NaN or infinity: the checkpoint is damaged")
        if self.bias is not None and not self.bias.isfinite().all():
            raise ValueError("bias contains NaN or infinity: the checkpoint is damaged")
        if inputs and not 0 <= int(self.g_idx.min()) <= int(self.g_idx.max()) < groups:
            raise ValueError(
                f"g_idx names groups {int(self.g_idx.min())} to {int(self.g_idx.max())}, "
                f"but scales have {groups}"
            )

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        found = tuple(getattr(self, name).shape)
        if found != shape:
            raise ValueError(
                f"{name} has shape {list(found)}; {list(shape)} goes with {self.bits} bits, "
                f"qweight {list(self.qweight.shape)} and scales {list(self.scales.shape)}"
            )

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    @property
    def is_ordered(self) -> bool:
        """Whether groups are equal runs of neighbouring inputs, as without act-order."""
        size = max(1, int((self.g_idx == 0).sum()))
        ordered = torch.arange(self.in_features, device=self.g_idx.device) // size
        return torch.equal(self.g_idx.long(), ordered)

    def codes(self) -> Tensor:
        """uint8 ``[in, out]``, q of the formula above."""
        return unpack_rows(self.qweight, self.bits)

    def zeros(self) -> Tensor:
        """uint8 ``[G, out]``, z of the formula above, whatever the format."""
        return unpack_zeros(self.qzeros, self.bits, self.checkpoint_format)

    def as_format(self, checkpoint_format: str) -> PackedLinear:
        """The same weight in the other version of the format."""
        qzeros = pack_zeros(self.zeros(), self.bits, checkpoint_format)
        return replace(self, qzeros=qzeros, checkpoint_format=checkpoint_format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]``; computed in float32 and rounded once."""
        groups = self.g_idx.long()
        zeros, scales = self.zeros().float()[groups], self.scales.float()[groups]
        return (self.codes().float().sub_(zeros).mul_(scales)).T.to(dtype).contiguous()


def pack_linear(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    *,
    bits: int,
    bias: Tensor | None = None,
    checkpoint_format: str = V1,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedLinear:
    """Bring a quantized weight into the stored form.

    codes: integers ``[out, in]``; zeros: integers ``[out, G]``; scales: ``[out, G]``;
    g_idx: ``[in]``. Raises ValueError for values outside of `bits` and sizes that fill no words.
    """
    return PackedLinear(
        bits=bits,
        qweight=pack_rows(codes.T, bits, "in_features"),
        qzeros=pack_zeros(zeros.T, bits, checkpoint_format),
        scales=scales.T.to(scale_dtype).contiguous(),
        g_idx=g_idx.to(torch.int32),
        bias=bias,
        checkpoint_format=checkpoint_format,
    )


def pack_rows(values: Tensor, bits: int, what: str = "the number of rows") -> Tensor:
    """Integers ``[N, M]`` from 0 to 2^bits - 1 -> int32 ``[N * bits / 32, M]``."""
    num_words = words(values.shape[0], bits, what)
    _check_range(values, bits)
    per_period, words_per_period = _period(bits)
    packed = values.new_zeros(
        (num_words // words_per_period, words_per_period, values.shape[1]), dtype=torch.int32
    )
    fields = values.to(torch.int32).reshape(-1, per_period, values.shape[1])
    for index in range(per_period):
        word, shift = divmod(index * bits, 32)
        packed[:, word] |= fields[:, index] << shift  # bits beyond the word fall off its end
        if shift + bits > 32:
            packed[:, word + 1] |= fields[:, index] >> (32 - shift)
    return packed.view(num_words, values.shape[1])


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """int32 ``[N * bits / 32, M]`` -> uint8 ``[N, M]``; the reverse of `pack_rows`."""
    check_bits(bits)
    per_period, words_per_period = _period(bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[0] % words_per_period:
        raise ValueError(
            f"{bits}-bit fields are read from torch.int32 [{words_per_period} * n, M], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    stream = packed.reshape(-1, words_per_period, packed.shape[1])
    values = packed.new_empty((len(stream), per_period, packed.shape[1]), dtype=torch.uint8)
    for index in range(per_period):
        word, shift = divmod(index * bits, 32)
        here = min(bits, 32 - shift)
        field = (stream[:, word] >> shift) & ((1 << here) - 1)  # >> copies the sign: mask it off
        if here < bits:
            field |= (stream[:, word + 1] & ((1 << (bits - here)) - 1)) << here
        values[:, index] = field
    return values.view(-1, packed.shape[1])


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Integers ``[G, out]`` from 0 to 2^bits - 1 -> int32 ``[G, out * bits / 32]``."""
    if checkpoint_format == V1 and bits == 3:
        zeros = _shifted(zeros, bits, -1)
    packed = pack_rows(zeros.T, bits, "out_features").T.contiguous()
    if checkpoint_format == V1 and bits != 3:
        packed -= _ones(bits)
    return packed


def unpack_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """int32 ``[G, out * bits / 32]`` -> uint8 ``[G, out]``; the reverse of `pack_zeros`.

    Version 1 counts a word at a time, as gptqmodel does: a zero point of 0 borrows from the field
    above it, and only an addition to the whole word gives that back. Where no zero point is 0
    (symmetric quantization never has one) this equals adding one to each field. Fields of 3 bits
    are not whole in a word; there each is counted by itself.
    """
    if checkpoint_format == V1 and bits != 3:
        check_bits(bits)
        qzeros = qzeros + _ones(bits)
    zeros = unpack_rows(qzeros.T, bits).T
    if checkpoint_format == V1 and bits == 3:
        zeros = _shifted(zeros, bits, 1)
    return zeros.contiguous()


def check_bits(bits: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(
            f"{bits!r}-bit weights are not supported; "
            f"supported: {', '.join(map(str, SUPPORTED_BITS))}"
        )


def words(count: int, bits: int, what: str) -> int:
    """32-bit words that `count` fields fill; ValueError where the last would be left unfilled."""
    check_bits(bits)
    per_period, words_per_period = _period(bits)
    if count % per_period:
        raise ValueError(
            f"{what} is {count}; {bits}-bit weights are stored {per_period} at a time, "
            f"so it must be a multiple of {per_period}"
        )
    return count // per_period * words_per_period


def _period(bits: int) -> tuple[int, int]:
    """After how many fields, and words, a field starts at a word's start again."""
    length = lcm(bits, 32)
    return length // bits, length // 32


def _ones(bits: int) -> int:
    """A word whose every field is 1."""
    return sum(1 << shift for shift in range(0, 32, bits))


def _shifted(values: Tensor, bits: int, by: int) -> Tensor:
    """values + by within `bits` bits, around the end."""
    return ((values.to(torch.int32) + by) & ((1 << bits) - 1)).to(torch.uint8)


def _check_range(values: Tensor, bits: int) -> None:
    if values.is_floating_point() or values.ndim != 2:
        raise ValueError(f"integers [N, M] can be packed, not {values.dtype} {list(values.shape)}")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 1 << bits:
        raise ValueError(
            f"{bits} bits hold 0 to {(1 << bits) - 1}, "
            f"got {int(values.min())} to {int(values.max())}"
        )
