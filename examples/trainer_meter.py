"""Tokens per second and the peak memory of a rank among what Trainer logs."""

import time
from typing import Any

import meter
from transformers import TrainerCallback


class TrainerMeter(TrainerCallback):
    """The first step, which compiles, is not counted. Needs `include_num_input_tokens_seen`."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began is None:
            self._began = time.perf_counter(), int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs and self._began is not None:
            began, tokens = self._began
            speed = (int(state.num_input_tokens_seen) - tokens) / (time.perf_counter() - began)
            logs |= {"tokens_per_second": round(speed), "peak_memory_mib": round(meter.peak_memory())}
