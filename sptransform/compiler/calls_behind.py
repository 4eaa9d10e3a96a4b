"""Torch functions on what a parallelized model returns: each is a small graph, rewritten as the model's is.

The first call of a function with tensors of these shapes captures it, places shards on its graph and lowers that;
later calls run what was found. Plain tensors among the arguments are those that every rank has. What cannot be
captured, since its result depends on what the tensors hold, runs on whole tensors.
"""

from __future__ import annotations

import logging
import operator
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from sptransform.compiler.dtensor_boundary import of_local_parts, with_dtensors
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.compiler.sharded_output import another, as_dtensor, sharded_output
from sptransform.diagnostics.errors import UnsupportedOpError, UsageError, describe
from sptransform.diagnostics.provenance import source_line
from sptransform.engine.strategy import Divide, Stage, Strategy
from sptransform.ops.communication.collectives import all_reduce
from sptransform.parameters.parts import full_tensor
from sptransform.parameters.shared import as_dtensors, is_in_place, summed
from sptransform.rules.decision import Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.mesh import Mesh

log = logging.getLogger(__name__)

_KEPT = 1024  # graphs of one model; lengths that come and go would fill the memory
_VALUES = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)
_TENSOR = object()  # where a tensor was among arguments or results


@dataclass(frozen=True)
class Behind(Strategy):
    """Cuts what its inputs cut, on the mesh dims of the model that returned them."""

    meshes: tuple[Mesh, ...]
    max_mesh_dims: ClassVar[int] = 2
    shards_weights: ClassVar[bool] = True  # classes may be cut, so a cross-entropy is split

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[Stage]:
        return [Stage(self, own) for own in self.meshes]

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        role = next(role for role in ("batch", "heads", "queries") if role in rule.roles)
        return Sharded(rule.roles[role], divide(rule.roles[role]))


