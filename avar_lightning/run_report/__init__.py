"""What runs left behind, read back and put on one page: `avar report`."""

from avar_lightning.run_report.report import TITLE, make_report

__all__ = ["TITLE", "make_report"]
