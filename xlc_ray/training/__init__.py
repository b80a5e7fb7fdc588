"""One rank's training: the loop, schedules, the optimizer's step, metrics. No cluster here."""

from xlc_ray.training.learner import Diverged, Learner
from xlc_ray.training.loop import prepare, train_alone, train_rank

__all__ = ["Diverged", "Learner", "prepare", "train_alone", "train_rank"]
