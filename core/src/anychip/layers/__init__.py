"""Layers: weights in their kernels' packed layout, and how each is split over ranks. No layer knows a device."""
