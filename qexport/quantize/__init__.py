"""Post-training quantization: what a model loses least by, without training it."""
