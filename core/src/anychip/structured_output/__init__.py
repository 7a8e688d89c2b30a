"""Outputs that follow a grammar: JSON schemas, regular expressions, choices. llguidance computes which tokens may come
next; this package bounds what that costs."""
