"""OpenAI's Responses API: conversations that the server remembers, in memory."""
