"""Helpers independent of networks: argument checks, tables, results, atomic files.

Start with `checks`, whose error messages every other package uses. Imports no other package.
"""
