"""saemill: a `Bank` stepped as `train/trainer.py` does; the default recipe."""

import torch

from benchmarks.train.contestants.feed import SHRINK, Contestant, Feed, Reconstruct, main, parser, read_batch
from saemill.common.sae.sae import Sae
from saemill.train.backends.choose import choose_kernels, make_backend
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.run import MOST_DEAD_AFTER_TOKENS, SAMPLE_TOKENS, choose_product_dtype
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.schedule import Schedule
from saemill.train.sweep.variants import Variant, auto_lr


class Saemill(Contestant):
    packages = ("saemill",)

    def train(self, feed: Feed) -> None:
        args, n_steps = self.args, self.args.steps
        variants = [
            Variant(
                name=str(i),
                site="x",
                k=goal.k,
                num_latents=self.latents,
                lr=goal.lr or auto_lr(self.latents, self.d, n_steps),
                k_aux=self.d // 2,
            )
            for i, goal in enumerate(self.goals)
        ]
        # The cached statistics of the site, which an activation store has.
        device = torch.device(args.device)
        scaling = Scaling(self.mean_D.to(device), (self.d / self.variance) ** 0.5)
        sample_TD = scaling.standardise(read_batch(args.data / "train.npy", 0, SAMPLE_TOKENS).to(device))
        backend = make_backend(choose_kernels("auto", device), choose_product_dtype(args.dtype, device))
        dead_after = args.dead_after or min(MOST_DEAD_AFTER_TOKENS, n_steps * args.batch // 10)
        with torch.no_grad():
            learners = [Learner(variant, scaling, backend, sample_TD, dead_after) for variant in variants]
            self.bank = Bank("x", scaling, backend, learners)
            schedule = Schedule(n_steps, self.short_warmup, "linear", round(0.2 * n_steps))
            for step, x_TD in enumerate(feed):
                self.bank.step(x_TD, schedule.factor(step), step)

    def reconstructions(self) -> list[Reconstruct]:
        exported = [learner.export({}) for learner in self.bank.learners]
        saes = [Sae.of(parts) for parts in exported if parts is not None]
        return [lambda x_TD, sae=sae: sae(x_TD).reconstruction for sae in saes]

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
