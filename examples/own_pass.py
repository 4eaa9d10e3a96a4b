"""Add a pass to the pipeline, see what it changes, and see a wrong pass refused.

    python examples/own_pass.py

The pass writes `log(softmax(x))` as one `log_softmax`, which does not lose small probabilities. It runs before
placements exist, on the graph of one device, so it says nothing of ranks; the passes after it shard what it wrote.
Needs no processes. Exits with status 1 if the pass is not applied, or the wrong one is not refused.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import sptransform
from sptransform.graph.edit import emit_like, succeed
from sptransform.graph.redistribute import is_redistribute

console = Console(highlight=False, soft_wrap=True)
aten = torch.ops.aten


@dataclass(frozen=True)
class JoinLogSoftmax(sptransform.Pass):
    """`log(softmax(x, dim))` -> `log_softmax(x, dim)`."""

    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})
    after = "capture"

    def run(self, graph, context):
        for log in graph.find_nodes(op="call_function", target=aten.log.default):
            softmax = log.args[0]
            if softmax.target == aten.softmax.int and len(softmax.users) == 1:
                succeed(log, emit_like(log, aten.log_softmax.int, *softmax.args))
                graph.erase_node(softmax)


@dataclass(frozen=True)
class ForgetGathers(sptransform.Pass):
    """Wrong on purpose: lets readers of a gathered tensor read the shard."""

    requires = frozenset({"typed"})
    ensures = frozenset({"typed"})
    after = "InsertRedistributes"

    def run(self, graph, context):
        for node in list(graph.nodes):
            if is_redistribute(node):
                for index, output in enumerate(list(node.users)):
                    output.replace_all_uses_with(node.args[0][index])


class Block(nn.Module):
    def __init__(self, hidden=32, heads=4, vocabulary=16):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x, labels):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        log_probabilities = torch.log(torch.softmax(self.head(y), dim=-1))
        return F.nll_loss(log_probabilities.flatten(0, 1), labels.flatten())


def ops_of(rewritten):
    return [str(node.target) for node in rewritten.graph_module.graph.nodes if node.op == "call_function"]


def main():
    torch.manual_seed(0)
    model, inputs = Block(), (torch.randn(2, 16, 32), torch.randint(16, (2, 16)))
    console.print(f"the passes, by phase:\n{sptransform.PIPELINE.with_passes([JoinLogSoftmax()])}\n")

    applied = []
    for passes in ([], [JoinLogSoftmax()]):
        ops = ops_of(sptransform.rewrite(model, "ulysses", inputs, world_size=2, passes=passes))
        applied.append("aten.log_softmax.int" in ops and "aten.log.default" not in ops)
    console.print(f"log_softmax in the rewritten graph: without the pass {applied[0]}, with it {applied[1]}\n")

    try:
        sptransform.rewrite(model, "ulysses", inputs, world_size=2, passes=[ForgetGathers()])
    except sptransform.VerificationError as error:
        console.print(f"a wrong pass is refused:\n{error}", markup=False)
        return 0 if applied == [False, True] else 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
