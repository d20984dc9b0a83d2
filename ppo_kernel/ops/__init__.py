"""Array maths that knows neither models nor PPO."""
