"""One training step by its parts, against the limit of the machine, both measured in the same run.

    python -m benchmarks.step.parts --latents 6144,24576 --k 32 --threads 1,2 [-o FILE.md]

Inputs are sums of 32 of 4096 random directions and noise. The limit of a step is the larger of two
times: that of the one dense product it cannot avoid, at the rate of that product alone; and that of
the bytes it cannot avoid, 28 per weight for Adam and 16 per gathered number of the active rows, at
the rate of a large copy.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import machine
from saemill.train.backends.choose import choose_kernels, choose_product_dtype, make_backend
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.profile import PREFIX, REGIONS
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import auto_lr

WARMUP_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    n_threads: int
    n_latents: int
    k: int
    dead_share: float
    n_tokens: int
    d: int
    n_variants: int
    dtype: torch.dtype
    device: torch.device
    n_steps: int
    kernels: str


def inputs(setting: Setting, n_batches: int = 4) -> list[Tensor]:
    """Make batches x_TD in training units."""
    generator = torch.Generator().manual_seed(2**31 + 7)  # no seed of a variant
    directions = torch.nn.functional.normalize(torch.randn(4096, setting.d, generator=generator), dim=1)
    x = 0.02 * torch.randn(n_batches * setting.n_tokens, setting.d, generator=generator)
    for _ in range(32):
        chosen = torch.randint(0, 4096, (len(x),), generator=generator)
        x += torch.rand(len(x), 1, generator=generator) * directions[chosen]
    x -= x.mean(0)
    x *= (setting.d / x.square().sum(1).mean()).sqrt()
    return list(x.to(setting.device).split(setting.n_tokens))


def bank_of(setting: Setting, sample_TD: Tensor) -> Bank:
    """Make variants that differ in their seed; some latents dead if asked for."""
    lr = auto_lr(setting.n_latents, setting.d, 1000)
    k_aux = setting.d // 2
    names = range(setting.n_variants)
    variants = [
        Variant(
            name=f"v{i}", site="x", k=setting.k, num_latents=setting.n_latents, lr=lr, seed=i, k_aux=k_aux
        )
        for i in names
    ]
    scaling = Scaling(torch.zeros(setting.d, device=setting.device), 1.0)
    backend = make_backend(setting.kernels, setting.dtype)
    learners = [Learner(variant, scaling, backend, sample_TD, 10**9) for variant in variants]
    n_dead = round(setting.dead_share * setting.n_latents)
    for learner in learners:
        learner.idle_tokens_F[:n_dead] = 2 * 10**9
        learner.parameters.w_enc_FD[:n_dead] *= 0.01  # they stay dead, so that every step has AuxK
        learner.weights.refresh()
    return Bank("x", scaling, backend, learners)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Measure the median time of a call."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(setting: Setting) -> dict[str, float]:
    """Measure milliseconds of a step, of its regions and of its limits; tokens/s; peak memory in MiB."""
    torch.set_num_threads(setting.n_threads)
    batches = inputs(setting)
    bank = bank_of(setting, batches[0])
    done = 0

    def step() -> None:
        nonlocal done
        bank.step(batches[done % len(batches)], 1.0, done)
        done += 1

    for _ in range(WARMUP_STEPS):
        step()
    step_s = seconds(step, setting.device, setting.n_steps)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if setting.device.type == "cuda":
        peak_mib = torch.cuda.max_memory_allocated() / 2**20
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    events = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    region_ms = {name: events.get(PREFIX + name, 0.0) / 3e3 for name in REGIONS}
    product_s, bytes_s = limits(setting, bank.learners[0].weights.product_FD, batches[0])
    limit_s = max(product_s, bytes_s) * setting.n_variants
    return {
        "ms per step": step_s * 1e3,
        "variant-tokens/s": setting.n_tokens * setting.n_variants / step_s,
        "step / product": step_s / product_s / setting.n_variants,
        "limit: product, ms": product_s * setting.n_variants * 1e3,
        "limit: bytes, ms": bytes_s * setting.n_variants * 1e3,
        "share of the limit": limit_s / step_s,
        "peak MiB": peak_mib,
        **{f"{name}, ms": spent for name, spent in region_ms.items() if spent},
    }


def limits(setting: Setting, w_enc_FD: Tensor, x_TD: Tensor) -> tuple[float, float]:
    """Measure the seconds of the dense product alone, and of the bytes a step must move, per variant."""
    x_TD, w_enc_FD = x_TD.to(setting.dtype), w_enc_FD.to(setting.dtype)
    rows = min(1024, setting.n_tokens)
    out = torch.empty(rows, setting.n_latents, dtype=setting.dtype, device=setting.device)
    product_s = seconds(lambda: torch.mm(x_TD[:rows], w_enc_FD.T, out=out), setting.device, 7)
    source = torch.zeros(1 << 26, device=setting.device)
    target = torch.ones_like(source)
    copy_s = seconds(lambda: target.copy_(source), setting.device, 7)
    bytes_per_s = 2 * source.nbytes / copy_s
    n_bytes = 28 * 2 * setting.d * setting.n_latents + 16 * 2 * setting.n_tokens * setting.k * setting.d
    return product_s * setting.n_tokens / rows, n_bytes / bytes_per_s


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--latents", type=numbers, default=[6144, 24576])
    parser.add_argument("--k", type=numbers, default=[32])
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--dead-share", type=float, default=0.0, help="of latents that AuxK works on")
    parser.add_argument("--tokens", type=int, default=4096, help="per batch")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--variants", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", default="auto", help="of the encoder's product: auto, fp32, bf16")
    parser.add_argument("--kernels", default="auto", help="torch, numba or triton")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--out", type=Path, help="a markdown file")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype, kernels = choose_product_dtype(args.precision, device), choose_kernels(args.kernels, device)
    settings = [
        Setting(
            n_threads=threads, n_latents=latents, k=k, dead_share=args.dead_share, n_tokens=args.tokens,
            d=args.d, n_variants=args.variants, dtype=dtype, device=device, n_steps=args.steps,
            kernels=kernels,
        )
        for threads in args.threads for latents in args.latents for k in args.k
    ]  # fmt: skip
    # A process of its own for each, so that peak memory is its own.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        results = list(pool.map(measure, settings))
    titles = [f"F {s.n_latents}, k {s.k}, {s.n_threads} threads" for s in settings]
    columns = dict(zip(titles, results, strict=True))
    what = f"T {args.tokens}, D {args.d}, {args.variants} variants, {dtype}, {kernels}"
    text = f"{machine()}\n\n{what}\n\n{table(columns)}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


def table(columns: dict[str, dict[str, float]]) -> str:
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for row in rows:
        cells = [
            f"{column[row]:,.{2 if column[row] < 10 else 0}f}" if row in column else ""
            for column in columns.values()
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
