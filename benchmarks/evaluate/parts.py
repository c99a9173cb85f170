"""An assessment by its parts, beside what each rests on, all measured in one run by one thread.

    python -m benchmarks.evaluate.parts RUN [--tokens 32768] [--rounds 3] [-o FILE.md]

RUN is a finished run of SAEs with a k at one site, whose activations and model are where it has them.
Reconstruction, per SAE, beside the encoder of training alone: codes of the same batches by the CPU's backend.
A pass with its losses, one for each SAE and one of the untouched model, beside the model's own forward pass
from the first block to the logits. Seconds are of the CPU, medians of rounds that take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import machine, table
from saemill.assess.config import AssessConfig
from saemill.assess.evalset import EvalSet
from saemill.assess.inputs import open_models, open_run, open_tokens
from saemill.assess.measure import site_of
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.splicing import Splicing
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.sae.sae import Sae
from saemill.common.world import World
from saemill.train.backends.choose import choose_kernels, choose_product_dtype, make_backend
from saemill.train.backends.codes import Largest
from saemill.train.backends.parameters import Shape

CPU = torch.device("cpu")


def encode(sae: Sae, batches: list[Tensor]) -> Callable[[], None]:
    """Prepare what training's encoder does with some batches: the product and the choice of k codes."""
    backend = make_backend(choose_kernels("auto", CPU), choose_product_dtype("auto", CPU))
    n_latents, d = sae.W_enc.shape
    weights = backend.weights(Shape(n_latents, d, d), CPU)
    weights.parameters.w_enc_FD.copy_(sae.W_enc.detach())
    weights.parameters.w_dec_FD.copy_(sae.W_dec.detach())
    weights.refresh()

    def work() -> None:
        for x_TD in batches:
            backend.largest(backend.prepare(x_TD), weights, backend.bias(weights), Largest(sae.config.k))  # type: ignore[attr-defined]

    return work


def forward(model: LanguageModel, evalset: EvalSet, n_tokens: int) -> Callable[[], None]:
    """Prepare the model's own passes over the rows that are spliced."""
    rows = [rows.ids_RS for rows in evalset.rows(n_tokens)]

    def work() -> None:
        for ids_RS in rows:
            model.logits(ids_RS, attention_of(ids_RS, evalset.tokens.tokenizer))

    return work


def microseconds(work: Callable[[], object], n_tokens: int) -> float:
    """Measure the CPU time per token."""
    start = time.process_time()
    with torch.inference_mode():
        work()
    return 1e6 * (time.process_time() - start) / n_tokens


def measure(args: argparse.Namespace) -> list[list[str]]:
    """Time all parts of one variant, in turns; a row for each pair of them."""
    torch.set_num_threads(1)
    config = AssessConfig(run=args.run, device="cpu", batch_size=8)
    trained = open_run(config, CPU)
    other = open_tokens(config, trained)
    models, _ = open_models(config, trained, other, CPU)
    with World.here().connected(CPU) as everyone:
        evalset = EvalSet(trained.store, other, models[0], trained.mask, trained.sites, 8, everyone)
        saes = {name: sae for name, sae in trained.saes.items() if sae.config.k}
        sites = {name: site_of(sae) for name, sae in saes.items()}
        (site,) = set(sites.values())
        chunks = list(evalset.chunks(args.tokens))
        batches = list(torch.split(torch.cat([chunk.x[site].float() for chunk in chunks]), 4096))
        known = Splicing({}, {}, evalset, models, None).run(8 * evalset.tokens.ctx_len)
        work = {
            "reconstruct": lambda: Reconstruction(saes, sites, evalset).run(chunks),
            "encode": lambda: [encoder() for encoder in encoders],
            "splice": lambda: Splicing(saes, sites, evalset, models, None, known).run(args.tokens),
            "forward": forward(models[0], evalset, args.tokens),
        }
        encoders = [encode(sae, batches) for sae in saes.values()]
        n_read = len(saes) * sum(map(len, batches))
        n_passed = sum(rows.ids_RS.numel() for rows in evalset.rows(args.tokens))
        n_tokens = {"reconstruct": n_read, "encode": n_read, "forward": n_passed}
        n_tokens["splice"] = n_passed * (len(saes) + 1)
        turns = [
            {what: microseconds(do, n_tokens[what]) for what, do in work.items()} for _ in range(args.rounds)
        ]
    f = ", ".join(f"{n:,}" for n in sorted({sae.config.num_latents for sae in saes.values()}))
    return [
        pair(turns, "reconstruct", "encode", f"reconstruction by an SAE of {f} latents; training's encoder"),
        pair(turns, "splice", "forward", "a pass with its losses; the model's own"),
    ]


def pair(turns: list[dict[str, float]], part: str, beside: str, title: str) -> list[str]:
    """Render a part, what it rests on, and the quotient of each round."""
    quotients = sorted(turn[part] / turn[beside] for turn in turns)
    values = [statistics.median(turn[what] for turn in turns) for what in (part, beside)]
    shown = f"{statistics.median(quotients):.2f} ({quotients[0]:.2f}–{quotients[-1]:.2f})"
    return [title, *(f"{value:.1f}" for value in values), shown]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, help="a markdown file")
    args = parser.parse_args()
    rows = measure(args)
    head = ["part", "µs per token", "µs of what it rests on", "quotient (range)"]
    text = "\n".join([machine(), "", *table(head, rows, 1)])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
