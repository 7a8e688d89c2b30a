"""OpenAI's HTTP API: completions, chat, models; and health and version beside them."""
