"""Training a converted model in anybody's loop: router losses, updates after a step, and what the routers do."""

from moeify.training.losses import RouterLosses, losses
from moeify.training.steps import after_step
from moeify.training.watch import observe

__all__ = ["RouterLosses", "after_step", "losses", "observe"]
