"""The order in which passes run, and where a user's passes go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.pass_manager import CAPTURED, DISTRIBUTED, Pass
from sptransform.engine.verifier import INVARIANTS


@dataclass(frozen=True)
class Pipeline:
    """The passes in the order they run. ``print`` it to see their names.

    Attributes:
        normalize: run once, on the captured graph of one device.
        distribute: run once for each mesh dim, on the graph that the dim before it left.
        finish: run once, on the program of one rank.
    """

    normalize: tuple[Pass, ...]
    distribute: tuple[Pass, ...]
    finish: tuple[Pass, ...]

    def __iter__(self) -> Iterator[Pass]:
        return iter((*self.normalize, *self.distribute, *self.finish))

    def __str__(self) -> str:
        return "\n".join(f"{phase}: {' > '.join(step.name for step in steps)}" for phase, steps in self.phases.items())

    @property
    def phases(self) -> dict[str, tuple[Pass, ...]]:
        """Name of each phase, in order -> its passes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def keeping_apart(self, modules: Iterable[str]) -> Pipeline:
        """This pipeline, in which parameters of these modules travel in messages of their own."""

        def changed(step: Pass) -> Pass:
            return replace(step, apart=tuple(modules)) if hasattr(step, "apart") else step

        return Pipeline(*(tuple(map(changed, steps)) for steps in self.phases.values()))

    def with_passes(self, passes: Sequence[Pass]) -> Pipeline:
        """This pipeline with a user's ``passes`` at the places that their ``after`` names; at one place, in order.

        Raises:
            UsageError: something is no pass, has the name of another one, an unknown invariant or place, or
                requires what does not hold there, or breaks what a later pass requires.
        """
        found = self
        for step in passes:
            if not isinstance(step, Pass):
                is_class = isinstance(step, type) and issubclass(step, Pass)
                fix = f"{step.__name__}()" if is_class else "a subclass of sptransform.Pass"
                raise UsageError(describe("passes are objects of subclasses of Pass", found=repr(step), fix=fix))
            _check_class(step, found)
            later = [other.name for other in passes[passes.index(step) + 1 :] if isinstance(other, Pass)]
            found = _inserted(step, found, later)
        _check_requirements(found, {step.name for step in passes})
        return found


def _check_class(step: Pass, pipeline: Pipeline) -> None:
    if type(step).run is Pass.run:
        raise UsageError(
            describe(f"{step.name} does nothing", found="no method run", fix="def run(self, graph, context): ..")
        )
    for name in ("requires", "ensures", "breaks"):
        if not isinstance(getattr(step, name), set | frozenset):
            found = f"{name} = {getattr(step, name)!r}"
            raise UsageError(describe(f"{step.name} names no set of invariants", found=found, fix="{'functional'}"))
    unknown = sorted((step.requires | step.ensures | step.breaks) - INVARIANTS.keys())
    if unknown:
        what = f"{step.name} names an invariant that does not exist"
        raise UsageError(describe(what, found=", ".join(unknown), fix=f"of {', '.join(INVARIANTS)}"))
    if step.name in (*pipeline.phases, "capture", *(other.name for other in pipeline)):
        what = "two passes, or a pass and a phase, have one name"
        raise UsageError(describe(what, found=step.name, fix="another name of the class"))


def _inserted(step: Pass, pipeline: Pipeline, later: Sequence[str]) -> Pipeline:
    if step.after == "capture":
        return replace(pipeline, normalize=(step, *pipeline.normalize))
    for phase, steps in pipeline.phases.items():
        names = [other.name for other in steps]
        if step.after in (phase, *names):
            at = len(steps) if step.after == phase else names.index(step.after) + 1
            return replace(pipeline, **{phase: (*steps[:at], step, *steps[at:])})
    fix = f"one of {', '.join(('capture', *pipeline.phases, *(other.name for other in pipeline)))}"
    if step.after in later:
        fix = f"passes=[{step.after}(..), {step.name}(..)], in this order"
    what = f"{step.name} is to run at a place that does not exist"
    raise UsageError(describe(what, found=f"after={step.after!r}", fix=fix))


def _check_requirements(pipeline: Pipeline, own: set[str]) -> None:
    """Check that what each pass requires holds where it runs; ``own`` are the names of the user's passes."""
    ends = {"normalize": CAPTURED, "distribute": DISTRIBUTED, "finish": DISTRIBUTED}
    for phase, steps in pipeline.phases.items():
        holds = DISTRIBUTED if phase == "finish" else CAPTURED
        broken: dict[str, str] = {}
        for step in steps:
            if missing := sorted(step.requires - holds):
                _refuse(step.name, missing, holds, broken, step.name in own)
            broken |= dict.fromkeys(holds & step.breaks - step.ensures, step.name)
            holds = (holds - step.breaks) | step.ensures
        if missing := sorted(ends[phase] - holds):
            _refuse(f"what follows {phase}", missing, holds, broken, False)


def _refuse(name: str, missing: Sequence[str], holds: frozenset[str], broken: dict[str, str], is_own: bool) -> None:
    breakers = dict.fromkeys(broken[invariant] for invariant in missing if invariant in broken)
    fix = f"another place for {name} (its `after`)" if is_own else f"another place for {', '.join(breakers)}"
    raise UsageError(
        describe(
            f"{name} requires {', '.join(missing)}, which does not hold there",
            found=f"{', '.join(sorted(holds))}" + (f"; broken by {', '.join(breakers)}" if breakers else ""),
            fix=fix,
        )
    )
