"""What a second process brings, for each way of spreading: efficiency, waiting for data, traffic.

    python -m benchmarks.scale.processes --acts demo-run/acts --site layers.2 [-o FILE.md]

Every process has one thread. Efficiency is t₁ / (n · tₙ), t being the median time of a step over the
same variants. The settings take turns, round after round. Traffic is what one process takes in per
step, counted at torch's collectives (an all-reduce as a ring's 2·(n − 1)/n of the tensor), beside the
formula of docs/scaling.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.report import machine
from saemill.common import world
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import World
from saemill.train.backends.choose import choose_product_dtype, make_backend
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.stream.epochs import open_epochs
from saemill.train.stream.scaling import scaling_of
from saemill.train.sweep.placement import choose
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import auto_lr

WARMUP_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """One setting of n processes: how variants, latents and tokens are spread over them."""

    name: str
    n_processes: int
    n_variants: int
    data_ranks: int
    latent_ranks: int


def settings(args: argparse.Namespace) -> list[tuple[Setting, Setting]]:
    """List each setting beside one process with the same variants."""
    pairs = []
    for n in args.processes:
        for name, n_variants, data, latents in (
            ("variants dealt", args.many, 1, 1),
            ("latents split", args.few, 1, n),
            ("tokens split", args.few, n, 1),
        ):
            pairs.append((Setting(name, n, n_variants, data, latents), Setting(name, 1, n_variants, 1, 1)))
    return pairs


class Traffic:
    """Counts what this process takes in, by wrapping torch's collectives."""

    def __init__(self) -> None:
        self.n_bytes = 0.0
        reduce, gather = dist.all_reduce, world.gather_rows

        def counted_reduce(x: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
            n = dist.get_world_size(group)
            self.n_bytes += 2 * (n - 1) / n * x.nbytes
            return reduce(x, *args, group=group, **options)

        def counted_gather(out: Tensor, x: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
            n = dist.get_world_size(group)
            self.n_bytes += (n - 1) / n * out.nbytes
            return gather(out, x, *args, group=group, **options)

        dist.all_reduce, world.gather_rows = counted_reduce, counted_gather


@torch.no_grad()
def work(args: argparse.Namespace, setting: Setting) -> None:
    """Train and measure in one process; the first writes the result."""
    torch.set_num_threads(1)
    here, traffic = World.here(), Traffic()
    store = ActivationStore(args.acts)
    d = store.site(args.site).width
    lr = auto_lr(args.latents, d, 1000)
    variants = [
        Variant(name=f"v{i}", site=args.site, k=args.k, num_latents=args.latents, lr=lr, seed=i, k_aux=d // 2)
        for i in range(setting.n_variants)
    ]
    loader = open_epochs(
        store, [args.site], store.mask, batch_tokens=args.batch, buffer_tokens=65_536, seed=0
    )
    with here.connected(torch.device("cpu")) as everyone, closing(loader):
        placement = choose(variants, {args.site: d}, everyone.size, setting.data_ranks, setting.latent_ranks)
        cpu = torch.device("cpu")
        backend = make_backend("numba", choose_product_dtype("auto", cpu), placement.team_of(everyone))
        own_variants = placement.teams[everyone.rank // placement.team_size]
        scaling = scaling_of(loader.rows, args.site, cpu)
        sample = scaling.standardise(loader.batch(0)[args.site])
        learners = [Learner(variant, scaling, backend, sample, 10**9) for variant in own_variants]
        bank = Bank(args.site, scaling, backend, learners)
        steps, waits, n_bytes = [], [], 0.0
        for i in range(WARMUP_STEPS + args.steps):
            before, start = traffic.n_bytes, time.perf_counter()
            stored_TD = loader.batch(i)[args.site]
            waits.append(time.perf_counter() - start)
            bank.step(stored_TD, 1.0, i)
            everyone.barrier()
            steps.append(time.perf_counter() - start)
            n_bytes = traffic.n_bytes - before
        result = {
            "step_s": statistics.median(steps[WARMUP_STEPS:]),
            "wait_s": statistics.median(waits[WARMUP_STEPS:]),
            "bytes": n_bytes,
            "d": d,
        }
        if everyone.rank == 0:
            Path(args.result).write_text(json.dumps(result))


def run(args: argparse.Namespace, setting: Setting) -> dict[str, float]:
    """Measure one setting in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "found.json"
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        numbers = (setting.n_processes, setting.n_variants, setting.data_ranks, setting.latent_ranks)
        options = [
            f"--{name}={getattr(args, name)}" for name in ("acts", "site", "latents", "k", "batch", "steps")
        ]
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", *rendezvous,
                "--nproc-per-node", str(setting.n_processes), "-m", "benchmarks.scale.processes",
                *options, "--way", ",".join(map(str, numbers)), "--result", str(result_file),
            ],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        result: dict[str, float] = json.loads(result_file.read_text())
        return result


def formula(args: argparse.Namespace, setting: Setting, d: int) -> float:
    """Compute the bytes that one process takes in per step."""
    n_tokens, k = args.batch, args.k
    n, of_tokens, of_latents = setting.n_variants, setting.data_ranks, setting.latent_ranks
    error_bytes = choose_product_dtype("auto", torch.device("cpu")).itemsize
    exchanged = (of_tokens - 1) / of_tokens * n_tokens * (error_bytes * d + 16 * k)
    candidates = (of_latents - 1) * n_tokens * 4 * k
    summed = 2 * (of_latents - 1) / of_latents * 4 * n_tokens * d
    return n * (exchanged + (candidates + summed) / of_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acts", type=Path, required=True, help="an activation store")
    parser.add_argument("--site", required=True, help="a site of it")
    parser.add_argument("--latents", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--many", type=int, default=8, help="variants that are dealt")
    parser.add_argument("--few", type=int, default=1, help="variants whose latents or tokens are split")
    parser.add_argument("--processes", type=lambda text: [int(n) for n in text.split(",")], default=[2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        n_processes, n_variants, data, latents = map(int, args.way.split(","))
        work(args, Setting("", n_processes, n_variants, data, latents))
        return
    text = table(args)
    print(text)
    if args.out:
        args.out.write_text(text)


def table(args: argparse.Namespace) -> str:
    """Measure all settings, in turns, and render them as Markdown."""
    pairs = settings(args)
    results: dict[Setting, list[dict[str, float]]] = {setting: [] for pair in pairs for setting in pair}
    for _ in range(args.rounds):
        for setting in results:
            results[setting].append(run(args, setting))
    lines = [
        machine(),
        "",
        f"{args.site}, F {args.latents}, k {args.k}, T {args.batch}, one thread per process, "
        f"{args.rounds} rounds of {args.steps} steps",
        "",
        "| way | processes | variants | ms per step | of one process | efficiency | waiting for data "
        "| MiB taken in per step | by formula |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for setting, alone in pairs:
        step_s, alone_s = (statistics.median(r["step_s"] for r in results[w]) for w in (setting, alone))
        wait_s = statistics.median(r["wait_s"] for r in results[setting])
        last = results[setting][-1]
        expected = formula(args, setting, int(last["d"]))
        lines.append(
            f"| {setting.name} | {setting.n_processes} | {setting.n_variants} "
            f"| {step_s * 1e3:,.0f} | {alone_s * 1e3:,.0f} "
            f"| {alone_s / step_s / setting.n_processes:.0%} | {wait_s / step_s:.1%} "
            f"| {last['bytes'] / 2**20:.2f} | {expected / 2**20:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
