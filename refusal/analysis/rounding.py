"""The grid that a tensor's values lie on, of a float's dtype or of blocks: what rounding to it can have changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127  # of absmax quantization to 8 bits: llama.cpp's Q8_0 (blocks of 32), bitsandbytes' LLM.int8 (rows)
BLOCKS = (32, 64, 128)
# Of llama.cpp's Q4_0 and Q5_0, whose blocks of 32 have a level less on the side where the largest is not; and their bits.
BITS = {LEVELS: 8, 16: 5, 8: 4}


def wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which sums over values of `dtype` round far below one step of these."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


@dataclass(frozen=True)
class Grid:
    """Values of `dtype`, or whole multiples of a `block`-th of the last axis's largest size by `levels`."""

    dtype: torch.dtype
    block: int | None = None
    levels: int = LEVELS

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") if self.block is None else f"{BITS[self.levels]}-bit blocks of {self.block}"

    def step(self, w: Tensor) -> Tensor:
        """The distance between neighbours on the grid at each value of w, in the `wide` dtype; of a block grid, w's own."""
        if self.block is not None:
            size = w.to(wide(w.dtype)).unflatten(-1, (-1, self.block)).abs().amax(-1, keepdim=True)
            return (size / self.levels).expand(*size.shape[:-1], self.block).flatten(-2)
        info = torch.finfo(self.dtype)
        size = w.to(wide(w.dtype)).abs().clamp(min=info.smallest_normal)
        bits, exponent = (torch.int32, 0x7F800000) if size.dtype == torch.float32 else (torch.int64, 0x7FF0000000000000)
        return (size.view(bits) & exponent).view(size.dtype) * info.eps  # the power of 2 below, without the mantissa

    def error(self, w: Tensor) -> Tensor:
        """The most that rounding to w's values can have changed each: half a step and, of a block, whose scale may be kept in
        float16, what rounding that and each product to w's dtype adds."""
        if self.block is None:
            return self.step(w) / 2
        step = self.step(w)
        least = 0.5 + self.levels * 2.0**-11
        # What lay beyond the last level but one was cut to it, where the other side has one more.
        cut = (self.levels < LEVELS) & (w.to(step.dtype).abs() > step * (self.levels - 1.5))
        return step * torch.where(cut, least + 0.5, least) + Grid(w.dtype).step(w) / 2

    def holds(self, w: Tensor) -> bool:
        """Whether all values of w lie on it, to the rounding of w's dtype."""
        if self.block is None:
            return bool((w.to(self.dtype).to(w.dtype) == w).all())
        if w.ndim < 2 or self.block < BLOCKS[0] or w.shape[-1] % self.block:
            return False
        levels = w.to(wide(w.dtype)) / self.step(w).clamp(min=torch.finfo(w.dtype).tiny)
        slack = levels.abs() * 2 * torch.finfo(w.dtype).eps  # value and scale were both rounded: it tells of small levels alone
        return bool(((levels - levels.round()).abs() <= slack).all())


def grid_of(w: Tensor) -> Grid:
    """The coarsest known grid that holds w: at the finest its dtype's."""
    finest = torch.finfo(w.dtype).eps
    candidates = [Grid(w.dtype, BLOCKS[0], levels) for levels in (8, 16)]
    candidates += [Grid(w.dtype, block) for block in dict.fromkeys((*BLOCKS, w.shape[-1]))]
    candidates += [Grid(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32) if torch.finfo(dtype).eps > finest]
    # A few rows tell of nearly all that they are on no such grid.
    return next((grid for grid in candidates if grid.holds(w[:64]) and grid.holds(w)), Grid(w.dtype))
