"""LeRobot finds this distribution by its name and imports it: from then on there is `--policy.type=postbc`."""

from lerobot_policy_postbc.configuration_postbc import PostBCConfig

__all__ = ["PostBCConfig"]
