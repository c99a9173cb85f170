"""Eight SAEs at once: saemill in one run, each peer in whatever way is fastest for it.

    python -m benchmarks.train.sweep --latents 6144 --k 16,32,64,128 --lr 2e-4,4e-4 -o DIR

dictionary_learning steps all of them on each batch in one call, SAELens those of one learning rate,
sparsify trains one at a time (`Entry.together` in `contest.py`). Reported: variant-tokens/s, which is
SAEs × tokens over the summed step times of the runs that are needed; peak memory is that of the
largest process. Runs take turns, round after round; those finished in DIR are not run again.
"""

import argparse
import json
from itertools import product
from typing import Any

from benchmarks.report import table
from benchmarks.settings import keep_settings
from benchmarks.train import contest, rows
from benchmarks.train.contest import Entry

Goal = tuple[str, str, str]
"""Architecture, level and lr of an SAE, as the contestants take them."""


def runs_of(entry: Entry, goals: list[Goal]) -> list[list[Goal]]:
    """Group the SAEs by process."""
    if entry.together == "all":
        return [goals]
    if entry.together == "lr":
        rates = dict.fromkeys(lr for _, _, lr in goals)
        return [[goal for goal in goals if goal[2] == lr] for lr in rates]
    return [[goal] for goal in goals]


def one_round(
    args: argparse.Namespace, entry: Entry, name: str, goals: list[Goal], **further: Any
) -> dict[str, Any]:
    """Run all variants of a contestant, one process after another; `further` are options of each."""
    results = []
    for number, group in enumerate(runs_of(entry, goals)):
        options = {"goals": ",".join(":".join(goal) for goal in group), "threads": args.threads}
        options |= {"steps": args.steps, "warmup": args.warmup} | further
        results.append(contest.run(args, entry, f"{name}-p{number}", options))
    rates = {
        key: len(goals) / sum(1 / result[key] for result in results)
        for key in ("tokens_per_s", "tokens_per_cpu_s")
    }
    peaks = {key: max(r[key] for r in results) for key in ("peak_rss_bytes", "cuda_peak_bytes")}
    l0 = [value for result in results for point in result["curve"][-1:] for value in point["l0"]]
    return results[0] | rates | peaks | {"runs": len(results), "l0": l0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contest.add_arguments(parser)
    rows.add_arguments(parser)
    parser.add_argument("--k", default="16,32,64,128")
    parser.add_argument("--lr", default="2e-4,4e-4")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    keep_settings(args)
    words = rows.make(args.out / "rows", args)
    entries = contest.chosen(args)
    goals = list(product(["topk"], args.k.split(","), args.lr.split(",")))
    by_contestant: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    for turn in range(args.rounds):
        for name, entry in entries.items():
            by_contestant[name].append(one_round(args, entry, f"{name}-r{turn}", goals))
    lines = [contest.machine(r for results in by_contestant.values() for r in results), ""]
    lines += [
        f"{len(goals)} SAEs of {args.latents:,} latents (k {args.k} × lr {args.lr}), {args.batch:,} tokens "
        f"per step, {args.threads} threads, {words}; {args.rounds} rounds of {args.steps} steps.",
        "",
    ]
    cells = []
    for name, results in by_contestant.items():
        cells.append([name, entries[name].setting, str(results[0]["runs"])])
        for key in ("tokens_per_s", "tokens_per_cpu_s"):
            cells[-1] += contest.rate_cells(results, by_contestant.get("saemill"), key)
        cells[-1].append(contest.memory_cell(results))
    head = ["contestant", "settings", "trainings", "variant-tokens/s", "of saemill's"]
    head += ["variant-tokens/CPU-s", "of saemill's"]
    lines += table([*head, "peak MiB of a process (after imports)"], cells)
    (args.out / "results.md").write_text("\n".join(lines))
    (args.out / "results.json").write_text(json.dumps(by_contestant))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
