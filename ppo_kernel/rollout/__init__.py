"""Stage 1: prompts -> rollout."""
