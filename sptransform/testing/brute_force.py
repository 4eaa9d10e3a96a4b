"""What a sharding rule claims, checked by running the op on every rank's shard and comparing with the whole.

A rule is a set of theorems about one op: *shard this factor and the results are sharded, or pending, so*. For a
:class:`Case`, :func:`check_case` forms every decision the rule allows over 2 and 3 ranks, cuts the operands as the
decision demands, runs the op as the rewritten graph would, puts results and gradients together as their placements
say, and compares with one device. A rank that owns nothing runs like any other. All in one process, on plain tensors.

What the op passes round itself (``ring_factors``) is cut along with the queries, and the ranks run together. An op that
communicates over a mesh dim distributed already is run by all ranks of both dims: where it says "one device", read
one line of ranks of that first dim, each with operands of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sptransform.ops.communication.slicing import assemble, conceal, expose
from sptransform.ops.groups import pretend
from sptransform.ops.local_slice import embed_for, local_slice_for
from sptransform.rules.decision import Pending, RingDecision, Sharded, decision_for
from sptransform.rules.rule import OpCall, Operand, OpRule, map_nodes
from sptransform.rules.table import Local, OpEntry, RuleTable
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.placement import I, P, Placement, R, Shard, local_shape
from sptransform.testing.cuts import decisions, present_factors
from sptransform.testing.lockstep import in_lockstep

# of the mesh dim distributed before, and of the one that rules are tried on
OUTER, GROUP = (mesh.group for mesh in Mesh.pretended(4).split(2, 2))

# of what is drawn here; unlike the seeds that inputs are drawn with
_SEED = 271_828

T = TypeVar("T")
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        target, args, kwargs: the call; tensors among the arguments are its operands.
        factors: the factors that must be shardable, so that a rule which makes everything whole does not pass;
            None for all the rule has.
        same_values: False where the op promises no values (``empty``): only shapes are compared.
        tolerance: absolute and relative.
        outer: number of ranks of ``OUTER``, which the op communicates over.
        constant: names of floating-point operands that have no gradient.
        scaled: whether the absolute tolerance is in units of the largest entry.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    factors: str | None = None
    same_values: bool = True
    tolerance: float = 1e-12
    outer: int = 1
    constant: tuple[str, ...] = ()
    scaled: bool = False

    def __str__(self) -> str:
        def short(x: Any) -> str:
            if isinstance(x, Tensor):
                return "x".join(map(str, x.shape)) if x.dim() else "scalar"
            if isinstance(x, list | tuple):
                return "[" + ",".join(map(short, x)) + "]"
            return str(x)

        named = (f"{name}={short(value)}" for name, value in self.kwargs.items())
        name = str(self.target).removeprefix("aten.")
        return f"{name}({','.join((*map(short, self.args), *named))})"


@dataclass(frozen=True)
class Line:
    """What one rank of ``OUTER`` has: "one device", for the ranks of ``GROUP`` to share."""

    call: OpCall
    operands: Tensors
    results: Tensors
    cotangents: Tensors
    grads: list[Tensor]


def lines_of(case: Case) -> list[Line]:
    operands: list[Tensor] = []

    def operand(x: Any) -> Any:
        if isinstance(x, Tensor):
            operands.append(x)
            return Operand(len(operands) - 1)
        return x

    args, kwargs = map_nodes((case.args, dict(case.kwargs)), operand)
    shapes, dtypes = tuple(tuple(x.shape) for x in operands), tuple(x.dtype for x in operands)
    call = OpCall(case.target, args, kwargs, shapes, (), dtypes)
    generator = torch.Generator().manual_seed(_SEED)
    # integers, such as indices, must stay what the op takes
    others = [[_randn(x, generator) if _has_fractions(x) else x for x in operands] for _ in range(case.outer - 1)]
    leaves = [_leaves(case, call, xs) for xs in (operands, *others)]

    def run(rank: int, number: int) -> Line:
        results = run_call(call, leaves[rank])
        cotangents = tuple(_randn(x, generator) for x in results)
        grads = _gradients(results, leaves[rank], cotangents)
        made = replace(call, result_shapes=tuple(tuple(x.shape) for x in results))
        return Line(made, leaves[rank], results, cotangents, grads)

    return _on_ranks(case.outer, 1, run)


def _on_ranks(outer: int, num_ranks: int, run: Callable[[int, int], T], at_once: bool = False) -> list[T]:
    """``run(rank of OUTER, rank of GROUP)`` on all; rank by rank where they do not communicate."""
    if outer > 1 or at_once:
        return in_lockstep(outer * num_ranks, lambda rank: run(*divmod(rank, num_ranks)), inner=num_ranks)
    found = []
    for rank in range(num_ranks):
        with pretend(GROUP, rank):
            found.append(run(0, rank))
    return found


def _has_fractions(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal entries, in the dtype of ``like`` if that has fractions."""
    wide = torch.complex128 if like.is_complex() else torch.float64
    entries = torch.randn(like.shape, dtype=wide, generator=generator)
    return entries.to(like.device, like.dtype if _has_fractions(like) else wide)


