"""Parsers of model output, one module a family; registry.py knows them by name."""
