"""State-space layers in plain torch, as models spell them: a causal convolution, chunks, and decays between chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH, STATE, KERNEL = 2, 4, 3, 4


def segment_sums(x: Tensor) -> Tensor:
    """``[.., n] -> [.., n, n]``: sums over ``j < k <= i``, and -inf above the diagonal; as Mamba-2 has them."""
    size = x.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=x.device)
    steps = x[..., None].expand(*x.shape, size).masked_fill(~torch.tril(ones, -1), 0)
    return torch.cumsum(steps, -2).masked_fill(~torch.tril(ones), -torch.inf)


class StateSpace(nn.Module):
    """One layer of Mamba-2 (Dao and Gu, arXiv 2405.21060, listing 1), in chunks."""

    def __init__(self, width: int, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        inner = HEADS * WIDTH + 2 * HEADS * STATE
        self.into = nn.Linear(width, inner + HEADS, bias=False)
        self.convolution = nn.Conv1d(inner, inner, KERNEL, padding=KERNEL - 1, groups=inner)
        self.out = nn.Linear(HEADS * WIDTH, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        mixed, step = self.into(hidden).split([self.convolution.in_channels, HEADS], -1)
        mixed = F.silu(self.convolution(mixed.transpose(1, 2))[..., :length]).transpose(1, 2)
        values, keys, queries = mixed.split([HEADS * WIDTH, HEADS * STATE, HEADS * STATE], -1)
        padding = -length % self.chunk

        def chunked(x: Tensor, *sizes: int) -> Tensor:
            return F.pad(x, (0, 0, 0, padding)).reshape(batch, -1, self.chunk, *sizes)

        x, b, c = chunked(values, HEADS, WIDTH), chunked(keys, HEADS, STATE), chunked(queries, HEADS, STATE)
        a = -F.softplus(chunked(step, HEADS)).permute(0, 3, 1, 2)
        total = torch.cumsum(a, -1)
        scores = torch.einsum("bclhn,bcshn->bclsh", c, b) * segment_sums(a).exp().permute(0, 2, 3, 4, 1)
        within = torch.einsum("bclsh,bcshp->bclhp", scores, x)
        left = (total[..., -1:] - total).exp().permute(0, 2, 3, 1)[..., None]
        states = torch.einsum("bclhn,bclhp->bchpn", b * left, x)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
        decays = segment_sums(F.pad(total[..., -1], (1, 0))).exp().transpose(1, 3)
        entering = torch.einsum("bzch,bzhpn->bchpn", decays, states)[:, :-1]
        before = torch.einsum("bclhn,bchpn->bclhp", c, entering) * total.exp().permute(0, 2, 3, 1)[..., None]
        return self.out((within + before).reshape(batch, -1, HEADS * WIDTH)[:, :length])


def tree_scan(
    a: Tensor, x: Tensor, moved: Callable[[Tensor], Tensor] = lambda row: row
) -> tuple[Tensor, Tensor]:
    """Products of ``a``, and ``y[i] = a[i] * moved(y[i - 1]) + x[i]``, as torch's associative scan writes it out."""
    size = len(a)
    if size < 2:
        return a, x

    def combined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * moved(left[1]) + right[1]

    odd = tree_scan(*combined((a[:-1:2], x[:-1:2]), (a[1::2], x[1::2])), moved)
    before = odd if size % 2 else tuple(each[:-1] for each in odd)
    even = combined(before, (a[2::2], x[2::2]))
    joined = []
    for first, evens, odds in zip((a, x), even, odd, strict=True):
        evens = torch.cat([first[:1], evens])
        if len(odds) < len(evens):
            odds = F.pad(odds, (0, 0) * (odds.ndim - 1) + (0, 1))
        joined.append(torch.flatten(torch.stack([evens, odds], 1), 0, 1)[:size])
    return joined[0], joined[1]


class SelectiveScan(nn.Module):
    """What Mamba computes: a recurrence of each channel, which starts from a causal convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, KERNEL, padding=KERNEL - 1, groups=width)
        self.step = nn.Linear(width, width)
        self.rates = nn.Parameter(torch.rand(width, STATE))
        self.into = nn.Linear(width, 2 * STATE)

    def forward(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        x = F.silu(self.convolution(hidden.transpose(1, 2))[..., :length]).transpose(1, 2)
        step = F.softplus(self.step(x))[..., None]
        b, c = self.into(x).split(STATE, -1)
        decays, entering = torch.exp(-self.rates.exp() * step), step * b[:, :, None] * x[..., None]
        _, states = tree_scan(decays.movedim(1, 0), entering.movedim(1, 0))
        return torch.einsum("sbdn,bsn->bsd", states, c)


class Attention(nn.Module):
    """Causal attention of two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 3 * width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.into(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)


class Blur(nn.Module):
    """A convolution that reads both neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.convolution(hidden.transpose(1, 2)).transpose(1, 2)


class Shift(nn.Module):
    """Each token sees the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.into(F.pad(hidden, (0, 0, 1, -1)))


class Sums(nn.Module):
    """Each token sees the sum of those before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.into(hidden).tanh().cumsum(1)


class Model(nn.Module):
    """Layers with a residual stream; returns a loss."""

    def __init__(self, layers: str, width: int = 8) -> None:
        super().__init__()
        kinds = {
            "attention": Attention, "blur": Blur, "chunks": partial(StateSpace, chunk=4), "shift": Shift,
            "sums": Sums, "tree": SelectiveScan,
        }  # fmt: skip
        self.layers = nn.ModuleList([kinds[kind](width) for kind in layers.split()])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden.square().mean()


def model_and_input(layers: str, length: int) -> tuple[Model, dict[str, Tensor]]:
    """``layers`` are names of kinds: attention, blur, chunks, shift, sums, tree."""
    torch.manual_seed(0)
    return Model(layers).double(), {"hidden": torch.randn(2, length, 8, dtype=torch.float64)}
