"""What Dynamo gives up on, as errors that name the user's line."""

from __future__ import annotations

import re

from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.diagnostics.provenance import innermost_line

_IN_A_CALL = re.compile(r"failed to run FX node with fake tensors: .*: got (.*)")
_WITHOUT_FAKE = ("fake impl", "register_fake", "does not support running with fake tensors", "'Meta' backend")


def not_captured(error: Exception) -> CaptureError:
    """What Dynamo could not capture, at the user's line."""
    what, *more = str(error).split("\n")
    context = _after("Developer debug context: ", more)
    if what == "Observed exception" or ("assertion failed" in what and "ConstantVariable" in context):
        return CaptureError(
            describe(
                "the model raises an exception",
                source=innermost_line(str(error)),
                found=context.removeprefix("raised exception ") if what == "Observed exception" else "AssertionError",
                fix="what the exception asks for; if one device does not raise it, another form of that line",
            )
        )
    in_a_call = _IN_A_CALL.search(str(error))
    if any(sign in str(error) for sign in _WITHOUT_FAKE):
        return CaptureError(
            describe(
                "a custom op does not say what it returns, which no graph can be made without",
                source=innermost_line(str(error)),
                found=in_a_call[1] if in_a_call else context,
                fix="register_fake of that op: a function of the same arguments that returns torch.empty of the shapes "
                "and dtypes to come",
            )
        )
    if in_a_call:
        return CaptureError(
            describe(
                "a call in the model fails on tensors of the shapes, dtypes and devices that it gets",
                source=innermost_line(str(error)),
                found=in_a_call[1],
                fix="that call, or the inputs of the model; one device fails there too, or the op's register_fake does",
            )
        )
    if any(sign in str(error) for sign in ("Data-dependent", "data-dependent expression")):
        return CaptureError(
            describe(
                "the model decides by what a tensor holds, which no graph can",
                source=innermost_line(str(error)),
                found=what,
                fix="compute both sides there and choose with torch.where; or decide before the forward, and pass what "
                "was decided, such as a mask where the model looks for padding. If it decides while it trains (ranges "
                "that run along, layers that are dropped): model.eval(), or layerdrop=0; if attention looks for "
                "padding, or for packed documents: attn_implementation='sdpa', or 'sptransform' (docs/attention.md); "
                "if it loops over experts that were chosen: model.set_experts_implementation('grouped_mm'), or loop "
                "over all",
            )
        )
    if "save_on_cpu" in str(error) or "saved_tensors_hooks" in str(error):
        return CaptureError(
            describe(
                "the model says inside of its forward where activations are kept, which no graph shows",
                source=innermost_line(str(error)),
                found=what,
                fix="the same around the call: with torch.autograd.graph.save_on_cpu(): model(..); of checkpointing "
                "without offload=True, that keeps what is saved of each layer on the host",
            )
        )
    explanation = _after("Explanation: ", more) or context
    return CaptureError(
        describe(
            "torch.compile cannot capture the model as one graph",
            source=innermost_line(str(error)),
            found=f"{what}. {explanation}".strip(". "),
            fix="a form of that line that torch.compile(model, fullgraph=True) takes; or fullgraph=False, under which "
            "the parts between graph breaks are sharded",
        )
    )


def _after(title: str, lines: list[str]) -> str:
    return next((line.strip().removeprefix(title) for line in lines if line.strip().startswith(title)), "").strip()
