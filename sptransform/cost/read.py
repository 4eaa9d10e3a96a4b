"""A rewritten graph as a :class:`Step`: its forward and its backward, op by op, with what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from sptransform.compiler.rewrite import Rewritten, no_garbage_collection
from sptransform.cost.folding import LayerRun, run_of
from sptransform.cost.fusion import fused
from sptransform.cost.groups import as_rank, groups_of
from sptransform.cost.instructions import Buffer, Instruction, Reader, gradients_of_outputs, saved
from sptransform.cost.joint import training_graphs
from sptransform.cost.op_costs import num_bytes
from sptransform.cost.records import Step, Work
from sptransform.graph import dataflow, notes


@no_garbage_collection()
def step_of(rewritten: Rewritten, *, fuse: bool = True, runs: Mapping[str, LayerRun] | None = None) -> Step:
    """What one rank runs, sends and holds in one training step, without running it.

    Args:
        rewritten: what :func:`sptransform.rewrite` returns.
        fuse: count pointwise ops as Inductor fuses them; False counts each op apart, as ``backend="aot_eager"`` runs
            them.
        runs: module paths -> the equal layers that each stands for, as
            :func:`sptransform.cost.folding.fold_layers` says.
    """
    rank, groups = rewritten.context.mesh.rank, groups_of(rewritten)
    graphs = training_graphs(rewritten)
    own = rewritten.graph_module.graph.find_nodes(op="placeholder")
    placeholders = graphs.forward.find_nodes(op="placeholder")
    held = {node: _held(node) for node in placeholders}
    reader, env = Reader(rank, groups), dict(held)
    with as_rank(rank, groups):
        instructions = list(reader.read(graphs.forward, env, "forward"))
        outputs = _output(graphs.forward)[: len(dataflow.operands(_output_node(rewritten.graph_module.graph)))]
        _keep(outputs, env)
        if graphs.backward is not None:
            by_name = {node.name: buffer for node, buffer in env.items()}
            behind = saved(graphs.backward, by_name)
            instructions += gradients_of_outputs(graphs.backward, behind)
            instructions += reader.read(graphs.backward, behind, "backward")
            _keep(_output(graphs.backward), behind)
    runs = runs or {}
    sizes = []
    inputs = placeholders[len(placeholders) - len(own) :]  # before them stand the constants of the graph
    for node, placeholder in zip(own, inputs, strict=True):
        note = notes.note(node)
        sizes.append((note, held[placeholder].size * run_of(note.input_name or "", runs).times))
    return Step(
        works=tuple(_works(fused(instructions) if fuse else instructions, runs)),
        rank=rank,
        world_size=rewritten.context.mesh.size,
        parameters=sum(size for note, size in sizes if note.is_parameter or note.is_buffer),
        gradients=sum(size for note, size in sizes if note.is_parameter and note.differentiable),
        inputs=sum(size for note, size in sizes if not (note.is_parameter or note.is_buffer)),
    )


def _held(node: fx.Node) -> Buffer:
    value = dataflow.value(node)
    return Buffer(num_bytes(value) if isinstance(value, Tensor) else 0, stays=True)


def _output_node(graph: fx.Graph) -> fx.Node:
    (output,) = graph.find_nodes(op="output")
    return output


def _output(graph: fx.Graph) -> Sequence[fx.Node | None]:
    return _output_node(graph).args[0]


def _keep(outputs: Sequence[fx.Node | None], env: Mapping[fx.Node, Buffer]) -> None:
    for node in outputs:
        if isinstance(node, fx.Node) and isinstance(env[node], Buffer):
            env[node].stays = True


def _works(instructions: Sequence[Instruction], runs: Mapping[str, LayerRun]) -> list[Work]:
    """The instructions with what is freed after each; those of equal layers follow each other."""
    last: dict[Buffer, int] = {}
    for index, found in enumerate(instructions):
        last |= dict.fromkeys((*found.reads, *found.makes), index)
    frees: list[list[int]] = [[] for _ in instructions]
    for buffer, index in last.items():
        if buffer.size and not buffer.stays:
            frees[index].append(buffer.size)
    works = [
        Work(
            name=found.name,
            op=found.op,
            kind=found.kind,
            direction=found.direction,
            layer=found.layer,
            source_line=found.source_line,
            dtype=found.dtype,
            flops=found.flops,
            traffic=0 if found.kind in ("message", "wait") else sum(found.reads.values()) + found.writes,
            sizes=found.sizes,
            message=found.message,
            allocates=tuple(buffer.size for buffer in found.makes if buffer.size),
            frees=tuple(frees[index]),
            scratch=found.scratch,
            copies=run.times,
            run=run.first,
            ring=found.ring,
        )
        for index, found in enumerate(instructions)
        for run in [run_of(found.layer, runs)]
    ]
    return [work for direction in ("forward", "backward") for work in _together(works, direction)]


def _together(works: Sequence[Work], direction: str) -> list[Work]:
    """The works of one direction. Between those of one run of equal layers stands nothing else.

    A backward computes some of a neighbour's again among them, and ends a message late; these come after.
    """
    own = [work for work in works if work.direction == direction]
    found: list[Work] = []
    while own:
        run = own[0].run
        if not run:
            found.append(own.pop(0))
            continue
        found += [work for work in own if work.run == run]
        own = [work for work in own if work.run != run]
    return found
