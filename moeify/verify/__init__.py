"""Measuring what a rewrite did to the function."""
