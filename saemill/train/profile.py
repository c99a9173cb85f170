"""`--profile`: where the time of a step goes, as a table and as a trace."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import ProfilerActivity, profile, schedule

from saemill.common.log import say
from saemill.common.stores.runs import PROFILE

REGIONS = {
    "wait for data": "until the batch was there",
    "copy": "into training units",
    "encode": "x · W_enc",
    "top-k": "the k largest pre-activations",
    "exchange": "candidates, codes and residuals of the team's other processes",
    "decode": "reconstruction, residual, gradient of the codes",
    "model": "the model with the reconstruction in it, and the gradient there",
    "auxk": "dead latents on the residual",
    "sort": "active pairs by latent",
    "backward": "gradients of a block of rows",
    "optimizer": "the optimizer's step, renormalisation",
    "count": "sums for the log, idle tokens of the latents",
    "wait for processes": "until all have done the step",
    "logging": "log lines, checkpoints",
}
"""The regions of a step, in its order."""
PREFIX = "saemill: "
SKIPPED_STEPS, PROFILED_STEPS = 3, 8
"""The first steps, with their one-time costs, do not count; the profiled ones span log lines."""


def region(name: str) -> AbstractContextManager[object]:
    """Mark a block of code as one of `REGIONS`, for a profiler if one is running."""
    if not _profiler_enabled():  # a mark costs 6 µs
        return nullcontext()
    return torch.profiler.record_function(PREFIX + name)


@contextmanager
def profiling(folder: Path, device: torch.device) -> Iterator[torch.profiler.profile]:
    """Profile a run's steps; the profiler's `step` is to be called after each.

    The first steps are left out. After `PROFILED_STEPS` more it writes `profile.json.gz`, for
    chrome://tracing or Perfetto, into `folder` and prints the table.
    """

    def finish(profiler: torch.profiler.profile) -> None:
        trace = folder / PROFILE
        profiler.export_chrome_trace(str(trace))
        say(table(profiler, device))
        say(f"{trace}: the trace of {PROFILED_STEPS} steps, for chrome://tracing or Perfetto")

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as profiler:
        yield profiler


def table(profiler: torch.profiler.profile, device: torch.device) -> str:
    """Render milliseconds per step of each region, on the CPU and on the device."""
    events = {event.key: event for event in profiler.key_averages()}
    step_us = sum(e.cpu_time_total for key, e in events.items() if key.startswith("ProfilerStep"))
    step_ms = step_us / PROFILED_STEPS / 1e3
    ms = {name: _ms(events, name, "cpu_time_total") for name in REGIONS}
    ms["everything else"] = step_ms - sum(ms.values())
    lines = [f"one step, mean of {PROFILED_STEPS}: {step_ms:.1f} ms"]
    for name, spent in ms.items():
        line = f"  {name:18}{spent:8.1f} ms {spent / step_ms:5.0%}"
        if device.type == "cuda":
            line += f"{_ms(events, name, 'device_time_total'):8.1f} ms on the device"
        lines.append(f"{line}  {REGIONS.get(name, '')}".rstrip())
    return "\n".join(lines)


def _ms(events: Mapping[str, object], name: str, field: str) -> float:
    """Compute a region's time per step; one that did not run took none."""
    return float(getattr(events.get(PREFIX + name), field, 0.0)) / PROFILED_STEPS / 1e3
