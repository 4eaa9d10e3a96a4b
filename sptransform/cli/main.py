"""The command line: what it takes, and which function does it. Reports go to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.text import Text

from sptransform.cli import commands
from sptransform.cost.hardware import hardware_names
from sptransform.diagnostics.errors import SPTransformError

EXAMPLES = """\
examples:
  sptransform compare config.json --world-size 64 --seq-len 1048576 --hardware h100-ib --html out.html
  sptransform explain my_package.models:build --strategy ulysses,ring --world-size 8 --seq-len 131072
  sptransform explain config.json --strategy ring+megatron --world-size 8x8 --seq-len 1048576
  sptransform verify config.json --small --strategy ulysses,ring --world-size 2
  sptransform calibrate --ranks 4 --out here.json
  sptransform doctor
"""
_MODEL = """\
MODULE:FACTORY is a function that returns a model, or (model, inputs). If it has arguments seq_len and batch, it gets
them. CONFIG.json is a configuration of Hugging Face (needs transformers).
"""


def main(given: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 if `doctor` or `verify` found a problem, or 2 for an error."""
    options = parser().parse_args(given)
    # what it logs with a traceback is in the error too
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except SPTransformError as error:
        Console(stderr=True).print(Text("error: ", "bold red"), Text(str(error)), sep="", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads the report has enough of it, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    whole = _parser(argparse.ArgumentParser, "sptransform", "See, check and plan sequence parallelism.", EXAMPLES)
    commands_ = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: commands.Command, does: str, example: str) -> argparse.ArgumentParser:
        made = commands_.add_parser(
            name,
            help=does,
            description=does,
            epilog=f"{_MODEL if 'MODULE' in example or 'config' in example else ''}\nexamples:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    explain = command(
        "explain",
        commands.explain,
        "What each strategy inserts into a model, where, and what it sends.",
        "  sptransform explain config.json --strategy ulysses,ring --world-size 64 --seq-len 1048576 "
        "--hardware h100-ib --html out.html\n",
    )
    compare = command(
        "compare",
        commands.compare,
        "All strategies side by side: bytes, FLOPs, memory, time.",
        "  sptransform compare config.json --world-size 64 --seq-len 1048576 --hardware h100-ib\n",
    )
    verify = command(
        "verify",
        commands.verify,
        "Run a model on ranks and on one device, and compare loss, outputs and gradients.",
        "  sptransform verify my_package.models:build_tiny --strategy ulysses,ring --world-size 2\n"
        "  sptransform verify config.json --small --strategy ring --simulated\n",
    )
    doctor = command("doctor", commands.doctor, "What this installation can do.", "  sptransform doctor --json\n")
    calibrate = command(
        "calibrate",
        commands.calibrate,
        "Measure this machine, and write a file for --hardware.",
        "  sptransform calibrate --ranks 4 --out here.json\n"
        "  sptransform compare config.json --world-size 4 --seq-len 4096 --hardware here.json\n",
    )
    for each, ranks, length in ((explain, None, None), (compare, None, None), (verify, (2,), 64)):
        each.add_argument("model", metavar="MODULE:FACTORY | CONFIG.json")
        needed = f" ({ranks[0]})" if ranks else ""
        each.add_argument("--world-size", type=_shape, metavar="N", required=ranks is None, default=ranks,
                          help=f"the number of ranks{needed}; NxM is a mesh of two dims")  # fmt: skip
        needed = f" ({length})" if length else ", unless MODULE:FACTORY has its own"
        each.add_argument("--seq-len", type=_positive, metavar="S", default=length,
                          help=f"tokens of a sequence{needed}")  # fmt: skip
        each.add_argument("--batch", type=_positive, default=1, metavar="B", help="sequences (1)")
        each.add_argument("--strategy", type=_strategies, required=each is not compare, default=None, metavar="A,B",
                          help="ulysses, ring, allgather, usp, megatron, auto; A+B: one a mesh dim")  # fmt: skip
    for each in (explain, compare):
        each.add_argument("--dtype", type=_dtype, metavar="DTYPE",
                          help="of parameters (a config.json: bfloat16; else as they are made)")  # fmt: skip
        each.add_argument(
            "--hardware", metavar="NAME | FILE", help=f"for times: {', '.join(hardware_names())}, or a file"
        )
        each.add_argument("--html", metavar="FILE", help="write a page")
        each.add_argument("--trace", metavar="FILE", help="write the simulated step for ui.perfetto.dev")
    verify.add_argument("--simulated", action="store_true", help="simulate the ranks in this process")
    verify.add_argument("--small", action="store_true", help="make the model of a CONFIG.json small first")
    calibrate.add_argument("--ranks", type=_positive, default=2, metavar="N", help="processes at a time (2)")
    calibrate.add_argument(
        "--out", metavar="FILE", default="calibrated.json", help="the file to write (calibrated.json)"
    )
    for each in (explain, compare, verify, doctor, calibrate):
        each.add_argument("--json", action="store_true", help="print JSON")
    return whole


def _parser(made: type[argparse.ArgumentParser], name: str, does: str, epilog: str) -> argparse.ArgumentParser:
    return made(name, description=does, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of 1 or more, not {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"ranks such as 64, or 8x8, not {text!r}")
    return tuple(map(int, text.split("x")))


def _strategies(text: str) -> list[str | tuple[str, ...]]:
    """Strategies between commas; between pluses, one for each mesh dim."""
    several = [tuple(each.split("+")) for each in text.split(",")]
    return [each if len(each) > 1 else each[0] for each in several]


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(f"a floating-point dtype of torch such as bfloat16, not {text!r}")
    return found
