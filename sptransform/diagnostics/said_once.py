"""Warnings that are true of many layers, said once a compile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextmanager
def each_sentence_once() -> Iterator[None]:
    """Within, an :class:`OnceLogger` gives each warning once."""
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


class OnceLogger:
    """The logger of a name, whose warnings do not repeat within :func:`each_sentence_once`."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def warning(self, message: str, *args: Any) -> None:
        """As ``logging.Logger.warning``."""
        said, sentence = _said.get(), message % args
        if said is None or sentence not in said:
            self._log.warning(message, *args)
        if said is not None:
            said.add(sentence)
