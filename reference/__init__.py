"""Judges: what the package computes, said again in NumPy float64 and plain loops.

A file here has the name of the one it judges, and a function the name of its twin. Nothing is
shared with the package, and nothing here imports JAX. Floating arrays are float64.
"""
