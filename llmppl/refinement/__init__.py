"""Refining whole configurations of a guide by the program's joint, with exact weights."""
