"""What all contestants share: the stream of batches that keeps the time, the evaluation, the JSON.

A contestant hands a `Feed` to its package's own training loop as the source of batches. From the
moment a batch is handed out until the next one is asked for, the clock runs: that is one step of
that loop with all it does. Reading, evaluation and upkeep of dead latents happen while it stands.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x_TD → x̂_TD, and how many latents are active, int64 [T]; both in the data's own units."""
PREFIX_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
"""Matryoshka's prefixes, of all latents: dictionary_learning's groups, for every package."""
START_TOKENS = 1024
"""Tokens from which the biases of --start-l0 are found."""
SHRINK = 0.01
"""Encoder rows of latents that are to be dead are made this much shorter, so that they do not win."""


@dataclass(frozen=True)
class Goal:
    """One SAE to be trained."""

    member: str
    """Its architecture, by saemill's name."""
    level: float
    """What decides how many latents are active: k, a target, or the weight of a penalty."""
    lr: float | None
    """None: the package's own default."""

    @property
    def k(self) -> int:
        """Return the level of an architecture that has a k."""
        return round(self.level)


class Contestant(ABC):
    """SAEs of one package, one per goal. Subclasses build them in `train`, or before."""

    packages: tuple[str, ...]
    """Whose versions are reported."""

    def __init__(self, args: argparse.Namespace, goals: list[Goal]) -> None:
        self.args, self.goals = args, goals
        self.mean_D, self.variance = load_statistics(args.data)
        self.d, self.latents = len(self.mean_D), args.latents
        self.dead = torch.arange(round(args.dead_share * args.latents), device=args.device)

    @property
    def short_warmup(self) -> int:
        """Return a 20th of the run, at most 1,000 steps. Packages whose default is 1,000 get it, as their own
        value would never reach its peak in a run as short as these."""
        return min(1000, self.args.steps // 20)

    def first_rows(self) -> Tensor:
        """Read the tokens from which the biases of --start-l0 are found."""
        return read_batch(self.args.data / "train.npy", 0, START_TOKENS).to(self.args.device)

    @abstractmethod
    def train(self, feed: "Feed") -> None:
        """Build the SAEs and train them on all batches; write them where --save says."""

    def saes(self) -> AbstractContextManager[list[Reconstruct]]:
        """Give the SAEs as they would be saved now."""
        return nullcontext(self.reconstructions())

    def reconstructions(self) -> list[Reconstruct]:
        """Return the same without a context; needed where `saes` is not replaced."""
        return []

    @abstractmethod
    def keep_dead(self, first: bool) -> None:
        """Set, before each step, the counters of `self.dead`; the first time also shrink their rows."""

    @abstractmethod
    def auxk(self) -> list[float]:
        """Return the last auxiliary loss of each SAE."""


class Feed:
    """An iterator of `--steps` batches x_TD, float32 on the device, that times what is done with them.

    On a GPU several batches are handed out between two readings of the clock, so that waiting for the
    device does not count against a loop that never waits by itself.
    """

    def __init__(self, contestant: Contestant, eval_steps: set[int]) -> None:
        self.contestant, self.args, self.eval_steps = contestant, contestant.args, eval_steps
        self.step = 0
        self.block = 1 if self.args.device == "cpu" else 10
        self.pending: deque[Tensor] = deque()
        self.in_hand = 0
        self.step_seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.curve: list[dict[str, Any]] = []
        self.peak_rss = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self.pending:
            self._stop()
            if self.step in self.eval_steps:
                self.evaluate()
            if self.step == self.args.steps:
                raise StopIteration
            self._load()
        x_TD = self.pending.popleft()
        if len(self.contestant.dead):
            with torch.no_grad():
                self.contestant.keep_dead(first=self.step == 0)
        self.step += 1
        if len(self.pending) + 1 == self.in_hand:
            self._synchronize()
            self.started, self.cpu_started = time.perf_counter(), time.process_time()
        return x_TD

    def finish(self) -> None:
        """Count, after training, the last step of a loop that asked for no batch beyond its last.

        What such a loop does at its end (saving, summaries) is no step: the last one counts as the
        median.
        """
        if self.in_hand:
            seconds = statistics.median(self.step_seconds or [time.perf_counter() - self.started])
            self.step_seconds += [seconds] * self.in_hand
            self.in_hand = 0
        if self.step in self.eval_steps and (not self.curve or self.curve[-1]["step"] != self.step):
            self.evaluate()
        self.peak_rss = self.peak_rss or max_rss()

    def _stop(self) -> None:
        if self.in_hand:
            self._synchronize()
            seconds = time.perf_counter() - self.started
            cpu_seconds = time.process_time() - self.cpu_started
            self.cpu_seconds += [cpu_seconds / self.in_hand] * self.in_hand
            self.step_seconds += [seconds / self.in_hand] * self.in_hand
            self.in_hand = 0

    def _load(self) -> None:
        """Read batches up to the block's size, the next evaluation or the end."""
        ends = [self.step + self.block, self.args.steps, *self.eval_steps]
        for i in range(self.step, min(end for end in ends if end > self.step)):
            rows = read_batch(self.args.data / "train.npy", i, self.args.batch)
            self.pending.append(rows.to(self.args.device))
        self.in_hand = len(self.pending)

    def _synchronize(self) -> None:
        if self.args.device != "cpu":
            torch.cuda.synchronize()

    def evaluate(self) -> None:
        """Compute FVU and L0 on the held-out rows, for each SAE, in float32 whatever it is trained in."""
        self.peak_rss = self.peak_rss or max_rss()
        exact = torch.autocast(self.args.device, enabled=False)
        with torch.no_grad(), exact, self.contestant.saes() as saes:
            fvu, l0 = zip(*(self._figures(sae) for sae in saes), strict=True)
        tokens, seconds = self.step * self.args.batch, sum(self.step_seconds)
        point = {"step": self.step, "tokens": tokens, "seconds": seconds, "fvu": fvu, "l0": l0}
        self.curve.append(point)

    def _figures(self, reconstruct: Reconstruct) -> tuple[float, float]:
        path = self.args.data / "held_out.npy"
        held_out = torch.from_numpy(np.load(path))
        error, n_active = torch.zeros((), dtype=torch.float64), 0
        for x_TD in held_out.split(2048):
            x_TD = x_TD.to(self.args.device)
            reconstruction_TD, n_active_T = reconstruct(x_TD)
            error += (reconstruction_TD.float() - x_TD).double().square().sum().cpu()
            n_active += int(n_active_T.sum())
        spread = (held_out.double() - held_out.double().mean(0)).square().sum()
        return float(error / spread), n_active / len(held_out)


def read_batch(path: Path, i: int, batch: int) -> Tensor:
    """Read batch i of the file, from its start again after its end. The mapping is closed at once, so that
    pages of the file do not count as memory of the process."""
    rows = np.load(path, mmap_mode="r")
    start = i * batch % max(batch, len(rows) // batch * batch)
    return torch.from_numpy(np.array(rows[start : start + batch]))


def load_statistics(folder: Path) -> tuple[Tensor, float]:
    """Load the mean [D] and total variance of the training rows."""
    with np.load(folder / "statistics.npz") as saved:
        return torch.from_numpy(saved["mean"]).float(), float(saved["variance"])


def max_rss() -> int:
    """Return the peak memory of this process in bytes. Linux keeps in ru_maxrss what the parent had held when
    it started the process; VmHWM begins anew."""
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_goals(text: str) -> list[Goal]:
    """Parse `topk:32:auto,relu:0.05:3e-4` into goals."""
    parts = [goal.split(":") for goal in text.split(",")]
    return [Goal(member, float(level), None if lr == "auto" else float(lr)) for member, level, lr in parts]


def prefixes(n_latents: int) -> list[int]:
    """List Matryoshka's prefixes, in latents."""
    return [max(1, round(share * n_latents)) for share in PREFIX_SHARES]


def passed_by(pre_TF: Tensor, n_active: float) -> float:
    """Find the pre-activation that `n_active` latents per token pass on the average."""
    return float(pre_TF.flatten().topk(round(n_active * len(pre_TF))).values[-1])


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of the arguments all contestants take; each adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.train.rows")
    parser.add_argument("--latents", type=int, required=True)
    parser.add_argument("--goals", type=parse_goals, required=True, help="member:level:lr, …; lr may be auto")
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=0, help="first steps that the median leaves out")
    parser.add_argument("--eval-steps", default="", help="evaluate after these steps")
    parser.add_argument("--dead-share", type=float, default=0.0)
    parser.add_argument("--start-l0", type=float, help="active latents at the start, where a penalty decides")
    parser.add_argument("--save", type=Path, help="folder for the SAEs, in the package's own format")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    return parser


def main(build: Callable[[argparse.Namespace, list[Goal]], Contestant], args: argparse.Namespace) -> None:
    """Train and write the figures."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rss_imported = max_rss()
    contestant = build(args, args.goals)
    feed = Feed(contestant, {int(step) for step in args.eval_steps.split(",") if step})
    contestant.train(feed)
    feed.finish()
    if feed.step != args.steps:
        raise SystemExit(f"the loop took {feed.step} batches, {args.steps} were meant")
    auxk = contestant.auxk()
    if len(contestant.dead) and not min(auxk) > 0:
        raise SystemExit(f"the auxiliary loss did not run: {auxk}")
    timed = feed.step_seconds[args.warmup :] or feed.step_seconds
    result = {
        "step_seconds": feed.step_seconds,
        "median_step_seconds": statistics.median(timed),
        "tokens_per_s": args.batch / statistics.median(timed),
        "tokens_per_cpu_s": args.batch / statistics.median(feed.cpu_seconds[args.warmup :] or [float("inf")]),
        "peak_rss_bytes": feed.peak_rss,
        "rss_after_import_bytes": rss_imported,
        "cuda_peak_bytes": 0 if args.device == "cpu" else torch.cuda.max_memory_allocated(),
        "gpu": None if args.device == "cpu" else torch.cuda.get_device_name(),
        "curve": feed.curve,
        "auxk": auxk,
        "versions": {name: version(name) for name in (*contestant.packages, "torch")},
        "arguments": sys.argv[1:],
    }
    args.out.write_text(json.dumps(result))
