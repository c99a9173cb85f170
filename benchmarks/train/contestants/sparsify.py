"""sparsify (EleutherAI, package eai-sparsify): its own `Trainer.fit`, with a model that replays rows.

sparsify trains on activations caught by a hook while a model runs. Here the model is one identity
module that puts out the next batch: everything else, from the hook to the optimizer, is sparsify's.

Recipe: its defaults (signum with schedule-free averaging, lr 5e-3/√(F/2^14); for adam 2e-4/√(F/2^14)
with a linear decay to 0), AuxK off. Two things differ. Adam's warm-up of 1,000 steps becomes a 20th of
the run. With --dead-share AuxK is on at 1/32, its customary weight, as the default of 0 skips it.

Speed: on a CPU sparsify computes in float32, as its bf16 autocast is for "cuda" alone; --autocast puts
a CPU autocast around `fit`, which its code allows but does not offer. Several SAEs that differ in k or
lr need a training each: only initial seeds can share one.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn

from benchmarks.train.contestants.feed import SHRINK, Contestant, Feed, Reconstruct, main, parser


class Replay(nn.Module):
    """A model whose only module puts out the feed's rows."""

    config = SimpleNamespace(num_hidden_layers=1)

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.site = nn.Identity()
        self.empty = torch.zeros(1, 1, width, device=device)
        self.feed: Feed | None = None

    @property
    def base_model(self) -> "Replay":
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.empty if self.feed is None else next(self.feed)[None])


class Sparsify(Contestant):
    packages = ("eai-sparsify", "schedulefree")

    def train(self, feed: Feed) -> None:
        args, (goal,) = self.args, self.goals
        coder = SparseCoderConfig(num_latents=self.latents, k=goal.k)
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                coder,
                batch_size=1,
                optimizer=args.optimizer,
                lr=goal.lr if args.optimizer == "adam" else None,
                lr_warmup_steps=self.short_warmup,
                auxk_alpha=1 / 32 if len(self.dead) else 0.0,
                hookpoints=["site"],
                init_seeds=[args.seed],
                save_dir=folder,
                log_to_wandb=False,
            )
            model = Replay(self.d, args.device)
            ids = [{"input_ids": torch.zeros(args.batch, dtype=torch.int64)}] * args.steps
            self.trainer = Trainer(config, ids, model)
            self.sae = self.trainer.saes["site"]
            self.sae.register_forward_hook(self._note_auxk)
            model.feed = feed
            with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
                self.trainer.fit()
        if args.save:
            with self.saes():
                self.sae.save_to_disk(args.save / "0")

    def _note_auxk(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.last_auxk = output.auxk_loss.detach()

    @contextmanager
    def saes(self) -> Iterator[list[Reconstruct]]:
        averaged = [opt for opt in self.trainer.optimizers if hasattr(opt, "train_mode")]
        for optimizer in averaged:
            optimizer.eval()  # as its checkpoints do: the averaged weights
        yield [self._reconstruct]
        for optimizer in averaged:
            optimizer.train()

    def _reconstruct(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.sae.encode(x_TD)
        return self.sae.decode(encoded.top_acts, encoded.top_indices), (encoded.top_acts > 0).sum(1)

    def keep_dead(self, first: bool) -> None:
        if first:
            self.sae.encoder.weight[self.dead] *= SHRINK
        self.trainer.num_tokens_since_fired["site"][self.dead] = 10_000_001

    def auxk(self) -> list[float]:
        return [float(self.last_auxk)]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--optimizer", choices=["signum", "adam"], default="signum")
    options.add_argument("--autocast", action="store_true", help="bf16 autocast around its loop")
    main(Sparsify, options.parse_args())
