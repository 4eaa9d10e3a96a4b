"""Give an op of your own a sharding rule, check the rule, and train with it on two ranks.

    python examples/own_rule.py

The op is an RMS norm as one `torch.library` op, as a fused kernel would be. Without a rule, sptransform gathers the
sequence, runs the op replicated, and reports it. With one, every rank norms its own tokens.
The script starts its own processes (gloo, CPU), and exits with status 1 if the losses differ from those of one device.
"""

import argparse
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import sptransform

console = Console(highlight=False, soft_wrap=True)
EPS = 1e-6


@torch.library.custom_op("own_rule::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@rms_norm.register_fake
def _(x, weight):
    return torch.empty_like(x)


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    x, weight = ctx.saved_tensors
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    along = (grad * weight * x).mean(-1, keepdim=True)
    grad_weight = (grad * x * scale).flatten(0, -2).sum(0)
    return scale * (grad * weight - x * scale.square() * along), grad_weight


rms_norm.register_autograd(backward, setup_context=save_for_backward)

# Every dimension before the last is independent: its ranks may share it. Of the last, the mean needs all.
RULES = {rms_norm: sptransform.rule("... h, h -> ... h", replicated="h")}


class Block(nn.Module):
    """Attention, a norm, the loss: the model knows nothing of ranks."""

    def __init__(self, hidden=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x, target):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.mse_loss(rms_norm(x + self.out(y), self.norm), target)


def build():
    torch.manual_seed(0)
    return Block().double(), torch.randn(2, 16, 32).double(), torch.randn(2, 16, 32).double()


def losses(model, x, target, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        loss = model(x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def train(rank, world_size, backend, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    model, x, target = build()
    model = sptransform.parallelize(model, "ulysses", backend=backend, rules=RULES, strict=True)
    found = losses(model, x, target)
    if rank == 0:
        torch.save(found, f"{directory}/losses.pt")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2, help="number of ranks (default: %(default)s)")
    parser.add_argument("--backend", default="aot_eager", help="e.g. inductor (default: %(default)s)")
    args = parser.parse_args()

    # 1. Is the rule right? The op runs on shards, and is compared with the whole: values and gradients.
    inputs = torch.randn(4, 6, 5).double(), torch.randn(5).double()
    factors = sptransform.testing.check_rule(rms_norm, RULES[rms_norm], inputs)
    console.print(f"the rule holds: {len(factors)} factors can be sharded")

    # 2. What does it change? explain needs no processes.
    model, x, target = build()
    for name, rules in (("without the rule", {}), ("with it", RULES)):
        page = sptransform.explain(model, "ulysses", (x, target), world_size=args.world_size, rules=rules)
        sent = sum(total.bytes_sent for total in page.totals)
        console.print(f"{name}: {len(page.fallbacks)} fallbacks, {sent:,} bytes sent in a step")

    # 3. Train with it.
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(train, args=(args.world_size, args.backend, directory), nprocs=args.world_size)
        found = torch.load(f"{directory}/losses.pt")
    expected = losses(model, x, target)
    difference = max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))
    passed = difference < 1e-12
    console.print(f"{'ok' if passed else 'FAILED'}: losses differ from one device by {difference:.1e}, relative")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
