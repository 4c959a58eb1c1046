"""All architectures by name."""

from __future__ import annotations

from tests.architectures import attention, blocks, decoders, language, perception, refusals, unusual

_MODULES = (language, decoders, perception, attention, blocks, refusals, unusual)
ARCHITECTURES = {one.name: one for module in _MODULES for one in module.ALL}
