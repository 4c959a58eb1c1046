"""convert, inspect, verify, load: what the command line and Python callers use."""

from moeify.api.convert import convert, convert_file
from moeify.api.inspect import Inspection, inspect_file
from moeify.api.load import load
from moeify.api.verify import Comparison, OutputError, verify_files

__all__ = [
    "Comparison",
    "Inspection",
    "OutputError",
    "convert",
    "convert_file",
    "inspect_file",
    "load",
    "verify_files",
]
