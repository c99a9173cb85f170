"""SAELens: its own `SAETrainer.fit`, and `MultiSAETrainer.fit` for several SAEs, over a data provider.

Recipe: its defaults (Adam, lr 3e-4, constant, no warm-up; AuxK at 1.0 with a k; gradients clipped to 1;
decoder rows start at length 0.1; no warm-up of penalties). b_dec starts at 0, and no option of SAELens 6
changes that; --b-dec mean sets it by hand before training, as a user can, for data with a large mean.
--normalise is its own `expected_average_only_in`. --anthropic is what its options name as Anthropic's
setting of JumpReLU: the tanh penalty, which rises over the whole run, a bandwidth of 2, thresholds that start
at 0.1, straight-through gradients into the encoder too, and the pre-activation loss.

Speed: float32 by default; --autocast is its own bf16 option; --sparse its own `use_sparse_activations`,
which needs `rescale_acts_by_decoder_norm` off (its default, on, has no backward pass for sparse
activations on a CPU). Several SAEs share the batches but not the work, and all of them have one lr.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.train.contestants.feed import (
    SHRINK,
    Contestant,
    Feed,
    Goal,
    Reconstruct,
    main,
    parser,
    passed_by,
    prefixes,
    read_batch,
)

MEMBERS: dict[str, tuple[Any, Any]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
}
LEVELS = {"jumprelu": "l0_coefficient", "relu": "l1_coefficient", "gated": "l1_coefficient"}
"""What decides how many latents are active; k in the others."""
BIAS = {"jumprelu": "threshold", "relu": "b_enc", "gated": "b_gate"}
"""Name of what a pre-activation has to pass, or of what is added to it."""
NORM_BATCHES = 100
"""From which `expected_average_only_in` finds the norm; its default of 1,000 is more than some runs have."""


class SaeLens(Contestant):
    packages = ("sae-lens",)

    def train(self, feed: Feed) -> None:
        rates = {goal.lr for goal in self.goals}
        if len(rates) > 1:
            raise SystemExit("SAELens trains SAEs together at one lr only")
        (lr,) = rates
        args, lr = self.args, lr or SAETrainerConfig.lr
        self.last_auxk = [0.0] * len(self.goals)
        self.coders = [self._sae(number, goal) for number, goal in enumerate(self.goals)]
        config = SAETrainerConfig(
            total_training_samples=args.steps * args.batch,
            train_batch_size_samples=args.batch,
            device=args.device,
            autocast=args.autocast,
            lr=lr,
            lr_end=lr / 10,  # asserted though unused; only its model runner sets it, to this
            n_batches_for_norm_estimate=min(NORM_BATCHES, args.steps),
        )
        batches = chain(self._norm_batches(), feed) if args.normalise else feed
        if len(self.coders) == 1:
            trainer = SAETrainer(config, self.coders[0], batches)
            self.trainers = [trainer]
        else:
            saes = {str(i): sae for i, sae in enumerate(self.coders)}
            named = ({"x": x_TD} for x_TD in batches)
            trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, "x"), named)
            self.trainers = list(trainer.trainers.values())
        trainer.fit()
        if args.save:
            for number, sae in enumerate(self.coders):
                sae.save_inference_model(args.save / str(number))

    def _norm_batches(self) -> Iterator[Tensor]:
        path, args = self.args.data / "train.npy", self.args
        for i in range(min(NORM_BATCHES, args.steps)):
            yield read_batch(path, i, args.batch).to(args.device)

    def _sae(self, number: int, goal: Goal) -> Any:
        sae_class, config_class = MEMBERS[goal.member]
        normalise = "expected_average_only_in" if self.args.normalise else "none"
        shared = {"d_in": self.d, "d_sae": self.latents, "device": self.args.device}
        sae = sae_class(config_class(**shared, normalize_activations=normalise, **self._own(goal)))
        if self.args.b_dec == "mean":
            sae.b_dec.data.copy_(self.mean_D * self._scale())
        if self.args.start_l0 and goal.member in LEVELS:
            self._start(goal.member, sae, self.args.start_l0)
        if len(self.dead):
            self._note_auxk(sae, number)
        return sae

    def _own(self, goal: Goal) -> dict[str, Any]:
        """Return the settings of an architecture."""
        args = self.args
        if goal.member in LEVELS:
            own = {LEVELS[goal.member]: goal.level}
            return own | (self._anthropic() if goal.member == "jumprelu" and args.anthropic else {})
        own = {"use_sparse_activations": args.sparse, "rescale_acts_by_decoder_norm": not args.sparse}
        own["k"] = goal.k
        return own | ({"matryoshka_widths": prefixes(self.latents)} if goal.member == "matryoshka" else {})

    def _anthropic(self) -> dict[str, Any]:
        return {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 3e-6,
            "l0_warm_up_steps": self.args.steps,
        }

    def _scale(self) -> float:
        """Compute the factor on activations that `fit` will find."""
        if not self.args.normalise:
            return 1.0
        norms = [x_TD.norm(dim=1).mean() for x_TD in self._norm_batches()]
        return float(self.d**0.5 / torch.stack(norms).mean())

    @torch.no_grad()
    def _start(self, member: str, sae: Any, n_active: float) -> None:
        """Let a penalty's latents start with so many of them active."""
        bias_F = getattr(sae, BIAS[member])
        pre_TF = sae.process_sae_in(self.first_rows() * self._scale()) @ sae.W_enc
        if member == "jumprelu":
            bias_F.fill_(passed_by(pre_TF + sae.b_enc, n_active))
        else:
            bias_F.sub_(passed_by(pre_TF + bias_F, n_active))

    def _note_auxk(self, sae: Any, number: int) -> None:
        forward = sae.training_forward_pass

        def noting_auxk(step_input: Any) -> Any:
            output = forward(step_input)
            self.last_auxk[number] = output.losses["auxiliary_reconstruction_loss"].detach()
            return output

        sae.training_forward_pass = noting_auxk

    def reconstructions(self) -> list[Reconstruct]:
        return [self._reconstruct(sae) for sae in self.coders]

    def _reconstruct(self, sae: Any) -> Reconstruct:
        def reconstruct(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            codes_TF = sae.encode(x_TD)
            return sae.decode(codes_TF), (codes_TF.to_dense() > 0).sum(1)

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
    options.add_argument("--normalise", action="store_true", help="its expected_average_only_in")
    options.add_argument("--anthropic", action="store_true", help="JumpReLU in Anthropic's setting")
    main(SaeLens, options.parse_args())
