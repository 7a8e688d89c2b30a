"""From a checked request to its tokens and text: processors, the engine's loop, IPC. Knows no tensors."""
