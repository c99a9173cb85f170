"""dictionary_learning: its own `trainSAE` with its trainers, over an iterator of batches.

Recipe: its defaults (Adam; with a k lr 2e-4/√(F/2^14), AuxK at 1/32, gradients clipped to 1, b_dec starts at
the geometric median of the first batch; JumpReLU lr 7e-5, Standard 1e-3, Gated 5e-5; no decay). --demo is its
demo's: `normalize_activations`, lr 3e-4, a linear decay over the last fifth. Numbers of steps that a run as
short as these does not have become shares of it: the rate's warm-up (1,000) a 20th, the penalty's (2,000) a
10th. The threshold of BatchTopK and Matryoshka (from step 1,000 on) begins with the last fifth where SAEs are
saved, since its average over about 1,000 steps would else hold that of early weights, and at once where
steps are timed, since a long run has it in nearly every step.

ReLU is `StandardTrainerAprilUpdate`, whose decoder rows are free.

Speed: `trainSAE` takes an autocast type, but on a CPU drops the autocast; --dtype bf16 is for a GPU.
Several SAEs of any kind can be trained in one call; they share the batches but not the work.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.contestants.feed import (
    PREFIX_SHARES,
    SHRINK,
    Contestant,
    Feed,
    Goal,
    Reconstruct,
    main,
    parser,
    passed_by,
    read_batch,
)

# The package imports nnsight, and with it much else, for buffers over models, which are not used here.
sys.modules["nnsight"] = ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402

TRAINERS = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "relu": StandardTrainerAprilUpdate,
    "gated": GatedSAETrainer,
}
LEVELS = {"jumprelu": "target_l0", "relu": "l1_penalty", "gated": "l1_penalty"}
"""What decides how many latents are active; k in the others."""
DEMO_LR = 3e-4
NORM_BATCHES = 100
"""From which `normalize_activations` finds the norm."""


class Batches:
    """The training batches; before them, where the norm is asked for first, some of them for that."""

    def __init__(self, feed: Feed, contestant: Contestant, norm_first: bool) -> None:
        self.feed, self.args, self.norm_first = feed, contestant.args, norm_first

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over what is asked for now."""
        if not self.norm_first:
            return iter(self.feed)
        self.norm_first = False
        path, n_batches = self.args.data / "train.npy", min(NORM_BATCHES, self.args.steps)
        return (read_batch(path, i, self.args.batch).to(self.args.device) for i in range(n_batches))


class DictionaryLearning(Contestant):
    packages = ("dictionary-learning",)

    def train(self, feed: Feed) -> None:
        args = self.args
        self.trainers: list[Any] = []
        configs = [{"trainer": self._trainer} | self._config(goal) for goal in self.goals]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        trainSAE(
            Batches(feed, self, args.demo),
            configs,
            args.steps,
            save_dir=str(args.save) if args.save else None,
            normalize_activations=args.demo,
            device=args.device,
            autocast_dtype=dtype,
        )

    def _config(self, goal: Goal) -> dict[str, Any]:
        args, lr = self.args, goal.lr or (DEMO_LR if self.args.demo else None)
        config = {
            "goal": goal,
            "steps": args.steps,
            "activation_dim": self.d,
            "dict_size": self.latents,
            "warmup_steps": self.short_warmup,
            "layer": 0,
            "lm_name": "none",
            "seed": args.seed,
            "device": args.device,
        }
        config |= {"lr": lr} if lr else {}
        config |= {"decay_start": round(0.8 * args.steps)} if args.demo else {}
        if goal.member in LEVELS:
            warmup = min(2000, args.steps // 10)
            return config | {LEVELS[goal.member]: goal.level, "sparsity_warmup_steps": warmup}
        config["k"] = goal.k
        if goal.member != "topk":
            config["threshold_start_step"] = min(1000, round(0.8 * args.steps)) if args.save else 0
        if goal.member == "matryoshka":
            config["group_fractions"] = [end - start for start, end in pairwise((0, *PREFIX_SHARES))]
        return config

    def _trainer(self, goal: Goal, **config: Any) -> Any:
        trainer = TRAINERS[goal.member](**config)
        if self.args.start_l0 and goal.member in LEVELS:
            self._start(goal.member, trainer.ae, self.args.start_l0)
        self.trainers.append(trainer)
        return trainer

    @torch.no_grad()
    def _start(self, member: str, ae: Any, n_active: float) -> None:
        """Let a penalty's latents start with so many of them active."""
        if self.args.demo:
            raise SystemExit("--start-l0 is for activations as they are, which --demo normalises")
        x_TD = self.first_rows()
        if member == "jumprelu":
            ae.threshold.fill_(passed_by(x_TD @ ae.W_enc + ae.b_enc, n_active))
        elif member == "relu":
            ae.encoder.bias.sub_(passed_by(ae.encoder(x_TD - ae.bias), n_active))
        else:
            ae.gate_bias.sub_(passed_by(ae.encoder(x_TD - ae.decoder_bias) + ae.gate_bias, n_active))

    def reconstructions(self) -> list[Reconstruct]:
        return [self._reconstruct(trainer.ae) for trainer in self.trainers]

    def _reconstruct(self, ae: Any) -> Reconstruct:
        def reconstruct(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            reconstruction_TD, codes_TF = ae(x_TD, output_features=True)
            return reconstruction_TD, (codes_TF > 0).sum(1)

        return reconstruct

    def keep_dead(self, first: bool) -> None:
        for trainer in self.trainers:
            if first:
                trainer.ae.encoder.weight[self.dead] *= SHRINK
            trainer.num_tokens_since_fired[self.dead] = trainer.dead_feature_threshold

    def auxk(self) -> list[float]:
        found = (getattr(trainer, "pre_norm_auxk_loss", 0.0) for trainer in self.trainers)
        return [float(torch.as_tensor(loss).detach()) for loss in found]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options.add_argument("--demo", action="store_true", help="the recipe of its demo")
    main(DictionaryLearning, options.parse_args())
