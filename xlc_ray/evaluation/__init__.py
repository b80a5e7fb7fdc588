"""What a trained dictionary is worth: reconstruction, the replacement model, and a report of both. No cluster here."""

from xlc_ray.evaluation.ablation import Effects
from xlc_ray.evaluation.compare import compare, comparison_table
from xlc_ray.evaluation.held_out import Share
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.replacement import evaluate_replacement
from xlc_ray.evaluation.run import Sums, ablate_share, ablated_features, evaluate, finish, measure, measure_share
from xlc_ray.evaluation.table import table

__all__ = [
    "Effects",
    "Share",
    "Sums",
    "ablate_share",
    "ablated_features",
    "compare",
    "comparison_table",
    "evaluate",
    "evaluate_reconstruction",
    "evaluate_replacement",
    "finish",
    "measure",
    "measure_share",
    "table",
]
