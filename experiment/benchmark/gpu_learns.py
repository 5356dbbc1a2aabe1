"""Stage learns of `gpu.py`: resnet18 on CIFAR-10 with the published settings, as many epochs as the time allows."""

import io
import json
import os
import pickle
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from experiment.benchmark.gpu_report import Bench, Rows
from experiment.benchmark.gpu_right import script
from experiment.benchmark.loader import cifar_like, images_per_second
from util.errors import UserError
from util.train.batches import data_loaders, usable_cores, workers_of

TRAININGS = {
    "BPTT, m": ["--no-rate_flag", "--step_mode", "m"],
    "rate-based, m": ["--rate_flag", "--step_mode", "m"],
    "rate-based, s": ["--rate_flag", "--step_mode", "s"],
}
IMAGES = 50_000
MEASURED = "TF32, compiled, channels_last, CUDA graph"  # in stage fast: as a training runs on a GPU
STOPPED = 128 + signal.SIGTERM
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def parts(bench: Bench) -> dict[str, Callable[[Bench], Rows]]:
    return {"loader": loader, **{name: partial(training, name) for name in TRAININGS}}


def loader(bench: Bench) -> Rows:
    """Augmented images a second by the number of processes: what a training step must not outrun."""
    batch, batches = (8, 4) if bench.small else (128, 100)
    samples, rows = cifar_like(batch * batches), []
    for workers in (0,) if bench.small else sorted({8, usable_cores()}):
        loaders = data_loaders(samples, samples, batch, batch, workers, bench.device, seed=0)
        with workers_of(*loaders):
            rows.append({"workers": workers, "images/s": images_per_second(loaders[0], batch, epoch=1)})
    return rows


def training(name: str, bench: Bench) -> Rows:
    """One row an epoch. Stopped at the deadline it is saved, and the next call goes on."""
    log = bench.out / "runs" / name.replace(", ", "-")
    run = next((path for path in log.glob("*") if (path / "last.pth").exists()), None)
    if run is not None:
        flags = ["--resume", run, "--device", bench.device]
    else:
        epochs = bench.options.epochs or _epochs(name, bench)
        flags = [*_what(bench), *TRAININGS[name], "--num_epoch", epochs, "--log_path", log, "--device", bench.device]
    timer = threading.Timer(max(1, bench.deadline - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        status, said = script(*flags)
    finally:
        timer.cancel()
    if status not in (0, STOPPED):
        raise RuntimeError(f"status {status}: {said}")
    run = next(path for path in log.glob("*") if (path / "last.pth").exists())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spent = np.cumsum([line["seconds"] for line in lines]).tolist()
    rows = [
        {"name": name, "epoch": line["epoch"], "training seconds": seconds, "test accuracy %": line["val_acc"],
         "training loss": line["train_loss"], "training images/s": line["images_per_second"],
         "peak MiB": line["peak_memory_bytes"] / 2**20}
        for line, seconds in zip(lines, spent, strict=True)
    ]  # fmt: skip
    return rows + [{"name": name, "unfinished": "stopped at the deadline, saved"}] * (status == STOPPED)


def _what(bench: Bench) -> list[str]:
    if bench.small:
        batch = ["--train_batch_size", "512", "--val_batch_size", "512"]
        return ["--dataset", "DIGITS", "--arch", "vggsnn_small", "--T", "2", *batch]
    data = ["--dataset", "CIFAR10", "--data_path", str(_cifar(bench)), "--num_workers", str(usable_cores())]
    return [*data, "--arch", "resnet18", "--T", "4", "--save_every", "100"]


def _epochs(name: str, bench: Bench) -> int:
    """As many as --learn_seconds allow by what stage fast has measured; the loader's speed counts too."""
    if bench.small:
        return 1
    speeds = [row["images/s"] for row in bench.rows("fast")
              if row.get("name") == name and row.get("variant") == MEASURED and row.get("T") == 4]  # fmt: skip
    loaded = [row["images/s"] for row in bench.rows("learns") if "workers" in row]
    if not speeds or not loaded:
        raise UserError("the number of epochs follows from 'T = 4, CUDA graphs' (fast) and 'loader' (learns): run "
                        "these parts, or give --epochs")  # fmt: skip
    # A fifth more: the optimizer, and the test set of 10,000 images, which costs a third of as many training images.
    return max(1, int(bench.options.learn_seconds / (1.2 * IMAGES / min(*speeds, max(loaded)))))


def _cifar(bench: Bench) -> Path:
    """The directory that holds cifar-10-batches-py, unpacked where --data is an archive."""
    if bench.options.data is None:
        raise UserError("stage learns needs --data: CIFAR-10's directory, or images.tar.xz")
    data = Path(bench.options.data)
    if data.is_dir():
        return data
    place = bench.out / "data"
    if not (place / "cifar-10-batches-py" / "batches.meta").exists():
        unpack(data, place / "cifar-10-batches-py")
    return place


def unpack(archive: Path, folder: Path) -> None:
    """JPEG files SPLIT/CLASS/NAME.jpg -> the files that CIFAR-10 is published as, in an order of their own."""
    images: dict[str, tuple[list, list]] = {"train": ([], []), "test": ([], [])}
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile():
                split, name, _ = member.name.removeprefix("./").split("/")
                image = Image.open(io.BytesIO(members.extractfile(member).read())).convert("RGB")
                images[split][0].append(np.asarray(image).transpose(2, 0, 1).reshape(3072))
                images[split][1].append(CLASSES.index(name))
    folder.mkdir(parents=True, exist_ok=True)
    for split, (data, labels) in images.items():
        order = np.random.RandomState(0).permutation(len(labels))
        for i, part in enumerate(np.array_split(order, 5 if split == "train" else 1), 1):
            entry = {"labels": [labels[j] for j in part], "data": np.stack(data)[part]}
            name = f"data_batch_{i}" if split == "train" else "test_batch"
            (folder / name).write_bytes(pickle.dumps(entry, protocol=4))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": list(CLASSES)}, protocol=4)
    )  # last: all is there
