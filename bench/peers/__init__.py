"""The same PPO step in other frameworks, each in an environment of its own."""
