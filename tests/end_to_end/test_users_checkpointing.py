"""Activation checkpointing: exact, no all-to-all runs again in the backward, and what torch would recompute is.

Saved tensors and backward ops are those of the graphs AOTAutograd derives, set beside those of the same model compiled
by torch alone.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sptransform
from sptransform.compiler import backend
from sptransform.compiler.dynamo import configured
from sptransform.diagnostics.errors import CaptureError
from tests.support.collective_counts import CountCollectives, num_by_name
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.graphs import captured
from tests.support.models import LAYERS, MODELS, CausalTransformer, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
LINEAR = [aten.addmm.default, aten.mm.default]


# --- models ---------------------------------------------------------------------------------------------------


class Checkpointed(CausalTransformer):
    """Every block recomputed in the backward."""

    options: ClassVar[dict[str, Any]] = {}

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options)
        logits = self.head(self.norm(x))[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def keep_every_second_linear() -> Any:
    """A policy with a memory, as torchtitan's has."""
    num_linears = 0

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal num_linears
        num_linears += op in LINEAR
        is_kept = op is ATTENTION or (op in LINEAR and num_linears % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


CONTEXTS: dict[str, Any] = {
    "all": None,
    "linear": partial(create_selective_checkpoint_contexts, LINEAR),
    "attention": partial(create_selective_checkpoint_contexts, [ATTENTION]),
    "both": partial(create_selective_checkpoint_contexts, [*LINEAR, ATTENTION]),
    "second": keep_every_second_linear,
}


def checkpointed(which: str | None) -> tuple[nn.Module, Inputs]:
    """The hand-written model with this context, or Llama with these arguments of its own; None: no checkpointing."""
    if which == "llama":
        model, inputs = build("llama")
        model.gradient_checkpointing_enable()
        return model, inputs
    if which == "llama-non-reentrant":
        model, inputs = build("llama")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model, inputs
    model, inputs = build("sdpa_transformer")
    if which is not None:
        model.__class__ = Checkpointed
        model.options = {} if CONTEXTS[which] is None else {"context_fn": CONTEXTS[which]}
    return model, inputs


def tolerance(which: str) -> float:
    return MODELS["llama" if which.startswith("llama") else "sdpa_transformer"].tolerance


# --- what AOTAutograd made of them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A result, what ran in the backward graph by op (rearranging left out), and what the forward saved for it."""

    result: Result
    backward: Counter[str]
    saved: Counter[str]
    backward_collectives: dict[str, int]


_REARRANGING = {"_unsafe_view", "cat", "clone", "detach", "expand", "getitem", "permute", "select", "slice"}
_REARRANGING |= {"split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view", "wait_tensor"}


_numbers = itertools.count()  # the same on every rank


def run(rank: int, world_size: int, which: str | None, is_parallel: bool) -> Step:
    """One step through AOTAutograd, parallel or by torch alone; a backend's name is what parallelize takes."""
    graphs: dict[str, fx.GraphModule] = {}

    def keep(direction: str) -> Callable[[fx.GraphModule, list[Any]], fx.GraphModule]:
        return lambda gm, inputs: graphs.setdefault(direction, gm)

    compiler = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    model, inputs = checkpointed(which)
    if is_parallel:
        name = f"keep_graphs_{next(_numbers)}"
        torch._dynamo.register_backend(compiler, name=name)
        sptransform.parallelize(model, "ulysses", backend=name)
    else:
        model.compile(backend=compiler, fullgraph=True)
        model._compiled_call_impl = configured(model._compiled_call_impl)
    loss = model(**inputs)
    loss = loss if isinstance(loss, torch.Tensor) else loss.loss
    with CountCollectives() as counted:
        loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    backward = Counter(filter(None, map(op_name, graphs["backward"].graph.nodes)))
    return Step(Result(loss.detach(), grads), backward, saved(graphs["forward"]), num_by_name(counted.collectives))


def op_name(node: fx.Node) -> str | None:
    """``mm``; of an op that replays the random state, the op's; None for what only rearranges."""
    if node.op != "call_function":
        return None
    target = node.args[1 if len(node.args) > 1 and isinstance(node.args[0], torch.Tensor) else 0]
    target = target if "rng_state" in str(node.target) and callable(target) else node.target
    name = target.__name__.split(".")[0]
    return None if name in _REARRANGING else name


def saved(forward: fx.GraphModule) -> Counter[str]:
    """The ops in checkpointed regions whose results the forward keeps, views of inputs aside."""
    kept = [node for node in forward.graph.output_node().args[0] if isinstance(node, fx.Node)]
    found = set()
    for node in kept:
        while op_name(node) is None and node.op == "call_function" and "recompute" in node.meta:
            node = node.all_input_nodes[0]
        if node.op == "call_function" and "recompute" in node.meta:
            found.add(node)
    return Counter(op_name(node) for node in found)


# --- tests ----------------------------------------------------------------------------------------------------

# The loss is a sum over the ranks' labels divided by their number, and parameter gradients are summed over the ranks.
OF_RANKS = Counter({"all_to_all_single": 2 * LAYERS, "all_reduce": 1, "div": 1})
# Recomputed by torch alone for nothing but an all-to-all, whose result is kept: projections, and their rotation.
ONLY_FOR_EXCHANGES = {
    "all": Counter({"addmm": LAYERS}),
    "attention": Counter({"addmm": LAYERS}),
    "second": Counter({"addmm": LAYERS}),
    "llama": Counter({"mm": 3 * LAYERS, "mul": 4 * LAYERS, "add": 2 * LAYERS, "neg": 2 * LAYERS}),
}
ONLY_FOR_EXCHANGES["llama-non-reentrant"] = ONLY_FOR_EXCHANGES["llama"]
# Kept by torch alone: the mask of queries x keys that Llama makes without a cache, of which is_causal is left.
MASKS = {name: Counter({"where": 1}) for name in ("llama", "llama-non-reentrant")}


@pytest.mark.parametrize(
    "which", tiered(["all", "both", "second", "attention", "llama", "llama-non-reentrant"], quick=["second"])
)
def test_recomputes_what_torch_would_and_communicates_no_more(which: str) -> None:
    (alone,) = get_pool(1).run(run, which, False)
    model, inputs = checkpointed(None if not which.startswith("llama") else which)
    reference = run_one_device(model, inputs)
    for step in get_pool(2).run(run, which, True):
        assert_equal_to_one_device(reference, step.result, tolerance(which))
        assert step.backward_collectives["all_to_all_single"] == 2 * LAYERS
        not_needed = ONLY_FOR_EXCHANGES.get(which, Counter())
        assert step.backward - OF_RANKS == alone.backward - not_needed
        exchanged = Counter({"all_to_all_single": step.saved["all_to_all_single"]})
        assert step.saved - exchanged - Counter({"all_reduce": 1}) == alone.saved - MASKS.get(which, Counter())


def test_contexts_that_say_nothing_are_refused() -> None:
    model, inputs = checkpointed("all")
    model.options = {"context_fn": no_contexts}
    with pytest.raises(CaptureError, match="create_selective_checkpoint_contexts"):
        captured(model, **inputs)


def no_contexts() -> tuple[Any, Any]:
    return nullcontext(), nullcontext()


def cache_keys(rank: int, world_size: int) -> list[str]:
    """What is added to the key of compile caches: plain, checkpointed, selectively, otherwise so, and as before."""
    keys: list[str] = []

    def inner(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        keys.append(torch.compiler.config.cache_key_tag)
        return gm

    with mock.patch.object(backend, "lookup_backend", lambda name: inner):
        for which in (None, "all", "linear", "attention", "linear"):
            torch._dynamo.reset()
            model, inputs = checkpointed(which)
            sptransform.parallelize(model, "ulysses", backend="eager")(**inputs)
    return keys


def test_no_cache_takes_one_kind_of_checkpointing_for_another() -> None:
    """Graphs of two policies may be the same but for what is said to be recomputed, which caches do not see."""
    for plain, everything, linear, attention, again in get_pool(2).run(cache_keys):
        assert len({plain, everything, linear, attention}) == 4
        assert linear == again
