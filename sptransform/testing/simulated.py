"""A trial on simulated ranks: its graph, captured once, on all ranks in lockstep in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from sptransform.compiler.rewrite import while_captured
from sptransform.testing.capturing import copied
from sptransform.testing.equality import Result
from sptransform.testing.outputs import Path, reach, spelled
from sptransform.testing.pretended import Asked, Ranks, Runnable, for_ranks
from sptransform.testing.rounding import NARROW, put_in_double
from sptransform.testing.trial import OneDevice, inputs_of


class WithLoss(nn.Module):
    """The model as one graph with its loss: returns that, then the tensors that are among its outputs."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], paths: Sequence[Path]) -> None:
        super().__init__()
        self.model, self.loss, self.paths = model, loss, tuple(paths)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        outputs = self.model(*args, **kwargs)
        # a copy of each, since a graph does not return a tensor twice, nor one of its inputs
        return self.loss(outputs), *(reach(outputs, path).clone() for path in self.paths)


@dataclass(frozen=True)
class Captured:
    """Dynamo's graph of a trial, while its context is open; the kind and name of each of its inputs that has one."""

    graph_module: fx.GraphModule
    inputs: list[Any]
    names: list[tuple[str, str] | None]
    paths: tuple[Path, ...]

    def in_double(self) -> Captured:
        """The same with whatever has fewer bits replaced by float64."""
        put_in_double(self.graph_module)
        inputs = [_doubled(x) if isinstance(x, Tensor) and x.dtype in NARROW else x for x in self.inputs]
        return replace(self, inputs=inputs)

    def on_one_device(self) -> Runnable:
        return Runnable(self.graph_module, None, self.inputs, self._parameters)

    def on_ranks(self, asked: Asked, options: Mapping[str, Any]) -> Ranks:
        return for_ranks(self.graph_module, self.inputs, self._parameters, asked, None, {**options, "outputs": "full"})

    @property
    def _parameters(self) -> list[str | None]:
        return [found[1] if found is not None and found[0] == "parameter" else None for found in self.names]

    def step(self, graph: Runnable) -> Result:
        """One forward and backward of this graph, or of a rank's, on copies of its inputs."""
        arguments = copied(graph.inputs)
        loss, *outputs = graph.call(*arguments)
        if loss.requires_grad:
            loss.backward()

        def of(kind: str, value: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
            named = zip(self.names, arguments, strict=True)
            found = {name[1]: value(x) for name, x in named if name is not None and name[0] == kind}
            return {name: x for name, x in found.items() if x is not None}

        return Result(
            loss.detach(),
            of("parameter", lambda x: x.grad),
            outputs={spelled(path): x.detach() for path, x in zip(self.paths, outputs, strict=False)},
            input_grads=of("input", lambda x: x.grad),
            buffers=of("buffer", lambda x: x.detach()),
        )


def _doubled(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def captured(reference: OneDevice, use: Callable[[Captured], Any], outputs: str | None) -> Any:
    """What ``use`` makes of the graph. With ``outputs="loss"`` it returns the loss alone."""
    paths = () if outputs == "loss" else reference.first.paths
    with reference.running() as model:
        args, kwargs = reference.trial.arguments(reference.in_double)
        names = {id(x): ("input", name) for name, x in inputs_of(args, kwargs).items()}
        names |= {id(x): ("parameter", name) for name, x in model.named_parameters()}
        # one that is replaced is no input that is written
        names |= {id(x): ("buffer", name) for name, x in model.named_buffers() if name not in reference.first.replaced}

        def found(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            return use(Captured(gm, inputs, [names.get(id(x)) for x in inputs], paths))

        return while_captured(WithLoss(model, reference.first.loss, paths), found, *args, **kwargs)