def _leaves(case: Case, call: OpCall, xs: Sequence[Tensor]) -> Tensors:
    """Copies of the operands that gradients arrive at, where the op has one."""
    named = [call.argument(name) for name in case.constant]
    constant = {x.index for x in pytree.tree_leaves(named) if isinstance(x, Operand)}
    copies = (x.detach().clone() for x in xs)
    return tuple(x.requires_grad_(_has_fractions(x) and i not in constant) for i, x in enumerate(copies))


@dataclass(frozen=True)
class _Held:
    """A tensor as ``localize`` functions see it: in the compiler it would be a node, which has no shape."""

    tensor: Any


def _released(x: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.tensor if isinstance(leaf, _Held) else leaf, x)


def _emit_held(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Held:
    """What ``Local.emit`` does in a graph, done at once."""
    return _Held(target(*_released(args), **_released(kwargs)))


def run_call(call: OpCall, operands: Tensors) -> Tensors:
    args, kwargs = map_nodes(
        (call.args, dict(call.kwargs)), lambda x: operands[x.index] if isinstance(x, Operand) else x
    )
    return _as_tuple(call.target(*args, **kwargs))


def _as_tuple(results: Any) -> Tensors:
    """The tensors among an op's results."""
    found = tuple(x for x in pytree.tree_leaves(results) if isinstance(x, Tensor))
    assert found, f"the op returns no tensor but {results!r}"
    return found


def check_case(case: Case, rules: RuleTable) -> list[str]:
    """Check the rule of the case's op, its decisions and its linearity; returns the factors that were cut.

    Raises:
        AssertionError: they do not hold.
    """
    lines = lines_of(case)
    call = lines[0].call
    rule = rules.rule_of(call)
    assert rule is not None, f"no rule for {case}"
    entry = rules[call.target]
    present = present_factors(rule)
    shardable = [f for f in present if f not in rule.replicated]
    wanted = shardable if case.factors is None else case.factors.split()
    assert sorted(wanted) == sorted(shardable), f"{case}: can shard {shardable}, expected {wanted}"
    for factor in [*shardable, *sorted(rule.self_reduced & set(present))]:
        for num_ranks in (2, 3):
            for decision in decisions(rule, factor, num_ranks):
                if decision.is_allowed(rule):
                    _check_decision(case, entry, rule, decision, lines)
    for linear in rule.linear:
        if all(lines[0].operands[i].dtype != torch.bool for i in linear):  # they are never pending
            _check_linear(case, linear, lines)
    return shardable


def _gradients(results: Tensors, operands: Tensors, cotangents: Tensors) -> list[Tensor]:
    """Gradient of every operand; zeros where none arrives."""
    differentiable = [(y, g) for y, g in zip(results, cotangents, strict=True) if y.requires_grad]
    inputs = [x for x in operands if x.requires_grad]
    if not differentiable or not inputs:
        return [torch.zeros_like(x) for x in operands]
    ys, gs = zip(*differentiable, strict=True)
    grads = iter(torch.autograd.grad(ys, inputs, gs, allow_unused=True))
    found = [next(grads) if x.requires_grad else None for x in operands]
    return [torch.zeros_like(x) if g is None else g for x, g in zip(operands, found, strict=True)]


def _check_decision(
    case: Case, entry: OpEntry, rule: OpRule, decision: Sharded | RingDecision, lines: list[Line]
) -> None:
    what = f"{case}, {_spelled(decision)}"
    call, results = lines[0].call, lines[0].results
    # an operand that is not read may be placed anyhow; whole is one way
    asked = tuple(placement or R for placement in decision.demands(rule, len(lines[0].operands)))
    given = decision.outcomes(rule, len(results))
    if isinstance(decision, Sharded):
        for placement, dims in zip(given, rule.results, strict=True):
            _check_decision_for(rule, decision, placement, dims, what)
    num_ranks = decision.partition.num_ranks

    def run(outer: int, rank: int) -> tuple[Tensors, list[Tensor]]:
        line = lines[outer]
        read = [_other(x) if i in rule.unread else x for i, x in enumerate(line.operands)]
        parts = _leaves(case, call, [_part(x, p, rank) for x, p in zip(read, asked, strict=True)])
        shapes = tuple(local_shape(p, tuple(x.shape), rank) for x, p in zip(results, given, strict=True))
        part_shapes = tuple(tuple(x.shape) for x in parts)
        dtypes = tuple(x.dtype for x in results)
        local = Local(_emit_held, tuple(map(_Held, parts)), part_shapes, shapes, dtypes, rule, decision, rank, GROUP)
        try:
            found = local.run(call) if entry.localize is None else entry.localize(call, local)
            got = _as_tuple(_released(found))
        except Exception as error:
            given_shapes = ", ".join(map(str, part_shapes))
            hint = "; does an argument hold a size, so that the op needs a form for shards (OpEntry)?"
            raise AssertionError(
                f"{what}: rank {rank} fails on operands of shape {given_shapes}: {type(error).__name__}: {error}"
                + ("" if entry.localize else hint)
                + (" This rank has nothing." if any(0 in shape for shape in part_shapes) else "")
            ) from error
        assert tuple(tuple(y.shape) for y in got) == shapes, (
            f"{what}: rank {rank} has {[tuple(y.shape) for y in got]}, its placements say {shapes}"
        )
        assert [y.dtype for y in got] == [y.dtype for y in results], f"{what}: dtype differs"
        cotangents = tuple(_summand(g, p, rank) for g, p in zip(line.cotangents, given, strict=True))
        return tuple(y.detach() for y in got), _gradients(got, parts, cotangents)

    found = _on_ranks(case.outer, num_ranks, run, at_once=decision.communicates(rule))
    for outer, line in enumerate(lines):
        own = found[outer * num_ranks : (outer + 1) * num_ranks]
        if case.same_values:
            for index, (y, placement) in enumerate(zip(line.results, given, strict=True)):
                parts = [ys[index] for ys, _ in own]
                if placement == I:
                    for rank, part in enumerate(parts):
                        _assert_close(case, part, y, f"{what}: result {index} of rank {rank}")
                elif not isinstance(placement, Shard):
                    is_sum = placement == P and y.dtype == torch.bool
                    assert not is_sum, f"{what}: result {index} is no sum: it is boolean"
                    _assert_close(case, together(parts, placement), y, f"{what}: result {index}")
                else:
                    for rank, part in enumerate(parts):
                        _assert_close(case, part, _part(y, placement, rank), f"{what}: result {index} of rank {rank}")
        for index, (g, placement) in enumerate(zip(line.grads, asked, strict=True)):
            # of S every rank holds the gradient of its part; of R a pending sum
            whole = together([grads[index] for _, grads in own], placement)
            _assert_close(case, whole, g, f"{what}: gradient of operand {index}")


def _spelled(decision: Sharded | RingDecision) -> str:
    if isinstance(decision, RingDecision):
        return f"{decision.factor} cut {decision.partition}, {decision.ring_factor} circling {decision.key_partition}"
    return f"{decision.factor} cut {decision.outer}*{decision.partition}"


def _check_decision_for(
    rule: OpRule, decision: Sharded, placement: Placement, dims: tuple[tuple[str, ...], ...], what: str
) -> None:
    """The way back: asked for the placement a decision gives, the rule finds a decision that gives it."""
    resized = any(name == decision.factor for _, _, name in rule.resize)
    if not isinstance(placement, Shard) or resized or decision.factor in rule.replicated:
        return
    found = decision_for(rule, dims, placement)
    assert found is not None, f"{what}: no decision gives {placement.spec}"
    assert found.outcomes(rule, len(rule.results))[rule.results.index(dims)] == placement, what


def _check_linear(case: Case, linear: frozenset[int], lines: list[Line]) -> None:
    """A pending sum through ``linear`` operands: summands in, summands out; their gradients are the whole one."""
    what = f"{case}, linear in {sorted(linear)}"
    num_ranks = 3
    call = lines[0].call
    generator = torch.Generator().manual_seed(_SEED)
    asked = Pending(linear).demands(None, len(call.operand_shapes))

    def spread(x: Tensor, placement: Placement | None) -> list[Tensor]:
        return _summands(x, num_ranks, generator) if placement == P else [x] * num_ranks

    summands = [list(map(spread, line.operands, asked)) for line in lines]

    def run(outer: int, rank: int) -> tuple[Tensors, list[Tensor]]:
        parts = _leaves(case, call, [x[rank] for x in summands[outer]])
        got = run_call(call, parts)
        return tuple(y.detach() for y in got), _gradients(got, parts, lines[outer].cotangents)

    found = _on_ranks(case.outer, num_ranks, run)
    for outer, line in enumerate(lines):
        own = found[outer * num_ranks : (outer + 1) * num_ranks]
        for index, y in enumerate(line.results):
            _assert_close(case, sum(ys[index] for ys, _ in own), y, f"{what}: result {index}")
        for index, (g, placement) in enumerate(zip(line.grads, asked, strict=True)):
            grads = [found[index] for _, found in own]
            if placement == P:
                for grad in grads:
                    _assert_close(case, grad, g, f"{what}: gradient of operand {index}")
            else:
                _assert_close(case, sum(grads), g, f"{what}: gradient of operand {index}")


def _summands(x: Tensor, num: int, generator: torch.Generator) -> list[Tensor]:
    """Random tensors whose sum is ``x``."""
    x = x.detach()
    others = [_randn(x, generator) for _ in range(num - 1)]
    if not _has_fractions(x):
        others = [(4 * other).to(x.dtype) for other in others]
    return [*others, x - sum(others)]


def _other(x: Tensor) -> Tensor:
    """Other entries: of an operand that is not read they must not matter."""
    return ~x if x.dtype == torch.bool else torch.full_like(x, float("nan") if _has_fractions(x) else 7)


def _part(x: Tensor, placement: Placement, rank: int) -> Tensor:
    return local_slice_for(x.detach(), placement, rank) if isinstance(placement, Shard) else x.detach()


def _summand(g: Tensor, placement: Placement, rank: int) -> Tensor:
    """What reaches a rank's part of a gradient; of indices that ranks share a summand, here all of it on the first."""
    if isinstance(placement, Shard) and not placement.partition.is_exact:
        first = replace(placement, partition=placement.partition.first_owners())
        g = embed_for(_part(g, first, rank), first, rank)
    return _part(g, placement, rank)


def together(parts: list[Tensor], placement: Placement) -> Tensor:
    """The whole from every rank's tensor: parts of S put in place, anything else summed."""
    if isinstance(placement, Shard):
        exposed = [expose(part, placement) for part in parts]
        return conceal(assemble([x for x, _ in exposed], exposed[0][1], placement.partition), placement)
    return sum(parts[1:], parts[0])


def _assert_close(case: Case, got: Tensor, expected: Tensor, what: str) -> None:
    largest = float(expected.detach().abs().max()) if case.scaled and expected.numel() else 0.0
    torch.testing.assert_close(
        got.detach(),
        expected.detach(),
        atol=case.tolerance * max(largest, 1.0),
        rtol=case.tolerance,
        equal_nan=True,
        msg=lambda found: f"{what}\n{found}",
    )
