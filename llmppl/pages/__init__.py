"""Posteriors and diagnoses as HTML, for notebooks and as pages. Needs numpy; a report also matplotlib."""

from llmppl.pages.posterior import posterior_html
from llmppl.pages.report import report_page
from llmppl.pages.table import posterior_table
from llmppl.pages.tree import prefix_tree

__all__ = ["posterior_html", "posterior_table", "prefix_tree", "report_page"]
