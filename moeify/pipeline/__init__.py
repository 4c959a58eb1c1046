"""Passes, their log, the rules around them, and the runner."""
