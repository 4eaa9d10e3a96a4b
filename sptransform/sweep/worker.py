"""What a process of the sweep does: judge one architecture, within limits, and send what it finds as it finds it."""

from __future__ import annotations

import os
import resource
import warnings
from multiprocessing.connection import Connection

import torch

from sptransform.sweep.judging import judged
from sptransform.sweep.registries import Architecture
from sptransform.testing.pretended import Asked


def work(
    architecture: Architecture, asked: list[Asked], seconds: int, memory: int, sender: Connection, log: str
) -> None:
    """Send a record for each that is asked. What libraries print goes to the file ``log``."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.set_num_threads(1)
    for record in judged(architecture, asked):
        sender.send(record)
    sender.close()
