"""Pictures and tables: arrays in, matplotlib figures or Markdown out."""

from avar_lightning.report.attention import plot_attention_shares, plot_overlay, plot_shares_by_layer
from avar_lightning.report.correlation import Correlation, pearson, spearman
from avar_lightning.report.figure import format_number, needs_log_scale, render
from avar_lightning.report.interventions import interventions_table, plot_differences, plot_sweep
from avar_lightning.report.maps import plot_vas_map
from avar_lightning.report.markdown import markdown_table
from avar_lightning.report.relation import Point, plot_relation
from avar_lightning.report.trainings import REWARD_COLUMNS, plot_results, results_table

__all__ = [
    "REWARD_COLUMNS",
    "Correlation",
    "Point",
    "format_number",
    "interventions_table",
    "markdown_table",
    "needs_log_scale",
    "pearson",
    "plot_attention_shares",
    "plot_differences",
    "plot_overlay",
    "plot_relation",
    "plot_results",
    "plot_shares_by_layer",
    "plot_sweep",
    "plot_vas_map",
    "render",
    "results_table",
    "spearman",
]
