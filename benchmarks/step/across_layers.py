"""One training step of a cross-layer transcoder, by loops and densely by torch, in turns.

    python -m benchmarks.step.across_layers --layers 4,6 --d 256,768 [-o FILE.md]

What layers read is made as in `benchmarks.step.parts`, and what they return is half of what the layers up to
theirs read, turned. Each way has a process of its own for its peak memory, and one thread. Times are of the
CPU, so that other work on the machine changes them little.
"""

import argparse
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import machine, table
from benchmarks.step.parts import Setting, inputs, numbers
from saemill.train.backends.choose import choose_product_dtype, make_backend
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.variant import Variant

WARMUP_STEPS = 2
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 36},
    "batchtopk": {"k": 36},
    "jumprelu": {"target_l0": 36.0, "penalty_warmup_steps": 0},
}


class Step(NamedTuple):
    """What is timed."""

    architecture: str
    kernels: str
    n_layers: int
    d: int
    n_each: int
    """Latents of each layer."""
    n_tokens: int
    n_steps: int
    precision: str


def rows_of(step: Step) -> list[tuple[Tensor, Tensor]]:
    """Make batches of what all layers read and return, side by side, each of variance 1 per dimension."""
    cpu = torch.device("cpu")
    layers = [
        inputs(Setting(1, 0, 0, 0.0, step.n_tokens, step.d, 1, torch.float32, cpu, 0, ""), 2)
        for _ in range(step.n_layers)
    ]
    turn_DD = torch.linalg.qr(torch.randn(step.d, step.d, generator=torch.Generator().manual_seed(1))).Q
    batches = []
    for parts in zip(*layers, strict=True):
        read = [part[torch.randperm(len(part))] for part in parts]
        sums = torch.stack(read).cumsum(0)
        returned = [total @ turn_DD / (layer + 1) ** 0.5 for layer, total in enumerate(sums)]
        batches.append((torch.cat(read, 1), torch.cat(returned, 1)))
    return batches


def bank_of(step: Step, x_TD: Tensor, y_TE: Tensor) -> Bank:
    """Make the transcoder."""
    sites, targets = (
        "+".join(f"layers.{layer}.{end}" for layer in range(step.n_layers)) for end in ("mlp:in", "mlp")
    )
    variant = Variant(
        name="v", site=sites, target_site=targets, architecture=step.architecture,  # type: ignore[arg-type]
        num_latents=step.n_layers * step.n_each, lr=1e-3, auxk_alpha=0.0,
        **KINDS[step.architecture],
    )  # fmt: skip
    scaling = Scaling(torch.zeros(step.n_layers * step.d), 1.0, ((step.d, 1.0),) * step.n_layers)
    backend = make_backend(step.kernels, choose_product_dtype(step.precision, torch.device("cpu")))
    learner = Learner(variant, scaling, backend, x_TD, 10**9, (scaling, y_TE))
    return Bank(sites, scaling, backend, [learner], (targets, scaling))


@torch.no_grad()
def measure(step: Step) -> tuple[float, float]:
    """Measure the median milliseconds of CPU time of a step; and peak memory in MiB, the batches included."""
    torch.set_num_threads(1)
    batches = rows_of(step)
    bank = bank_of(step, *(rows[:1024] for rows in batches[0]))
    times = []
    for number in range(WARMUP_STEPS + step.n_steps):
        x_TD, y_TE = batches[number % len(batches)]
        start = time.process_time()
        bank.step(x_TD, 1.0, number, y_TE)
        times.append(time.process_time() - start)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return statistics.median(times[WARMUP_STEPS:]) * 1e3, peak_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architectures", type=lambda text: text.split(","), default=["topk", "jumprelu"])
    parser.add_argument("--layers", type=numbers, default=[4, 6])
    parser.add_argument("--d", type=numbers, default=[256, 768])
    parser.add_argument("--latents", type=int, default=2048, help="of each layer")
    parser.add_argument("--tokens", type=int, default=2048, help="per batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", default="auto", help="of the encoder's product: auto, fp32, bf16")
    parser.add_argument("-o", "--out", type=Path, help="a markdown file")
    args = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for kind in args.architectures:
            for n_layers in args.layers:
                for d in args.d:
                    shape = (n_layers, d, args.latents, args.tokens, args.steps, args.precision)
                    found = [
                        pool.submit(measure, Step(kind, by, *shape)).result() for by in ("torch", "numba")
                    ]
                    (dense_ms, dense_mib), (loops_ms, loops_mib) = found
                    figures = dense_ms, loops_ms, dense_ms / loops_ms, dense_mib, loops_mib
                    cells = [f"{figure:,.{1 if figure < 100 else 0}f}" for figure in figures]
                    rows.append([kind, str(n_layers), str(d), *cells])
                    print(*rows[-1], flush=True)
    head = ["", "layers", "D", "dense, ms", "loops, ms", "times", "dense, MiB", "loops, MiB"]
    dtype = str(choose_product_dtype(args.precision, torch.device("cpu"))).removeprefix("torch.")
    what = f"{args.latents:,} latents of each layer, L0 36, T {args.tokens:,}, products in {dtype}, 1 thread"
    text = "\n\n".join([machine(), what, "\n".join(table(head, rows, n_text=1))])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
