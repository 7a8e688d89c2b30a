"""Keeps which request holds which KV block. Knows no tensors: the cache's bytes are the attention backend's."""
