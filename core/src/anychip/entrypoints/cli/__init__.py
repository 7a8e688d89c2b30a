"""The `anychip` command: serve, generate, chat, devices, doctor."""
