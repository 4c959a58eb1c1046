"""Module form: the user's own model with its blocks replaced, and its checkpoint folder."""

from moeify.surgery.conversion import Conversion, conversion_of
from moeify.surgery.loading import load
from moeify.surgery.module_form import apply
from moeify.surgery.saving import save

__all__ = ["Conversion", "apply", "conversion_of", "load", "save"]
