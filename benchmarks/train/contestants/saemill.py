"""saemill: a `Bank` stepped as `train/trainer.py` does; the default recipe."""

import torch

from benchmarks.train.contestants.feed import SHRINK, Contestant, Feed, Reconstruct, main, parser, read_batch
from saemill.train.learner.bank import Bank, Frame
from saemill.train.run import MOST_DEAD_AFTER_TOKENS, SAMPLE_TOKENS, choose_product_dtype
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
        frame = Frame(self.mean_D.to(args.device), (self.d / self.variance) ** 0.5)
        sample_TD = frame.enter(read_batch(args.data / "train.npy", 0, SAMPLE_TOKENS).to(args.device))
        dtype = choose_product_dtype(args.dtype, torch.device(args.device))
        dead_after = args.dead_after or min(MOST_DEAD_AFTER_TOKENS, n_steps * args.batch // 10)
        with torch.no_grad():
            self.bank = Bank(variants, frame, dtype, dead_after, sample_TD)
            schedule = Schedule(n_steps, self.short_warmup, "linear", round(0.2 * n_steps))
            for step, x_TD in enumerate(feed):
                self.bank.step(frame.enter(x_TD), schedule.factor(step), step)

    def reconstructions(self) -> list[Reconstruct]:
        saes = [self.bank.export(i, {}) for i in range(len(self.goals))]
        return [lambda x_TD, sae=sae: sae(x_TD).reconstruction for sae in saes]

    def keep_dead(self, first: bool) -> None:
        if first:
            self.bank.w_enc_VFD[:, self.dead] *= SHRINK
            self.bank.refresh_copies()
        self.bank.idle_tokens_VF[:, self.dead] = self.bank.dead_after_tokens + 1

    def auxk(self) -> list[float]:
        return [totals.take(self.d)["auxk"] for totals in self.bank.totals_V]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--dtype", default="auto", help="of the encoder's product: auto, fp32 or bf16")
    options.add_argument("--dead-after", type=int, help="tokens; by default the recipe's 10th of the run")
    main(Saemill, options.parse_args())
