"""The errors that all ranks raise together: a rank is gone, is missing, or has failed."""

from __future__ import annotations

from collections.abc import Sequence

from sptransform.agreement.program import list_by_ranks, name_ranks
from sptransform.diagnostics.errors import RankFailedError, RankLostError, RankMissingError, describe

_LONGEST = 1500  # at most so many characters of an error are passed on


def lost_error(ranks: Sequence[int]) -> RankLostError:
    return RankLostError(
        describe(
            f"{name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} gone",
            found="the process has ended" if len(ranks) == 1 else "the processes have ended",
            fix="see its log for the cause, and start the job again",
        ),
        ranks,
    )


def missing_error(ranks: Sequence[int], waited: float) -> RankMissingError:
    return RankMissingError(
        describe(
            f"{name_ranks(ranks)} did not come to a call of the model, or of its backward, that the others are in",
            found=f"waited {waited:g} s; nothing shows that the process has ended",
            fix="call the model and backward equally often on every rank, or pass a longer check_timeout",
        ),
        ranks,
    )


def failed_error(errors: dict[int, str]) -> RankFailedError:
    ranks_of: dict[str, list[int]] = {}
    for rank, text in errors.items():
        ranks_of.setdefault(text.replace("\n", "\n         "), []).append(rank)
    return RankFailedError(
        describe(
            f"{name_ranks(errors)} failed in this call",
            found=list_by_ranks(ranks_of),
            fix="a call succeeds on all ranks or on none: see that error",
        ),
        list(errors),
    )


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST]
