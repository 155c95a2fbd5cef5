"""Evaluation: accuracy against FLOPs, latency and memory."""
