"""Reports: runs' folders in, one self-contained HTML page and its pictures out."""

from baft.report.page import write_report

__all__ = ["write_report"]
