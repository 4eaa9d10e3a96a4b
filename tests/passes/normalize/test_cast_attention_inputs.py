"""Under autocast, queries, keys and values travel together, in the dtype attention computes in."""

import torch
from torch import Tensor
from torch.nn import functional

import sptransform
from tests.support.graphs import nodes_of, on_ranks

aten = torch.ops.aten


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(1, 2)


class Attention(torch.nn.Module):
    """Queries and keys in float32, as rotary embeddings leave them; values as autocast made them."""

    def __init__(self, repeat: bool = False) -> None:
        super().__init__()
        self.repeat = repeat
        self.query = torch.nn.Linear(16, 16)
        self.key = torch.nn.Linear(16, 8 if repeat else 16)
        self.value = torch.nn.Linear(16, 8 if repeat else 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            query = heads(self.query(x)) * torch.ones((), dtype=torch.float32)
            key, value = self.key(x), self.value(x)
            if self.repeat:
                key = key.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
                value = value.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
            else:
                key, value = heads(key), heads(value)
            key = key.float() if not self.repeat else key
            return functional.scaled_dot_product_attention(query, key, value).float().pow(2).sum()


def test_one_all_to_all_of_bfloat16_brings_all_three() -> None:
    for repeat in (False, True):
        rewritten = sptransform.rewrite(Attention(repeat), "ulysses", (torch.randn(2, 8, 16),), world_size=2)
        moves = nodes_of(rewritten.graph_module, torch.ops.sptransform.all_to_all.default)
        assert [len(move.args[0]) for move in moves] == [3, 1]  # the last brings the output back
        assert {x.dtype for move in moves for x in move.meta["val"]} == {torch.bfloat16}


def test_the_numbers_are_the_same() -> None:
    torch.manual_seed(0)
    for repeat in (False, True):
        x = torch.randn(2, 8, 16, requires_grad=True)
        reference, ranks, _ = on_ranks(Attention(repeat), x, num_ranks=2)
        for run in ranks:
            torch.testing.assert_close(run.outputs, reference.outputs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(run.grads, reference.grads, rtol=2e-2, atol=2e-2)


def test_without_autocast_nothing_is_cast() -> None:
    def model(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(heads(x), heads(x), heads(x))

    _, _, graphs = on_ranks(model, torch.randn(2, 8, 16), num_ranks=2)
    assert not nodes_of(graphs[0], aten.to.dtype)
