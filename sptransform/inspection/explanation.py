"""What the compiler does to one model on one rank, as data: ``str()``, ``rich`` and ``to_dict()`` show all of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType

from sptransform.inspection import pages
from sptransform.inspection.records import Facts


@dataclass(frozen=True)
class Explanation(Facts):
    """The :class:`Facts` of one rank, with the ways to see them: ``print``, ``rich.print``, :meth:`to_dict`."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the modules that have nodes in the graph, in order of the graph; "" is the model itself."""
        return tuple(self.rewritten.text_by_layer)

    def graph(self, layer: str | None = None) -> str:
        """The rewritten graph, one line per node; with ``layer`` only that module and its submodules."""
        return self.rewritten.text(layer)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for ``json.dumps``; ``graph`` maps module paths to the modules' own lines."""
        data = {f: getattr(self, f) for f in ("strategy", "reason", "world_size", "rank", "grad_sync")}
        for name in ("redistributions", "rings", "losses", "expanded", "fallbacks", "gathered", "outputs", "totals"):
            data[name] = [_plain(asdict(entry)) for entry in getattr(self, name)]
        data["documents"] = _plain(self.documents)
        data["attention"] = [{**_plain(asdict(work)), "imbalance": work.imbalance} for work in self.attention]
        data["graph"] = {path: list(lines) for path, lines in self.rewritten.text_by_layer.items()}
        return data

    def __str__(self) -> str:
        return pages.plain(pages.sections(self))

    def __rich__(self) -> RenderableType:
        return pages.rich(pages.sections(self))


def _plain(x: Any) -> Any:
    """Tuples as lists, as JSON would give them back."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, list | tuple) else x
