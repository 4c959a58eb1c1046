"""All architectures by name."""

from __future__ import annotations

from tests.architectures import attention, blocks, language, perception, refusals

ARCHITECTURES = {one.name: one for module in (language, perception, attention, blocks, refusals) for one in module.ALL}
