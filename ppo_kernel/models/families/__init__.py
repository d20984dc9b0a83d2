"""Kinds of published checkpoints: settings and weight names, one kind a file."""
