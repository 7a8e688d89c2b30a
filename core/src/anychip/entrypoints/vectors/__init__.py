"""Routes of models that return vectors, scores or labels."""
