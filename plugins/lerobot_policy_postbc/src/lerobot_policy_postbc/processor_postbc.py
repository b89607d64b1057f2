"""Batch and device, both ways; an agent of postbc takes and gives raw units, so nothing is normalised."""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    make_policy_processor_pipelines,
)

from lerobot_policy_postbc.configuration_postbc import PostBCConfig


def make_postbc_pre_post_processors(
    config: PostBCConfig, dataset_stats: Any = None
) -> tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]]:
    """LeRobot's usual steps but the normaliser's; `dataset_stats` mean nothing here."""
    to_device = DeviceProcessorStep(device=config.device)
    return make_policy_processor_pipelines(
        input_steps=[RenameObservationsProcessorStep(rename_map={}), AddBatchDimensionProcessorStep(), to_device],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
