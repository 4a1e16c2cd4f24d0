"""All settings of a run: `schema` has the blocks with their meaning, `load` the ways to set them."""

from .load import (
    PROFILES,
    Settings,
    add_block,
    build,
    defaults,
    fields,
    number,
    parse_assignment,
    read_profile,
    read_tuned,
    tuned_values,
)
from .schema import SettingsBlock, setting

__all__ = [
    "PROFILES",
    "Settings",
    "SettingsBlock",
    "add_block",
    "build",
    "defaults",
    "fields",
    "number",
    "parse_assignment",
    "read_profile",
    "read_tuned",
    "setting",
    "tuned_values",
]
