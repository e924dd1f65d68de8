"""Evaluation of worlds: metrics as pure functions, the metrics of each stage, the action table."""
