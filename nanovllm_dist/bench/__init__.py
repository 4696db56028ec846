"""`nanovllm-bench`: throughput, latency and start-up time of an engine, as any client sees them."""
