"""Joins the torch-free side with the tensor side: starts processes, and loads a worker by its dotted name."""
