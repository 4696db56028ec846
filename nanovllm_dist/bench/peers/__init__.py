"""Contestants of `nanovllm-bench side-by-side`, each a program of its own that speaks JSON lines."""
