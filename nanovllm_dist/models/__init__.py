"""Models: configs and partitions (free of torch), and sharded layers, weights and architectures (which need it).

Nothing here knows requests, schedulers, sockets or processes. This file imports nothing, so that processes that
read a config do not pay for torch.
"""
