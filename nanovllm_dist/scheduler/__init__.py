"""The coordinator's room: policy, block tables and the loop that serves clients and drives workers.

All of it but `coordinator.py` and its two helpers is pure: no torch, no sockets, no clock.
"""
