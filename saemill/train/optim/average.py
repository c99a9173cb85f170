"""A moving average of the weights, which the SAE has after training in place of the last ones."""

from collections.abc import Mapping

from torch import Tensor

from saemill.train.memory import zeros


class WeightAverage:
    """Σ decay^age · weights over all steps, over the same sum of ones: young averages weigh all steps in.

    Args:
        parameters: by name, float32; read after every step.
        decay: share of the average that a step keeps.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: zeros(*p.shape, device=p.device) for name, p in parameters.items()}

    def add(self, n_steps: int) -> None:
        """Count the weights after step `n_steps`, from 1."""
        weight = (1 - self.decay) / (1 - self.decay**n_steps)
        for name, value in self.values.items():
            value.lerp_(self.parameters[name], weight)

    def forget(self, name: str, rows_S: Tensor) -> None:
        """Begin anew with rows that were replaced: what they were before counts no more."""
        self.values[name][rows_S] = self.parameters[name][rows_S]
