"""The commands. The only place that prints, and that reads the environment."""
