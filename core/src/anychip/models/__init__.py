"""Model families, one a file, on shared layers. registry.py finds a checkpoint's family by its architecture."""
