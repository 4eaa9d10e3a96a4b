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
    """Within, :func:`warn` says each sentence once."""
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def warn(log: logging.Logger, message: str, *args: Any) -> None:
    """``log.warning``, unless it was said before within :func:`each_sentence_once`."""
    said, sentence = _said.get(), message % args
    if said is None or sentence not in said:
        log.warning(message, *args)
    if said is not None:
        said.add(sentence)
