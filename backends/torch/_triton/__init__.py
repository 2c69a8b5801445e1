"""Triton kernels. Nothing here has run on a GPU yet."""
