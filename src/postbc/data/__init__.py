"""Demonstrations and rollouts: episodes of named observations, their files, action-chunk windows, normalisation, transitions."""

from postbc.data.belonging import Facts, check_belongs
from postbc.data.episodes import LOW_DIM_KEYS, Dataset, Episode
from postbc.data.normalization import Normalization, fit_normalization
from postbc.data.readers import read_dataset
from postbc.data.robomimic import read_robomimic, write_robomimic
from postbc.data.training_set import TrainingSet, TrainingSetConfig, load_training_set
from postbc.data.windows import Windows

__all__ = [
    "LOW_DIM_KEYS",
    "Dataset",
    "Episode",
    "Facts",
    "Normalization",
    "TrainingSet",
    "TrainingSetConfig",
    "Windows",
    "check_belongs",
    "fit_normalization",
    "load_training_set",
    "read_dataset",
    "read_robomimic",
    "write_robomimic",
]
