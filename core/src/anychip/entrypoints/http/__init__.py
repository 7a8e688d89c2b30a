"""What every HTTP API shares: the application, keys, limits, errors, streams."""
