"""Conversations: templates that make them a prompt, and parsers that find reasoning and tool calls in what comes
back."""
