"""How Dynamo captures whole models, and the guards against it silently running one unsharded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    TorchRuntimeError,
    Unsupported,
    UserError,
)

from sptransform.capture.torch_versions import metrics_unsaid
from sptransform.compiler.branches import branches_read
from sptransform.compiler.compiles import Compiles
from sptransform.compiler.leaf_marks import leaf_marks_ignored
from sptransform.compiler.not_captured import not_captured
from sptransform.compiler.numpy_numbers import numbers_of_numpy
from sptransform.compiler.set_up import set_up_first
from sptransform.compiler.traced_functions import traced_functions
from sptransform.diagnostics.errors import CaptureError, SPTransformError, UsageError, describe
from sptransform.diagnostics.provenance import innermost_line


class WatchedCompiler:
    """A backend that detects calls in which nothing that it compiled ran, and that remembers what it compiled."""

    def __init__(self, backend: Callable[..., Callable[..., Any]]) -> None:
        self._backend = backend
        self._num_runs = 0
        self.compiles = Compiles()

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = self._backend(gm, inputs)

        def run(*args: Any) -> Any:
            self._num_runs += 1
            return compiled(*args)

        self.compiles.add(run, gm)
        return run

    def checked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``; raises if Dynamo ran the original model, which it does silently in some modes."""

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self._num_runs
            result = call(*args, **kwargs)
            if self._num_runs == before:
                raise UsageError(
                    describe(
                        "the model ran as it was, not sharded",
                        found="torch.compile was kept from compiling it: a stance, a TorchDispatchMode, "
                        "or TORCHDYNAMO_DISABLE",
                        fix="call it outside of that; a copy.deepcopy of the model is the one-device model",
                    )
                )
            return result

        return run


_is_capturing = False  # Dynamo reads it when it traces the hook below


def compiled_by_itself(module: nn.Module, args: Any) -> None:
    """A hook that keeps Dynamo from inlining the original ``module`` when it compiles a caller.

    The call is then made from outside of that graph, and sharded. Copies of ``module`` are not parallelized.
    """
    if torch.compiler.is_compiling() and not _is_capturing and module._compiled_call_impl is not None:
        torch._dynamo.graph_break("a parallelized model is compiled by itself: call it outside of a whole graph")


def configured(call: Callable[..., Any], compiles: Compiles | None = None) -> Callable[..., Any]:
    """``call`` under the Dynamo configuration that captures whole models; errors of this package are not wrapped.

    Args:
        compiles: what was compiled in earlier calls.
    """

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _is_capturing
        before, _is_capturing = _is_capturing, True
        try:
            allowed = nullcontext() if compiles is None else compiles.allowed()
            with traced_functions(), leaf_marks_ignored(), branches_read(), numbers_of_numpy(), allowed:
                return set_up_first(lambda: in_configuration(*args, **kwargs))
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SPTransformError):
                raise error.inner_exception from None
            raise
        except (Unsupported, UserError, TorchRuntimeError) as error:
            raise not_captured(error) from error
        except InternalTorchDynamoError as error:
            raise CaptureError(
                describe(
                    "torch.compile failed while it captured the model",
                    source=innermost_line(str(error)),
                    found=f"{str(error).splitlines()[0]} (torch {torch.__version__})",
                    fix="another form of that line, or a newer torch; if torch.compile(model, fullgraph=True) works "
                    "without sptransform, the fault is in sptransform: report it",
                )
            ) from error
        except FailOnRecompileLimitHit as error:
            raise UsageError(
                describe(
                    "the model was compiled for as many different inputs as Dynamo allows",
                    found=str(error).split("\n")[0],
                    fix="pass numbers that change as tensors; or raise torch._dynamo.config.recompile_limit",
                )
            ) from error
        finally:
            _is_capturing = before

    @metrics_unsaid()
    def in_configuration(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(
            # a warning or a call of a logger would break the graph, and is no part of what the model computes
            ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | _logging_functions(),
            # DDP would split the graph by gradient bucket, and half an attention cannot be sharded
            optimize_ddp=False,
            # with graph breaks allowed, Dynamo would silently run the original model, unsharded
            fail_on_recompile_limit_hit=True,
            # a list that hooks of a checkpointed layer append to is not appended to again when the layer is recomputed,
            # as in eager mode, where they are inactive by then
            skip_fwd_side_effects_in_bwd_under_checkpoint=True,
            # Dynamo passes an open float as a tensor's item, which cannot be read when the graph is traced again
            specialize_float=True,
        ):
            return call(*args, **kwargs)

    return run


def _logging_functions() -> set[Any]:
    """Warnings, and every logging function of ``logging.Logger``, those that libraries added too (``warning_once``)."""
    quiet = {"debug", "info", "warning", "error", "critical", "exception", "log", "warn"}
    added = set(vars(logging.Logger)) - set(_STANDARD)
    return {warnings.warn} | {getattr(logging.Logger, name) for name in (quiet & set(vars(logging.Logger))) | added}


_STANDARD = frozenset(
    name for name, fn in vars(logging.Logger).items() if getattr(fn, "__module__", "logging") == "logging"
)
