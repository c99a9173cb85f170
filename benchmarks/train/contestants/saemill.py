"""saemill: a `Bank` stepped as `train/trainer.py` does; the default recipe. It saves none."""

from typing import Any

import torch

from benchmarks.train.contestants.feed import (
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
from saemill.common.sae.sae import Sae
from saemill.train.backends.choose import choose_kernels, choose_product_dtype, make_backend
from saemill.train.build import SAMPLE_TOKENS
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.outlook import MOST_DEAD_AFTER_TOKENS
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.schedule import Schedule
from saemill.train.sweep.variants import resolve

LEVELS = {"jumprelu": "target_l0", "relu": "l1_coefficient", "gated": "l1_coefficient"}
"""What decides how many latents are active; k in the others."""


class Saemill(Contestant):
    packages = ("saemill",)

    def train(self, feed: Feed) -> None:
        if self.args.save:
            raise SystemExit("saemill's SAEs are saved by `saemill train`")
        args, n_steps = self.args, self.args.steps
        entries = tuple(self._entry(i, goal) for i, goal in enumerate(self.goals))
        variants = resolve({}, {}, entries, {"x": self.d}, n_steps)
        # The cached statistics of the site, which an activation store has.
        device = torch.device(args.device)
        scaling = Scaling(self.mean_D.to(device), (self.d / self.variance) ** 0.5)
        sample_TD = scaling.standardise(read_batch(args.data / "train.npy", 0, SAMPLE_TOKENS).to(device))
        backend = make_backend(choose_kernels("auto", device), choose_product_dtype(args.dtype, device))
        dead_after = args.dead_after or min(MOST_DEAD_AFTER_TOKENS, n_steps * args.batch // 10)
        with torch.no_grad():
            learners = [Learner(variant, scaling, backend, sample_TD, dead_after) for variant in variants]
            if args.start_l0:
                x_TD = scaling.standardise(self.first_rows())
                for learner in learners:
                    self._start(learner, x_TD, args.start_l0)
            self.bank = Bank("x", scaling, backend, learners)
            schedule = Schedule(n_steps, self.short_warmup, "linear", round(0.2 * n_steps))
            for step, x_TD in enumerate(feed):
                self.bank.step(x_TD, schedule.factor(step), step)

    def _entry(self, number: int, goal: Goal) -> dict[str, Any]:
        level = goal.k if goal.level == goal.k else goal.level
        return {
            "name": str(number),
            "site": "x",
            "architecture": goal.member,
            LEVELS.get(goal.member, "k"): level,
            "num_latents": self.latents,
            "lr": goal.lr or "auto",
        }

    def _start(self, learner: Learner, x_TD: torch.Tensor, n_active: float) -> None:
        """Let a penalty's latents start with so many of them active. JumpReLU starts at its target anyway."""
        if learner.variant.architecture in ("relu", "gated"):
            p = learner.parameters
            pre_TF = torch.addmm(p.b_enc_F, x_TD - p.b_D, p.w_enc_FD.T)
            p.b_enc_F.sub_(passed_by(pre_TF, n_active))
            learner.weights.refresh()

    def reconstructions(self) -> list[Reconstruct]:
        exported = [learner.export({}) for learner in self.bank.learners]
        return [self._reconstruct(Sae.of(parts)) for parts in exported if parts is not None]

    def _reconstruct(self, sae: Sae) -> Reconstruct:
        def reconstruct(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output = sae(x_TD)
            return output.reconstruction, (output.top_acts > 0).sum(1)

        return reconstruct

    def keep_dead(self, first: bool) -> None:
        for learner in self.bank.learners:
            if first:
                learner.parameters.w_enc_FD[self.dead] *= SHRINK
                learner.weights.refresh()
            learner.idle_tokens_F[self.dead] = learner.dead_after_tokens + 1

    def auxk(self) -> list[float]:
        return [learner.totals.pop()["auxk"] for learner in self.bank.learners]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--dtype", default="auto", help="of the encoder's product: auto, fp32 or bf16")
    options.add_argument("--dead-after", type=int, help="tokens; by default the recipe's 10th of the run")
    main(Saemill, options.parse_args())