class CallsBehind:
    """The torch functions that are called on what one compiled model returns, or on its parameters.

    Args:
        options: of the model; its rules and ``strict`` hold here too.
        mesh: the ranks that share it.
        meshes: those of each mesh dim.
        of_parameters: the functions are called on parameters alone.

    Raises:
        UsageError: from calls: a function writes into a sharded tensor, or with ``grad_sync=False`` reads a parameter.
        UnsupportedOpError: from calls: with ``strict``, a function needs whole tensors.
    """

    def __init__(self, options: Options, mesh: Mesh, meshes: tuple[Mesh, ...], *, of_parameters: bool = False) -> None:
        self._mesh = mesh
        self._options = Options(Behind(meshes), outputs="dtensor", rules=options.rules, strict=options.strict)
        self._known: dict[Any, Callable[..., Any] | None] = {}
        self._in_terms: set[int] = set()  # ids of parameters of which the model leaves gradients as terms of a sum
        self._leaves_terms = not options.grad_sync
        self._of_parameters = of_parameters

    @staticmethod
    def of_parameters(options: Options, device_mesh: DeviceMesh) -> CallsBehind:
        """Functions of parameters of which the ranks of ``device_mesh`` keep parts."""
        mesh = Mesh.of(device_mesh)
        meshes = (mesh,) if device_mesh.ndim == 1 else mesh.split(*mesh.shape)
        return CallsBehind(options, mesh, meshes, of_parameters=True)

    def behind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The model's compiled graph, whose DTensors are sharded outputs."""
        run = self.own(compiled)
        return self._noting(run) if self._leaves_terms else run

    def _noting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            self._in_terms = {id(x) for x in args if isinstance(x, nn.Parameter) and x.requires_grad}
            return run(*args)

        return noting

    def own(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, whose DTensors are sharded outputs."""
        return lambda *args: tuple(sharded_output(x, self) for x in compiled(*args))

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        _check_not_written(func, kwargs)
        leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
        leaves = [_of_numbers(x) if isinstance(x, slice) else x for x in leaves]
        with as_dtensors(leaves):
            return self._run(func, leaves, structure)

    def _run(self, func: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec) -> Any:
        tensors = [_readable(x) for x in leaves if isinstance(x, Tensor)]
        if self._of_parameters:
            tensors = [_cut(x) for x in tensors]
        if torch.is_grad_enabled() and not self._in_terms.isdisjoint(map(id, tensors)):
            raise _complete(func)
        call = _Call(func, [_TENSOR if isinstance(x, Tensor) else x for x in leaves], structure)
        key = (call.key, *map(_described, tensors), *_surroundings(tensors[0]))
        if not _is_hashable(key):  # an array of numpy
            found = self._compiled(call, tensors)
        elif key in self._known:
            found = self._known[key]
        else:
            while len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            found = self._known[key] = self._compiled(call, tensors)
        if found is None:
            return call.of([full_tensor(x) if isinstance(x, DTensor) else x for x in tensors])
        return found(*tensors)

    def _compiled(self, call: _Call, tensors: list[Tensor]) -> Callable[..., Any] | None:
        """What this rank runs for ``call``; None: the function, on whole tensors."""
        graph = fx.Graph()
        inputs = [graph.placeholder(f"input_{index}") for index in range(len(tensors))]
        read = [
            graph.call_function(full_tensor, (node,)) if isinstance(x, DTensor) else node
            for node, x in zip(inputs, tensors, strict=True)
        ]
        node = graph.call_function(call.flat, tuple(read))
        # without the frames of this package, which are the last
        node.meta["stack_trace"] = "".join(traceback.format_list(traceback.extract_stack()[:-4]))
        graph.output(node)
        gm = fx.GraphModule(nn.Module(), graph)
        failed: Exception | None = None
        try:
            rewritten, context = rewrite_graph(gm, tensors, self._options, self._mesh, full_model=False)
        except _NoTensors:
            return lambda *tensors: call.result([])
        except Exception as error:  # whatever it is, one device shows whether the call itself is wrong
            failed = error
        if not self._on_all_ranks(failed is None, tensors[0].device):
            self._tell_whole(call, node, tensors, failed)
            return None
        local = of_local_parts(rewritten.forward, tensors)  # hooks of all modules are not for it
        run = self.own(with_dtensors(lambda *args: tuple(map(Tensor.contiguous, local(*args))), context))
        result = call.result
        return lambda *tensors: result(run(*tensors))

    def _on_all_ranks(self, found: bool, device: torch.device) -> bool:
        """Whether all ranks found a graph: one that has no part of a short sequence, say, may not."""
        mine = torch.tensor(int(found), dtype=torch.int32, device=device)
        return bool(all_reduce(mine, self._mesh.group, "min"))

    def _tell_whole(self, call: _Call, node: fx.Node, tensors: list[Tensor], error: Exception | None) -> None:
        num_bytes = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, DTensor))
        what = f"{call.name} needs whole tensors of what the model returns in parts"
        if self._options.strict:
            why = "another rank has no graph of it" if error is None else str(error).splitlines()[0]
            found = f"{num_bytes} bytes to gather, and strict=True; {why}"
            fix = "parallelize(..., outputs='full'), or x.full_tensor() there"
            raise UnsupportedOpError(describe(what, source=source_line(node), found=found, fix=fix)) from error
        log.warning("%s: %d bytes are gathered at %s; see outputs=", what, num_bytes, source_line(node))


class _NoTensors(Exception):
    """A function returns no tensor."""


class _Call:
    """A function and its arguments, with tensors left out.

    Attributes:
        key: equal for equal calls.
    """

    def __init__(self, func: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec) -> None:
        self._func, self._leaves, self._structure = func, leaves, structure
        self._returned: tuple[list[Any], pytree.TreeSpec] | None = None
        self.name = getattr(func, "__qualname__", str(func))
        self.key = (func, structure, *map(_hashable, leaves))

    def of(self, tensors: Sequence[Any]) -> Any:
        """The function's result with these tensors among its arguments."""
        args, kwargs = _filled(self._leaves, self._structure, tensors)
        return self._func(*args, **kwargs)

    def flat(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The tensors that the function returns. What else it returns is remembered, see :meth:`result`."""
        leaves, structure = pytree.tree_flatten(self.of(tensors))
        found = tuple(x for x in leaves if isinstance(x, Tensor))
        others = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        if unknown := [x for x in others if x is not _TENSOR and not isinstance(x, _VALUES)]:
            raise TypeError(f"{self.name} returns a {type(unknown[0]).__name__}")
        self._returned = others, structure
        if not found and any(x is None for x in others):
            raise TypeError(f"{self.name} returns None, and may be called for what it does")
        if not found:
            raise _NoTensors
        return found

    def result(self, tensors: Sequence[Any]) -> Any:
        """What the function returned, with these tensors."""
        assert self._returned is not None
        return _filled(*self._returned, tensors)


def _filled(leaves: list[Any], structure: pytree.TreeSpec, tensors: Sequence[Any]) -> Any:
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if x is _TENSOR else x for x in leaves], structure)


def _readable(x: Tensor) -> Tensor:
    """``x``; if it is a DTensor, torch's own, and sums over ranks are taken."""
    if not isinstance(x, DTensor):
        return x
    return summed(as_dtensor(x))


def _cut(x: Tensor) -> Tensor:
    """``x``; a parameter of which ranks keep parts as a tensor that is cut: a graph would gather the parameter."""
    is_cut = isinstance(x, DTensor) and isinstance(x, nn.Parameter) and any(each.is_shard() for each in x.placements)
    return another(x) if is_cut else x


def _described(x: Tensor) -> tuple[Any, ...]:
    """All that a graph knows of a tensor."""
    cut = (x.device_mesh, x.placements) if isinstance(x, DTensor) else ()
    is_parameter = isinstance(x, nn.Parameter)
    return (x.dtype, x.shape, x.stride(), x.device, x.requires_grad, is_parameter, *cut)


def _surroundings(x: Tensor) -> tuple[Any, ...]:
    """What else decides how torch computes."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast


def _of_numbers(x: slice) -> slice:
    """``x``, of which the bounds may be tensors, as torch reads it: their values are not seen later."""
    bounds = (operator.index(y) if isinstance(y, Tensor) else y for y in (x.start, x.stop, x.step))
    return slice(*bounds)


def _hashable(x: Any) -> tuple[Any, ...]:
    """Equal for equal arguments of one type: 1 is not True, 0.0 is not -0.0, and nan is nan."""
    if isinstance(x, slice):
        return slice, x.start, x.stop, x.step
    return type(x), repr(x) if isinstance(x, float | complex) else x


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _complete(func: Callable[..., Any]) -> UsageError:
    return UsageError(
        describe(
            "a parameter of the model is read behind the call, and grad_sync=False",
            found=f"{getattr(func, '__qualname__', func)}, which would add a whole gradient to a term of a sum",
            fix="grad_sync=True; or read it inside of the model, or detached",
        )
    )


def _check_not_written(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    if is_in_place(func, kwargs):
        raise UsageError(
            describe(
                "what a parallelized model returns in parts is not written in place",
                found=getattr(func, "__qualname__", str(func)),
                fix="the function that returns a new tensor (x = x / y for x /= y, torch.where for x[i] = y); or "
                "parallelize(..., outputs='full')",
            )
        )
