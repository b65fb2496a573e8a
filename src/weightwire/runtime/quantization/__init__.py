"""Quantized weights: what they are (pure arithmetic), how a ``Linear`` stores them, how a checkpoint names them."""
