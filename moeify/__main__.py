"""``python -m moeify``."""

from moeify.cli.main import run

run()
