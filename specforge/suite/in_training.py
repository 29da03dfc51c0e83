"""A suite scored while its model is being trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedModel

from specforge.features.target import Target
from specforge.log.progress import progress
from specforge.suite.bundle import Task
from specforge.suite.evaluate import Evaluation, Manner
from specforge.suite.scoring import Model


@dataclass(frozen=True)
class SuiteInTraining:
    """Called after each optimiser step with a model that every rank holds whole; the second evaluation makes no tokens and no batches."""

    evaluation: Evaluation
    tasks: Sequence[Task]
    manner: Manner
    every_steps: int

    def __call__(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """`suite/core` and `suite/LABEL` (centred accuracies) after every `every_steps`-th step, else nothing.

        The model is left as it was: in training mode, with the gradients that it had.
        """
        if step % self.every_steps:
            return {}
        trained, was_training = [parameter for parameter in model.parameters() if parameter.requires_grad], model.training
        try:
            with progress(None, description=f"suite after step {step}", world=self.evaluation.world) as bar:
                results = list(self.evaluation.results(Model(Target(model)), self.tasks, self.manner, bar))
        finally:
            model.train(was_training)
            for parameter in trained:
                parameter.requires_grad_(True)
        centred = {f"suite/{result.task.label}": result.numbers()["centred"] for result in results}
        return {"suite/core": fmean(centred.values()), **centred}
