"""Where users come in: the command line and the HTTP server. Never loads torch."""
