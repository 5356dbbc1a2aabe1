"""Train a spiking network on ImageNet, or on any folders of images, one folder a class.

python experiment/imagenet/main.py --dataset IMAGENET --data_path DIR --rate_flag
python experiment/imagenet/main.py --dataset FOLDER --data_path DIR --arch resnet18 --image_size 64 --rate_flag
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.before_torch  # noqa: F401  (before torch)
from util.dataset.files import IMAGE_SIZES
from util.dataset.image_folder import DATASETS, load_folders
from util.errors import UserError
from util.train.batches import usable_cores
from util.train.options import TrainOptions, option, with_default
from util.train.script import LoadedData, run
from util.train.values import dataset_name, number


@dataclass(kw_only=True)
class FolderOptions(TrainOptions):
    dataset: str = option(
        "IMAGENET", "IMAGENET: train/ and val/, one folder a class; FOLDER: any images kept so, val/ or test/",
        "data", dataset_name(tuple(DATASETS)), "NAME", evaluate="fixed",
    )  # fmt: skip
    image_size: int = option(224, "height and width of the images, as the network sees them", "data",
                             number(int, IMAGE_SIZES[0], IMAGE_SIZES[-1]), evaluate="fixed")  # fmt: skip
    arch: str = with_default("arch", "sew_resnet34")
    num_epoch: int = with_default("num_epoch", 100)
    train_batch_size: int = with_default("train_batch_size", 512)
    lr: float = with_default("lr", 0.2)
    wd: float = with_default("wd", 2e-5)
    distill_ce: float = with_default("distill_ce", 0.7)


def load_data(options: FolderOptions) -> LoadedData:
    test_names = DATASETS[options.dataset].test_names
    if not options.data_path:
        folders = " or ".join(f"{name}/" for name in test_names)
        raise UserError(f"{options.dataset} needs --data_path: name the directory that holds train/ and {folders}")
    train_set, test_set = load_folders(Path(options.data_path), test_names, options.image_size)
    if options.dataset == "FOLDER":  # of ImageNet's 1.3 million files it would take minutes
        train_set.check_headers()
        test_set.check_headers()
    workers = usable_cores() if options.num_workers is None else options.num_workers
    return LoadedData(train_set, test_set, len(train_set.classes), options={"num_workers": workers})


if __name__ == "__main__":
    sys.exit(run(FolderOptions, load_data, __doc__))
