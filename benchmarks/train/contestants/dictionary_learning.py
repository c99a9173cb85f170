"""dictionary_learning: its own `trainSAE` with `TopKTrainer`, over an iterator of batches.

Recipe: its defaults (Adam, lr 2e-4/√(F/2^14), AuxK at 1/32, gradients clipped to 1, b_dec starts at the
geometric median of the first batch, no decay). Its warm-up of 1,000 steps becomes a 20th of the run.

Speed: `trainSAE` takes an autocast type, but on a CPU drops the autocast; --dtype bf16 is for a GPU.
Several SAEs of any k and lr can be trained in one call; they share the batches but not the work.
"""

import sys
from types import ModuleType
from typing import Any

import torch

from benchmarks.train.contestants.feed import SHRINK, Contestant, Feed, Reconstruct, main, parser

# The package imports nnsight, and with it much else, for buffers over models, which are not used here.
sys.modules["nnsight"] = ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]

from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402


class DictionaryLearning(Contestant):
    packages = ("dictionary-learning",)

    def train(self, feed: Feed) -> None:
        args = self.args
        self.trainers: list[TopKTrainer] = []
        shared = {
            "steps": args.steps,
            "activation_dim": self.d,
            "dict_size": self.latents,
            "warmup_steps": self.short_warmup,
            "layer": 0,
            "lm_name": "none",
            "seed": args.seed,
            "device": args.device,
        }
        configs = [{"trainer": self._trainer, "k": goal.k, "lr": goal.lr} | shared for goal in self.goals]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        trainSAE(feed, configs, args.steps, device=args.device, autocast_dtype=dtype)

    def _trainer(self, **config: Any) -> TopKTrainer:
        self.trainers.append(TopKTrainer(**config))
        return self.trainers[-1]

    def reconstructions(self) -> list[Reconstruct]:
        return [trainer.ae for trainer in self.trainers]

    def keep_dead(self, first: bool) -> None:
        for trainer in self.trainers:
            if first:
                trainer.ae.encoder.weight[self.dead] *= SHRINK
            trainer.num_tokens_since_fired[self.dead] = trainer.dead_feature_threshold

    def auxk(self) -> list[float]:
        return [float(torch.as_tensor(trainer.pre_norm_auxk_loss).detach()) for trainer in self.trainers]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    main(DictionaryLearning, options.parse_args())
