"""Hardware as data: what a device computes, moves and sends in a second, each number with its source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
            ``"extends"`` another, by name or by its path from there, and has ``"constants"`` of its own; or the
            hardware itself.

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
    return _file(Path(hardware), ())


def _file(path: Path, extended_by: tuple[Path, ...]) -> Hardware:
    """The file at ``path``, which these extend."""
    if not path.is_file():
        raise UsageError(
            describe(
                f"there is no hardware {str(path)!r}",
                found=f"files {', '.join(hardware_names())}",
                fix="one of these, or the path of a file that `sptransform calibrate` writes",
            )
        )
    if path.resolve() in extended_by:
        fix = f'"extends" with one of {", ".join(hardware_names())}'
        raise UsageError(describe("a file of hardware extends itself", found=str(path), fix=fix))
    read = _read(path, (*extended_by, path.resolve()))
    _check_constants(read, path)
    return read


@cache
def _shipped(name: str) -> Hardware:
    return _read(FILES / f"{name}.json", ())


def _read(path: Path, extended_by: tuple[Path, ...]) -> Hardware:
    try:
        data = json.loads(path.read_text())
        constants = {name: _constant(name, each) for name, each in data["constants"].items()}
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
        extended = _shipped(base) if base in hardware_names() else _file(path.parent / str(base), extended_by)
        constants = {**extended.constants, **constants}
    return Hardware(path.stem, what, constants)


def _constant(name: str, given: Any) -> Constant:
    if not isinstance(given, list) or len(given) != 3:
        raise ValueError(f'"{name}": {json.dumps(given)}')
    return Constant(*given)


_ABOVE_ZERO = re.compile(r"(flops|bandwidth|efficiency|tile|ranks|processors|memory\.bytes|peak_flops\..*)$")


def _check_constants(hardware: Hardware, path: Path) -> None:
    """Raise UsageError where a file has what nothing would read, or what gives no times."""
    known = {_form(name): each.value for file in hardware_names() for name, each in _shipped(file).constants.items()}
    for name, (value, *_) in hardware.constants.items():
        found = f'"{name}": {json.dumps(value)}'
        if _form(name) not in known:
            close = _close_to(name, {name: None for file in hardware_names() for name in _shipped(file).constants})
            fix = f"{' or '.join(close[:3])}; docs/hardware.md has all"
            raise UsageError(describe(f"{path} has a constant that nothing reads", found=found, fix=fix))
        wanted = _wanted(name, value, known[_form(name)])
        if wanted is not None:
            raise UsageError(describe(f"{path} has a constant of no use", found=found, fix=wanted))


def _wanted(name: str, value: Any, like: Any) -> str | None:
    """What the constant should be, of the kind of ``like``; None if it is."""
    if isinstance(like, bool | str):
        return None if isinstance(value, type(like)) else "true or false" if isinstance(like, bool) else "a name"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if _ABOVE_ZERO.search(name):
        return None if is_number and value > 0 else "a number above 0, in SI units"
    return None if is_number and value >= 0 else "a number, 0 or above, in SI units"


def _form(name: str) -> str:
    """The name without which kernel, or which dtype, it is of."""
    kind, _, dtype = name.partition(".")
    if kind == "peak_flops" and (dtype == "float8" or isinstance(getattr(torch, dtype, None), torch.dtype)):
        return "peak_flops.DTYPE"
    return re.sub(r"^attention\.\w+\.(forward|backward)\.", r"attention.KERNEL.\1.", name)


def _close_to(name: str, names: Mapping[str, Any]) -> list[str]:
    return get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
