"""Ops: one pure-PyTorch reference each (reference/), and the table that dispatches to overrides (table.py)."""
