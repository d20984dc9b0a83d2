"""What runs the kernel: supervised fine-tuning, reward model, PPO."""
