"""Triton kernels; a module here is imported only when its backend is used."""
