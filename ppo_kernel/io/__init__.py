"""Files in and out: model folders, checkpoints, tokenizers, prompts."""
