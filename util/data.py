"""All data sets by name, in one registry, and what loads those that have a row: `load_dataset`, `load_event_dataset`.

A row says which script trains on it (``script``) and what reads a single file for a network (``file_reader``).
"""

from .dataset import event_data, image_folder, image_sets
from .dataset.event_data import load_event_dataset
from .dataset.image_sets import ImageDataset, load_dataset

__all__ = ["DATASETS", "ImageDataset", "load_dataset", "load_event_dataset"]

DATASETS = {**image_sets.DATASETS, **image_folder.DATASETS, **event_data.DATASETS}
