"""Evaluation: Frechet distance, precision and recall, diversity, image statistics, and the report of them all."""

from rlfusion.evaluate.frechet import frechet_distance, frechet_gaussian
from rlfusion.evaluate.images import ImageStatistics, image_statistics
from rlfusion.evaluate.manifold import PrecisionRecall, class_spread, precision_recall
from rlfusion.evaluate.report import Judge, Report, agreement, features, report, require_independent

__all__ = [
    "ImageStatistics",
    "Judge",
    "PrecisionRecall",
    "Report",
    "agreement",
    "class_spread",
    "features",
    "frechet_distance",
    "frechet_gaussian",
    "image_statistics",
    "precision_recall",
    "report",
    "require_independent",
]
