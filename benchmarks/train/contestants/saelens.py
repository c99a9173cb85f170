"""SAELens: its own `SAETrainer.fit`, and `MultiSAETrainer.fit` for several SAEs, over a data provider.

Recipe: its defaults (Adam, lr 3e-4, constant, no warm-up; AuxK at 1.0; gradients clipped to 1; decoder
rows start at length 0.1). b_dec starts at 0, and no option of SAELens 6 changes that; --b-dec mean sets
it by hand before training, as a user can, for data with a large mean.

Speed: float32 by default; --autocast is its own bf16 option; --sparse its own `use_sparse_activations`,
which needs `rescale_acts_by_decoder_norm` off (its default, on, has no backward pass for sparse
activations on a CPU). Several SAEs share the batches but not the work, and all of them have one lr.
"""

from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.train.contestants.feed import SHRINK, Contestant, Feed, Reconstruct, main, parser


class SaeLens(Contestant):
    packages = ("sae-lens",)

    def train(self, feed: Feed) -> None:
        rates = {goal.lr for goal in self.goals}
        if len(rates) > 1:
            raise SystemExit("SAELens trains SAEs together at one lr only")
        (lr,) = rates
        args, lr = self.args, lr or SAETrainerConfig.lr
        self.last_auxk = [0.0] * len(self.goals)
        self.coders = [self._sae(number, goal.k) for number, goal in enumerate(self.goals)]
        config = SAETrainerConfig(
            total_training_samples=args.steps * args.batch,
            train_batch_size_samples=args.batch,
            device=args.device,
            autocast=args.autocast,
            lr=lr,
            lr_end=lr / 10,  # asserted though unused; only its model runner sets it, to this
        )
        if len(self.coders) == 1:
            trainer = SAETrainer(config, self.coders[0], feed)
            self.trainers = [trainer]
        else:
            saes = {str(i): sae for i, sae in enumerate(self.coders)}
            batches = ({"x": x_TD} for x_TD in feed)
            trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, "x"), batches)
            self.trainers = list(trainer.trainers.values())
        trainer.fit()

    def _sae(self, number: int, k: int) -> TopKTrainingSAE:
        args = self.args
        config = TopKTrainingSAEConfig(
            d_in=self.d,
            d_sae=self.latents,
            k=k,
            device=args.device,
            use_sparse_activations=args.sparse,
            rescale_acts_by_decoder_norm=not args.sparse,
        )
        sae = TopKTrainingSAE(config)
        if args.b_dec == "mean":
            sae.b_dec.data.copy_(self.mean_D)
        forward = sae.training_forward_pass

        def noting_auxk(step_input: Any) -> Any:
            output = forward(step_input)
            self.last_auxk[number] = output.losses["auxiliary_reconstruction_loss"].detach()
            return output

        if len(self.dead):
            sae.training_forward_pass = noting_auxk
        return sae

    def reconstructions(self) -> list[Reconstruct]:
        return [self._reconstruct(sae) for sae in self.coders]

    def _reconstruct(self, sae: TopKTrainingSAE) -> Reconstruct:
        def reconstruct(x_TD: torch.Tensor) -> torch.Tensor:
            return sae.decode(sae.encode(x_TD))

        return reconstruct

    def keep_dead(self, first: bool) -> None:
        for sae, trainer in zip(self.coders, self.trainers, strict=True):
            if first:
                sae.W_enc[:, self.dead] *= SHRINK
            trainer.n_forward_passes_since_fired[self.dead] = trainer.cfg.dead_feature_window + 1

    def auxk(self) -> list[float]:
        return [float(value) for value in self.last_auxk]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--autocast", action="store_true", help="its bf16 autocast")
    options.add_argument("--sparse", action="store_true", help="its use_sparse_activations")
    options.add_argument("--b-dec", choices=["zero", "mean"], default="zero")
    main(SaeLens, options.parse_args())
