"""Serving: load a checkpoint, generate from it, answer over HTTP."""
