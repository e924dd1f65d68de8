"""Around the project: python -m tools.NAME."""
