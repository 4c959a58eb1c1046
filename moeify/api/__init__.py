"""convert, profile, inspect, verify, quality, load: what the command line and Python callers use."""

from moeify.api.convert import convert, convert_file
from moeify.api.inspect import Inspection, inspect_file
from moeify.api.load import load
from moeify.api.profile import ProfileReport, profile, profile_to_file
from moeify.api.quality import quality, quality_files
from moeify.api.quality_report import QualityReport
from moeify.api.verify import Comparison, OutputError, verify_files

__all__ = [
    "Comparison",
    "Inspection",
    "OutputError",
    "ProfileReport",
    "QualityReport",
    "convert",
    "convert_file",
    "inspect_file",
    "load",
    "profile",
    "profile_to_file",
    "quality",
    "quality_files",
    "verify_files",
]
