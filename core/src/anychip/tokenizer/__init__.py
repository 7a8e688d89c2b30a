"""Text to ids and back, and chat templates, without transformers: tokenizer.json is read by `tokenizers`."""
