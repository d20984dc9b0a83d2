"""Whole jobs on real input: data, supervised stages, PPO, evaluation."""
