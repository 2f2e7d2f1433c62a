"""Zoos of networks for ``examples/coverage.py``: a module each, with a function ``networks``.

``networks()`` gives name -> a function that builds the network, with random weights, and the example inputs of one
call (a tensor, a tuple of positional arguments or a dict of keyword arguments). It builds nothing itself.
"""
