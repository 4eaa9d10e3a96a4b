"""What `sptransform calibrate` measures, in the processes of the ranks.

All ranks compute at once, for as long as each other: ranks that share cores, caches or memory then measure their share.
A time is that of a whole window over the number of calls in it, for an operating system gives each rank its share in
slices longer than a call. Of several windows the fastest counts, for what else the machine does only adds to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

# Private: the collectives that a rewritten graph calls
_c10d = torch.ops._c10d_functional

WINDOWS, WINDOW = 5, 0.15  # their number, and seconds of one
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHORT, LONG = 256, 1024  # queries and keys of attention
HEADS = 4
MESSAGES = (1 << 10, 1 << 22)  # bytes that a rank sends
REPEATS = (20, 4)  # of messages of either size in a window

Found = dict[str, float]


def _device(rank: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")


def _seconds(call: Callable[[], Any], window: float = WINDOW) -> float:
    """Of one call, while all ranks make such calls."""
    call()
    return min(_of_window(call, window) for _ in range(WINDOWS))


def _of_window(call: Callable[[], Any], window: float) -> float:
    _finished()
    dist.barrier()
    number, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < window:
        for _ in range(max(number // 4, 1)):
            call()
            number += 1
        _finished()
    return taken / number


def _finished() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmuls(rank: int, world_size: int) -> Found:
    """FLOP/s of a product, by the name of its dtype."""
    size = 4096 if torch.cuda.is_available() else 512
    found = {}
    for dtype in DTYPES:
        x = torch.randn(size, size, device=_device(rank)).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / _seconds(lambda x=x: x @ x)
    return found


def memory(rank: int, world_size: int) -> Found:
    """Bytes a second of a copy, and of pointwise ops that make their results; and the seconds of an op of one entry."""
    size = 1 << (28 if torch.cuda.is_available() else 21)
    x, y = (torch.randn(size, device=_device(rank)) for _ in range(2))
    moved = size * x.element_size()
    one = x[:1]
    pointwise = _seconds(lambda: x + y) + _seconds(lambda: x * y) + _seconds(lambda: silu(x))
    return {
        "copy": 2 * moved / _seconds(lambda: x.copy_(y)),
        "pointwise": (3 + 3 + 2) * moved / pointwise,
        "launch": _seconds(lambda: one + one, WINDOW / 4),
    }


def attention(rank: int, world_size: int) -> Found:
    """Seconds of attention and of its gradient: short and long, of a wider head, and causal."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    heads = HEADS * (32 if torch.cuda.is_available() else 1)
    found = {}
    for name, length, dim, causal in ATTENTIONS:
        q, k, v = (torch.randn(1, heads, length, dim, device=_device(rank), dtype=dtype) for _ in range(3))
        for x in (q, k, v):
            x.requires_grad_()
        out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        gradient = torch.randn_like(out)

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> None:
            with torch.no_grad():
                scaled_dot_product_attention(q, k, v, is_causal=causal)

        def backward(out: Tensor = out, inputs: tuple[Tensor, ...] = (q, k, v), gradient: Tensor = gradient) -> None:
            torch.autograd.grad(out, inputs, gradient, retain_graph=True)

        found[f"forward.{name}"] = _seconds(forward) / (heads * length)
        found[f"backward.{name}"] = _seconds(backward) / (heads * length)
    return found


# name, queries and keys, head dim, whether it is causal
ATTENTIONS = (
    ("short", SHORT, 64, False),
    ("long", LONG, 64, False),
    ("wide", LONG, 128, False),
    ("causal", LONG, 64, True),
)


def messages(rank: int, world_size: int) -> Found:
    """Seconds of one message of each kind, of few and of many bytes sent; and whether kernels run beside it."""
    device, group = _links(rank, world_size)
    found = {}
    for kind, start in KINDS.items():
        for name, size, number in zip(("few", "many"), MESSAGES, REPEATS, strict=True):
            message = torch.zeros(size // 4 // world_size * world_size, device=device)
            found[f"{kind}.{name}"] = _of_messages(lambda m=message, s=start: s(m, rank, world_size, group), number)
    found["overlaps"] = float(_overlaps(rank, world_size, device, group))
    return found


def _links(rank: int, world_size: int) -> tuple[torch.device, str]:
    """Where messages are, and the name of the group: NCCL if each rank has a GPU of its own, else gloo."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= world_size:
        torch.cuda.set_device(_device(rank))
        return _device(rank), dist.new_group(backend="nccl").group_name
    return torch.device("cpu"), dist.group.WORLD.group_name


def _of_messages(send: Callable[[], Tensor], number: int) -> float:
    _c10d.wait_tensor(send())
    taken = []
    for _ in range(WINDOWS):
        _finished()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(number):
            _c10d.wait_tensor(send())
        _finished()
        taken.append((time.perf_counter() - start) / number)
    return min(taken)


def _to_neighbour(x: Tensor, rank: int, world_size: int, group: str) -> Tensor:
    """As rings send: an exchange in which one rank gets everything."""
    sent, received = [0] * world_size, [0] * world_size
    sent[(rank + 1) % world_size] = received[(rank - 1) % world_size] = x.numel()
    return _c10d.all_to_all_single(x, received, sent, group)


def _to_all(x: Tensor, rank: int, world_size: int, group: str) -> Tensor:
    """An exchange in which this rank sends ``x``, in equal parts, to the others."""
    parts = [x.numel() // (world_size - 1)] * world_size
    whole = x.new_zeros(sum(parts))
    return _c10d.all_to_all_single(whole, parts, parts, group)


# Each sends about as many bytes as ``x`` has, as `sptransform.cost.records.Message` counts them.
KINDS: dict[str, Callable[[Tensor, int, int, str], Tensor]] = {
    "send_recv": _to_neighbour,
    "all_to_all": _to_all,
    "all_gather": lambda x, rank, n, group: _c10d.all_gather_into_tensor(
        x[: x.numel() // (n - 1)].contiguous(), n, group
    ),
    "reduce_scatter": lambda x, rank, n, group: _c10d.reduce_scatter_tensor(
        x.new_zeros(x.numel() // (n - 1) * n), "sum", n, group
    ),
    "all_reduce": lambda x, rank, n, group: _c10d.all_reduce(x.new_zeros(x.numel() * n // (2 * (n - 1))), "sum", group),
}


def _overlaps(rank: int, world_size: int, device: torch.device, group: str) -> bool:
    """Whether a product takes less than a third longer beside a message that takes as long."""
    message = torch.zeros(MESSAGES[1] // 4, device=device)
    x = torch.randn(512, 512, device=_device(rank))
    alone = _of_messages(lambda: _to_neighbour(message, rank, world_size, group), REPEATS[1])
    number = max(round(alone / _seconds(lambda: x @ x)), 1)

    def products() -> None:
        for _ in range(number):
            x @ x

    def both() -> Tensor:
        sent = _to_neighbour(message, rank, world_size, group)
        products()
        return sent

    return _of_messages(both, REPEATS[1]) < alone + _seconds(products) / 3
