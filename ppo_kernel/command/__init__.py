"""What the command `ppo-kernel` needs beyond the library; needs the `demo` extra."""
