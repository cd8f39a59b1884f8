"""Evaluation: Frechet distance, precision and recall, diversity, image statistics, likelihood, and a report of all."""

from rlfusion.evaluation.frechet import frechet_distance, frechet_gaussian
from rlfusion.evaluation.images import ImageStatistics, image_statistics
from rlfusion.evaluation.likelihood import Bound, bits_per_dim, bound, require_bound
from rlfusion.evaluation.manifold import PrecisionRecall, class_spread, precision_recall
from rlfusion.evaluation.plain import plain_figures, plain_report, thumbnails
from rlfusion.evaluation.report import Judge, Report, agreement, features, figures, report, require_independent

__all__ = [
    "Bound",
    "ImageStatistics",
    "Judge",
    "PrecisionRecall",
    "Report",
    "agreement",
    "bits_per_dim",
    "bound",
    "class_spread",
    "features",
    "figures",
    "frechet_distance",
    "frechet_gaussian",
    "image_statistics",
    "plain_figures",
    "plain_report",
    "precision_recall",
    "report",
    "require_bound",
    "require_independent",
    "thumbnails",
]
