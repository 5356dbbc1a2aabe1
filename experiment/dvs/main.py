"""Train a spiking network on recordings of event cameras (FRAMES: any of SpikingJelly's; DIGITS_DVS: made here).

python experiment/dvs/main.py --dataset DIGITS_DVS --arch vggsnn_small --rate_flag --num_epoch 10 --train_batch_size 32
python experiment/dvs/main.py --dataset CIFAR10_DVS_Aug --data_path DIR --arch vggsnn_dvs --step_mode m --rate_flag
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.before_torch  # noqa: F401  (before torch)
from util.dataset.event_data import DATASETS, load_event_dataset
from util.dataset.event_frames import KINDS, MANIFEST
from util.errors import UserError
from util.train.batches import usable_cores
from util.train.options import TrainOptions, option, switch, with_default
from util.train.script import LoadedData, run
from util.train.values import dataset_name, one_of


@dataclass(kw_only=True)
class EventOptions(TrainOptions):
    dataset: str = option(
        "DIGITS_DVS", f"one of {', '.join(DATASETS)}", "data", dataset_name(tuple(DATASETS)), "NAME", evaluate="fixed"
    )
    augment: bool = switch(True, "random flip (not of digits) and roll by up to 5 pixels", "data")
    frames: str | None = option(
        None, f"{' or '.join(KINDS)}: what becomes of the counts of events (default: as they were prepared, else "
        "published for CIFAR10_DVS_Aug, counts for the others)", "data", one_of(tuple(KINDS)), "KIND", evaluate="fixed",
    )  # fmt: skip
    arch: str = with_default("arch", "vggsnn_dvs")
    distill_kl: float = with_default("distill_kl", 0.1)
    T: int = with_default("T", 10, help="number of time steps: the frames of a recording")


def load_data(options: EventOptions) -> LoadedData:
    own = options.dataset == "DIGITS_DVS" and options.data_path and Path(options.data_path)
    if own and ((own / "train").is_dir() or (own / MANIFEST).is_file()):
        raise UserError(f"--data_path {own} holds recordings, and DIGITS_DVS makes its own: name the --dataset there")
    train_set, test_set = load_event_dataset(
        options.dataset, options.data_path, options.T, options.augment, options.frames
    )
    workers = 0 if options.dataset == "DIGITS_DVS" else usable_cores()  # whose samples are read sooner than passed
    workers = workers if options.num_workers is None else options.num_workers
    settled = {"num_workers": workers, "frames": train_set.kind}
    return LoadedData(train_set, test_set, len(train_set.classes), options=settled)


if __name__ == "__main__":
    sys.exit(run(EventOptions, load_data, __doc__))
