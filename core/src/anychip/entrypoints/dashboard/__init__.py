"""The page at /: a chat and a live dashboard, without a build step and without a request to anybody else."""
