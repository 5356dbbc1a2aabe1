"""Train a spiking network on images (CIFAR10, CIFAR100, MNIST, FashionMNIST, or DIGITS, which needs no download).

python experiment/cifar/main.py --dataset DIGITS --arch vggsnn_small --image_size 16 --T 4 --rate_flag --num_epoch 6
python experiment/cifar/main.py --dataset CIFAR10 --data_path DIR --arch resnet18 --T 4 --step_mode m --rate_flag
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.before_torch  # noqa: F401  (before torch)
from util.dataset.image_sets import DATASETS, load_dataset
from util.train.batches import usable_cores
from util.train.options import TrainOptions, option, switch, with_default
from util.train.script import LoadedData, run
from util.train.values import dataset_name, number


@dataclass(kw_only=True)
class ImageOptions(TrainOptions):
    dataset: str = option(
        "DIGITS", f"one of {', '.join(DATASETS)}", "data", dataset_name(tuple(DATASETS)), "NAME", evaluate="fixed"
    )
    train_batch_size: int | None = with_default(
        "train_batch_size", None, help="images in a training batch (default: 32 for DIGITS, 128 for the others)"
    )
    image_size: int | None = option(
        None, "height and width of the images (default: 8 for DIGITS, 28 for FashionMNIST, 32 for the others)", "data",
        number(int, 1), evaluate="fixed",
    )  # fmt: skip
    auto_aug: bool | None = switch(
        None, "AutoAugment, CIFAR10 policy (default: yes for CIFAR, no for the others)", "data"
    )
    cutout: bool | None = switch(None, "Cutout (default: yes for CIFAR, no for the others)", "data")


def load_data(options: ImageOptions) -> LoadedData:
    spec = DATASETS[options.dataset]
    train_set, test_set = load_dataset(
        options.dataset, options.data_path, options.image_size, options.auto_aug, options.cutout
    )
    defaults = {name: getattr(spec, name) for name in ("train_batch_size", "image_size", "auto_aug", "cutout")}
    defaults["num_workers"] = usable_cores() if spec.workers else 0
    typed = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    return LoadedData(train_set, test_set, spec.num_classes, options={**defaults, **typed})


if __name__ == "__main__":
    sys.exit(run(ImageOptions, load_data, __doc__))
