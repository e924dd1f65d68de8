"""The networks and nothing else: README.md names them in the order in which they are best read.

This package imports torch, einops, numpy and itself.
"""
