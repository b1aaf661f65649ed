"""What is shown: plots, ArviZ data, HTML. From arrays and from small protocols of its own; no torch, no jax."""

from llmppl.display.diagnosis_page import report_page
from llmppl.display.posterior_html import posterior_html
from llmppl.display.posterior_table import posterior_table
from llmppl.display.prefix_tree import prefix_tree

__all__ = ["posterior_html", "posterior_table", "prefix_tree", "report_page"]
