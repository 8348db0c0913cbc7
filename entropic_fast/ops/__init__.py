"""Kernel families: schema, checks and dispatch of every compiled operation, one module a family."""
