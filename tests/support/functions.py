"""Custom autograd.Functions as libraries and labs write them, in plain PyTorch, each in a small model."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.utils.checkpoint import checkpoint

BATCH, LENGTH, WIDTH, HEADS, VOCAB = 2, 16, 16, 4, 24


class RMSNorm(torch.autograd.Function):
    """As Liger's: rows are flattened, the inverse is saved, the weight's gradient is cast to its dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        shape = x.shape
        rows = x.view(-1, shape[-1])
        inverse = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
        ctx.offset = offset
        ctx.save_for_backward(rows, weight, inverse)
        return (rows * inverse * (offset + weight)).view(*shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        shape = dy.shape
        dy = dy.view(-1, shape[-1])
        normed = rows * inverse
        dm = dy * (ctx.offset + weight)
        dx = inverse * (dm - normed * (dm * normed).sum(-1, keepdim=True) / shape[-1])
        return dx.view(*shape), (dy * normed).sum(0).to(weight.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """As Liger's: the inputs are saved, the activation is computed again, gradients are written in place."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        silu = a * sigmoid
        db = dc * silu
        da = torch.empty_like(a)
        da.copy_(dc * b)
        da.mul_(silu * (1 - sigmoid) + sigmoid)
        return da, db


class Rotary(torch.autograd.Function):
    """Two results; the tables have no gradient, and the backward rotates back."""

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return Rotary._turned(q, cos, sin), Rotary._turned(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return Rotary._turned(dq, cos, -sin), Rotary._turned(dk, cos, -sin), None, None


class CrossEntropy(torch.autograd.Function):
    """As Liger's: the forward computes the gradient too, in place of the logits' copy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        kept = labels != ignored
        count = kept.sum()
        logs = torch.log_softmax(logits, -1)
        target = torch.where(kept, labels, 0)
        losses = -logs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        grad = logs.exp()
        grad.scatter_add_(-1, target.unsqueeze(-1), -torch.ones_like(losses).unsqueeze(-1))
        grad.mul_((kept / count).unsqueeze(-1))
        ctx.save_for_backward(grad)
        return torch.where(kept, losses, 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * dy, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """A head and its loss in chunks of tokens; the forward computes both gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        dx, dw = torch.zeros_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logs = torch.log_softmax(hidden[part] @ weight.t(), -1)
            total = total - logs.gather(1, labels[part].unsqueeze(1)).sum()
            grad = logs.exp() - F.one_hot(labels[part], weight.shape[0])
            dx[part] = grad @ weight
            dw += grad.t() @ hidden[part]
        ctx.save_for_backward(dx, dw)
        ctx.count = hidden.shape[0]
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        dx.mul_(dy / ctx.count)
        return dx, dw * (dy / ctx.count), None, None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class Mixture(torch.autograd.Function):
    """Holds a table of its own, and ones of a size that it reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        table = torch.tensor([0.5, 2.0, -1.0, 3.0] * (x.shape[-1] // 4), dtype=x.dtype)
        ones = torch.ones(x.shape[1], dtype=x.dtype).view(1, -1, 1)
        ctx.save_for_backward(table)
        return x * table + ones

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * dy, None


class Clipped(torch.autograd.Function):
    """A backward that is not linear: neither may it be given a part of a sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 1.5

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.clamp(-0.02, 0.02)


class Affine(torch.autograd.Function):
    """Three results, one without a gradient; a boolean operand, and one of other sizes without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, kept)
        signs = torch.sign(x)
        ctx.mark_non_differentiable(signs)
        return torch.where(kept, x * weight, 0.0) + bias, signs, x.exp()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsigns: Tensor, de: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept = ctx.saved_tensors
        dy = torch.where(kept, dy, 0.0)
        return dy * weight + de * x.exp(), (dy * x).sum((0, 1)), dy.sum((0, 1)), None, None


class ByPosition(torch.autograd.Function):
    """Reads positions: it cannot be cut along the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = torch.arange(x.shape[1]).to(x.dtype).view(1, -1, 1) / x.shape[1]
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class AcrossTokens(torch.autograd.Function):
    """The forward goes row by row, the backward does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 2 + dy.mean(1, keepdim=True)


class Accumulated(torch.autograd.Function):
    """Calls an op that has no rule, and reads its operands in another order than it takes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale, sums = weight.exp(), torch.logcumsumexp(x, -1)
        ctx.save_for_backward(x, scale, sums)
        return sums * scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, sums = ctx.saved_tensors
        later = (dy * scale * (-sums).exp()).flip(-1).cumsum(-1).flip(-1)
        return x.exp() * later, (sums * dy).sum((0, 1)) * scale


class Mixed(torch.autograd.Function):
    """Chooses its dtype by itself."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy @ weight, torch.einsum("bso,bsi->oi", dy, x)


class Model(nn.Module):
    """One layer of attention with projections; ``call(model, x)`` stands between it and the loss."""

    def __init__(self, call: Callable[["Model", Tensor], Tensor], rotates: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call, self.rotates = call, rotates
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.labels = labels
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        if self.rotates:
            angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
            angles = torch.cat((angles, angles), -1)
            q, k = Rotary.apply(q, k, angles.cos(), angles.sin())
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found = self.call(self, x + self.out(attended.transpose(1, 2).flatten(2)))
        return found if found.ndim == 0 else F.cross_entropy(self.head(found).flatten(0, 1), labels.flatten())

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.down(SwiGLU.apply(self.gate(x), self.up(x)))


def _affine(model: Model, x: Tensor) -> Tensor:
    y, signs, e = Affine.apply(x, model.weight, model.bias, x > -0.5, model.head.weight)
    return y + signs * 0.1 + e


def _linear_cross_entropy(model: Model, x: Tensor) -> Tensor:
    return LinearCrossEntropy.apply(x.flatten(0, 1), model.head.weight, model.labels.flatten(), 7)


def _checkpointed(model: Model, x: Tensor) -> Tensor:
    return checkpoint(lambda y: model.mlp(RMSNorm.apply(y, model.weight, 1e-6, 1.0)), x, use_reentrant=False)


# name -> what stands between attention and the loss
CALLS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "across_tokens": lambda model, x: AcrossTokens.apply(x),
    "affine": _affine,
    "by_position": lambda model, x: ByPosition.apply(x),
    "checkpointed": _checkpointed,
    "clipped": lambda model, x: x * Clipped.apply(model.weight),
    "cross_entropy": lambda m, x: CrossEntropy.apply(m.head(x).flatten(0, 1), m.labels.flatten(), 3),
    "linear_cross_entropy": _linear_cross_entropy,
    "mixed": lambda model, x: Mixed.apply(x, model.out.weight),
    "mixture": lambda model, x: Mixture.apply(x),
    "mlp": lambda model, x: model.mlp(x),
    "reversal": lambda model, x: Reversal.apply(x, 0.3),
    "rms_norm": lambda model, x: RMSNorm.apply(x, model.weight, 1e-6, 1.0),
    "accumulated": lambda model, x: Accumulated.apply(x, model.weight),
    "rotary": lambda model, x: x,
    "straight_through": lambda model, x: StraightThrough.apply(x),
}


def model_of(name: str, length: int = LENGTH) -> tuple[Model, dict[str, Tensor]]:
    """The model with this call, and inputs of this length."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, length, WIDTH, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BATCH, length))
    return Model(CALLS[name], rotates=name == "rotary"), {"x": x, "labels": labels}
