"""A plug-in (POSTBC_PLUGINS=toy_plugin): the toy task, whose state is saved and restored, by name for other processes."""

from postbc.environments.registry import ENVIRONMENTS
from toy import environment

ENVIRONMENTS["toy/PointReach"] = environment
