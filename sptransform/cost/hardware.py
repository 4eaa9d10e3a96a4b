"""Hardware as data: what a device computes, moves and sends in a second, each number with its source."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from sptransform.diagnostics.errors import UsageError, describe

FILES = Path(__file__).parent / "hardware_files"


class Constant(NamedTuple):
    """A number of a piece of hardware, with the unit it is in and where it comes from."""

    value: Any
    unit: str
    source: str


@dataclass(frozen=True, eq=False)
class Hardware:
    """A device and its links. docs/hardware.md lists the constants.

    Attributes:
        name: of the file, without ``.json``.
        what: the devices and the links, in words.
        constants: by name, such as ``memory.bandwidth``.
    """

    name: str
    what: str
    constants: Mapping[str, Constant] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        """The value of a constant. Raises UsageError where the hardware has none of this name."""
        if name not in self.constants:
            raise UsageError(
                describe(
                    f"hardware {self.name} says nothing of {name}",
                    found=f"constants {', '.join(_close_to(name, self.constants))}",
                    fix=f'"{name}": [VALUE, UNIT, SOURCE] in a file of its own that extends "{self.name}"',
                )
            )
        return self.constants[name].value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a constant, or ``default``."""
        return self.constants[name].value if name in self.constants else default

    def replaced(self, source: str = "given", /, **values: Any) -> Hardware:
        """The same with other values of constants, whose names have ``__`` for each point.

        ``hardware.replaced(attention__kernel="flash3")``.
        """
        changed = dict(self.constants)
        for keyword, value in values.items():
            name = keyword.replace("__", ".")
            self[name]
            changed[name] = Constant(value, self.constants[name].unit, source)
        return replace(self, constants=changed)

    def write(self, path: str | Path) -> None:
        """Write a file that :func:`hardware_of` reads."""
        lines = (f"    {json.dumps(name)}: {json.dumps(list(each))}" for name, each in self.constants.items())
        text = f'{{\n  "what": {json.dumps(self.what)},\n  "constants": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        Path(path).write_text(text)


HardwareLike = str | Path | Hardware


def hardware_names() -> list[str]:
    """The names of the files that come with the library."""
    return sorted(file.stem for file in FILES.glob("*.json"))


def hardware_of(hardware: HardwareLike) -> Hardware:
    """The hardware of a name, or of a file.

    Args:
        hardware: one of :func:`hardware_names`; the path of a file as :meth:`Hardware.write` makes it, or that
            ``"extends"`` another by name and has ``"constants"`` of its own; or the hardware itself.

    Raises:
        UsageError: there is no such file, or it is not of this form.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if str(hardware) in hardware_names():
        return _shipped(str(hardware))
    if not isinstance(hardware, str | Path):
        fix = f"one of {', '.join(hardware_names())}, or the path of a file"
        raise UsageError(describe("hardware is a name or a file", found=repr(hardware), fix=fix))
    path = Path(hardware)
    if not path.is_file():
        raise UsageError(
            describe(
                f"there is no hardware {str(hardware)!r}",
                found=f"files {', '.join(hardware_names())}",
                fix="one of these, or the path of a file that `sptransform calibrate` writes",
            )
        )
    return _checked(_read(path))


@cache
def _shipped(name: str) -> Hardware:
    return _read(FILES / f"{name}.json")


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> Hardware:
    try:
        data = json.loads(path.read_text())
        constants = {name: Constant(*each) for name, each in data["constants"].items()}
        what, base = data["what"], data.get("extends")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            describe(
                f"{path} is no file of hardware",
                found=f"{type(error).__name__}: {error}",
                fix='JSON with "what" and "constants", each of them NAME: [VALUE, UNIT, SOURCE]',
            )
        ) from error
    if base is not None:
        constants = {**_extended(base, (*extended_by, path.resolve())).constants, **constants}
    return Hardware(path.stem, what, constants)


def _extended(base: Any, by: tuple[Path, ...]) -> Hardware:
    """The hardware that a file extends. Raises UsageError if that is one of those that extend it."""
    if not isinstance(base, str) or base in hardware_names() or not Path(base).is_file():
        return hardware_of(base)
    if Path(base).resolve() in by:
        found = f'"extends": {json.dumps(base)}'
        raise UsageError(describe(f"{by[-1]} extends itself", found=found, fix=f"one of {', '.join(hardware_names())}"))
    return _read(Path(base), by)


def _checked(hardware: Hardware) -> Hardware:
    """The same. Raises UsageError for a constant that no file has, which nothing would read, or that cannot be."""
    shipped = [_shipped(file).constants for file in hardware_names()]
    known = {_any_kind(name): each.value for constants in shipped for name, each in constants.items()}
    for name, (value, _, _) in hardware.constants.items():
        if _any_kind(name) not in known:
            what = f"hardware {hardware.name} has a constant that nothing reads"
            close = ", ".join(get_close_matches(name, _names(), n=3, cutoff=0.4)) or "a name of docs/hardware.md"
            raise UsageError(describe(what, found=name, fix=close))
        kind = _kind(known[_any_kind(name)])
        is_rate = name.startswith("peak_flops.") or name.endswith(_ABOVE_ZERO)
        wrong = _kind(value) != kind or (kind == "a number" and not (0 < value < inf or (value == 0 and not is_rate)))
        if wrong:
            of = " above zero" if is_rate else ", not below zero" if kind == "a number" else ""
            what = f"{name} of hardware {hardware.name} has to be {kind}{of}"
            raise UsageError(describe(what, found=repr(value), fix=f"such as {known[_any_kind(name)]!r}"))
    return hardware


# what times are divided by
_ABOVE_ZERO = ("bandwidth", "efficiency", ".flops", "node.ranks")


def _names() -> list[str]:
    return sorted({name for file in hardware_names() for name in _shipped(file).constants})


def _any_kind(name: str) -> str:
    """The name of a constant, for any dtype, and for any attention kernel."""
    name = re.sub(r"^peak_flops\.\w+$", "peak_flops.DTYPE", name)
    return re.sub(r"^attention\.\w+\.(forward|backward)\.", r"attention.KERNEL.\1.", name)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a bool"
    return "a number" if isinstance(value, int | float) else "a name"


def _close_to(name: str, names: Mapping[str, Any]) -> list[str]:
    return get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
