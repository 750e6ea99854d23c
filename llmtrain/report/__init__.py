"""Runs beside each other, as a page, a table or a picture: `python -m llmtrain.report`."""

from llmtrain.report.command import main, write_report

__all__ = ["main", "write_report"]
