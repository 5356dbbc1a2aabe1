"""From the published archives of an event-camera data set, or what they unpack to, to frames that train fast.

    python experiment/dvs/prepare.py [--dataset CIFAR10_DVS_Aug] --archives DIR --out FRAMES
        [--frame_kind published|counts] [--frames 10] [--size 48] [--seed 0] [--workers 2]

What DIR holds: for CIFAR10_DVS_Aug airplane.zip ... truck.zip, or a folder of .aedat files for each class; for N_MNIST
Train.zip and Test.zip, or their folders of .bin files; for N_CALTECH101 Caltech101.zip, or the folder; for
DVS128_GESTURE the folder DvsGesture, unpacked from its .tar.gz. Stopped, it goes on where it was.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.before_torch  # noqa: F401, I001  (before torch)

import numpy as np
import torch
from tqdm import tqdm

from util.dataset.event_data import DATASETS, Published
from util.dataset.event_frames import (
    KINDS,
    MANIFEST,
    SPLITS,
    check_finite,
    frame_kind_of,
    integrate_events,
    read_manifest,
    write_manifest,
    write_split,
)
from util.dataset.event_sources import Source
from util.errors import UserError
from util.train.options import Parser, complain
from util.train.values import dataset_name, number
from util.train.signals import raise_on_interrupt

SHORT = 0.5  # of the usual size of a class's recordings
PART = 50  # recordings that are lost at most, for each worker, when it is stopped
PREPARED = tuple(name for name, spec in DATASETS.items() if spec.published)
UNFINISHED = "unfinished_frames"  # the folder below --out that holds finished parts until all are there


def prepare_part(source: Source, first: int, last: int, frames: int, size: int, kind: str, target: Path) -> int:
    """Frames of the recordings from ``first`` up to ``last`` in one file, which is there whole or not at all."""
    torch.set_num_threads(1)  # the workers share the cores among themselves
    part = []
    for name, events in source.recordings(first, last):
        counts = torch.from_numpy(integrate_events(events, frames, source.camera.height, source.camera.width, name))
        part.append(KINDS[kind].stored(KINDS[kind].resize(check_finite(counts, name), size)))
    staging = target.with_suffix(f".{os.getpid()}.tmp")
    with staging.open("wb") as file:
        np.save(file, np.stack(part))
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, target)
    return last - first


def split_of(count: int, label: int, seed: int) -> dict[str, np.ndarray]:
    """The recordings of a class in either split: nine tenths (rounded up) for training, one at least for testing."""
    order = np.random.default_rng([seed, label]).permutation(count)
    train = min(-(-count * 9 // 10), count - 1)
    return {"train": np.sort(order[:train]), "test": np.sort(order[train:])}


def members_of(source: Source, split: str, seed: int) -> np.ndarray:
    """The recordings in this split, the published one where there is one."""
    if source.split:
        return np.arange(len(source.members) if source.split == split else 0)
    return split_of(len(source.members), source.label, seed)[split]


def assemble(folder: Path, out: Path, sources: list[Source], settings: dict, seed: int) -> None:
    """All parts in ``folder`` to the files of util/dataset/event_frames.py in ``out``, the manifest last."""
    final = folder / "final"
    final.mkdir(exist_ok=True)
    for split in SPLITS:
        chosen = [(source, i) for source in sources for i in members_of(source, split, seed)]
        labels = [source.label_of(i) for source, i in chosen]
        recordings = (
            np.load(_part_file(folder, source, i // PART * PART), mmap_mode="r")[i % PART] for source, i in chosen
        )
        shape = (settings["frames"], 2, settings["size"], settings["size"])
        write_split(final, split, recordings, labels, shape, KINDS[settings["frame_kind"]].dtype)
    write_manifest(final, settings)
    for file in sorted(final.iterdir(), key=lambda file: file.name == MANIFEST):
        os.replace(file, out / file.name)
        _sync_directory(out)  # file by file, lest a crash leave the manifest without what it describes
    shutil.rmtree(folder, ignore_errors=True)  # a process that finds the manifest may be removing it, too


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _part_file(folder: Path, source: Source, first: int) -> Path:
    return folder / f"{source.split or ''}{source.name}_{first:06d}.npy"


@contextlib.contextmanager
def open_unfinished(out: Path, settings: dict) -> Iterator[Path]:
    """The folder of the finished parts, which no other process works in meanwhile.

    Raises:
        UserError: another process works there, or the folder is not of these settings; it is left as it is.
    """
    folder = out / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that has just finished removes the folder, and with it the file that is locked here.
            free = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            raise UserError(f"another prepare.py is at work on {out}: wait for it, or name another --out")
        begun = [path for path in folder.iterdir() if path.name != "lock"]
        if begun and not is_ours(folder, settings):
            if not is_ours(folder, settings, but="recordings_sha256"):
                hint = "remove it, or name another --out"
                raise UserError(f"{folder} was begun with other settings, or by something else: {hint}")
            for part in begun:  # of recordings that have been mended or replaced since
                part.unlink()
            begun = []
        if not begun:
            (folder / "settings.json").write_text(json.dumps(settings, indent=1))
        for staging in folder.glob("*.tmp"):
            staging.unlink()
        yield folder


def is_ours(folder: Path, settings: dict, but: str = "") -> bool:
    """Whether ``folder`` was begun by this script with these settings, one of them left out of account."""
    try:
        found = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {**found, but: None} == {**settings, but: None}


def make_parts(folder: Path, sources: list[Source], settings: dict, workers: int) -> int:
    """Makes the parts that are not there yet; returns how many recordings were there already."""
    tasks = []
    for source in sources:
        for first in range(0, len(source.members), PART):
            target = _part_file(folder, source, first)
            tasks.append((source, first, min(first + PART, len(source.members)), target))
    missing = [task for task in tasks if not _is_whole(task[3])]
    total = sum(len(source.members) for source in sources)
    done = total - sum(last - first for _, first, last, _ in missing)
    run = partial(prepare_part, frames=settings["frames"], size=settings["size"], kind=settings["frame_kind"])
    with tqdm(total=total, initial=done, unit=" recordings", desc="integrating", file=sys.stdout) as bar:
        for count in _in_processes(run, missing, workers) if workers > 1 else _in_turn(run, missing):
            bar.update(count)
    return done


def _is_whole(part: Path) -> bool:
    try:
        np.load(part, mmap_mode="r", allow_pickle=False)
    except Exception:  # not there, or cut short when the machine went down; NumPy raises whatever that led to
        return False
    return True


def _in_turn(run: partial, tasks: list[tuple]) -> Iterator[int]:
    for source, first, last, target in tasks:
        yield run(source, first, last, target=target)


def _in_processes(run: partial, tasks: list[tuple], workers: int) -> Iterator[int]:
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        try:
            futures = [pool.submit(run, source, first, last, target=target) for source, first, last, target in tasks]
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent's answer is enough
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent cannot tell its workers
    os._exit(1)


def fingerprint(sources: list[Source]) -> str:
    """Of names and sizes of all recordings, alike for archives and the files extracted from them."""
    names = [[s.name, Path(name).name, size] for s in sources for name, size in s.members]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def prepare(
    archives: Path,
    out: Path,
    frames: int = 10,
    size: int | None = None,
    seed: int = 0,
    workers: int = 1,
    frame_kind: str | None = None,
    dataset: str = "CIFAR10_DVS_Aug",
) -> None:
    spec = DATASETS[dataset]
    published, size = spec.published, size or spec.frame_size
    if size > (most := max(published.camera.height, published.camera.width)):
        raise UserError(f"--size {size} is more than the {most} pixels of {published.name}: leave it out, or less")
    frame_kind = frame_kind or (spec.frames if size == spec.frame_size else "counts")
    if frame_kind == "published" and size != spec.frame_size:
        hint = f"leave --size at {spec.frame_size}, or choose --frame_kind counts"
        raise UserError(f"--size {size} does not go with published frames: {hint}")
    sources = published.find(archives, published.camera)
    settings = {
        "source": published.name,
        "frame_kind": frame_kind,
        "frames": frames,
        "size": size,
        "split": "as published" if sources[0].split else f"9:1 in each class, seed {seed}",
        "recordings_sha256": fingerprint(sources),
        "classes": list(spec.classes or dict.fromkeys(source.name for source in sources)),
    }
    _say_what_is_missing(published, sources)
    if published.alike:
        _say_what_is_short(sources)
    if is_finished(out, settings):
        if is_ours(out / UNFINISHED, settings):
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        print(f"{out} is finished already, nothing to do")
        return
    with open_unfinished(out, settings) as folder:
        if is_finished(out, settings):  # by another process, since the question above
            raise UserError(f"another prepare.py has just finished {out}")
        done = make_parts(folder, sources, settings, workers)
        assemble(folder, out, sources, settings, seed)
    _report(out, done)


def is_finished(out: Path, settings: dict) -> bool:
    """Whether ``out`` holds the frames of these settings; UserError where it holds others."""
    if not (out / MANIFEST).exists():
        return False
    asked, found = settings["frame_kind"], frame_kind_of(out)
    if found != asked:
        raise UserError(f"--frame_kind {asked} asked for, but {out} holds {found}: name another --out")
    if read_manifest(out)["settings"] != settings:
        raise UserError(f"{out} holds frames of other settings or recordings: remove it or name another --out")
    return True


def _say_what_is_missing(published: Published, sources: list[Source]) -> None:
    found = sum(len(source.members) for source in sources)
    if found != published.recordings:
        counts = (
            ""
            if len(sources) > 20
            else ": " + ", ".join(f"{f'{s.split} ' if s.split else ''}{s.name} {len(s.members)}" for s in sources)
        )
        print(f"{found} of the {published.recordings} recordings of {published.name} as published{counts}")


def _say_what_is_short(sources: list[Source]) -> None:
    """A recording that was cut between two events is as whole as any other; only its size tells."""
    for source in sources:
        usual = statistics.median(size for _, size in source.members)
        short = [name for name, size in source.members if size < SHORT * usual]
        if short:
            more = f" and {len(short) - 3} more" if len(short) > 3 else ""
            named = f"{', '.join(short[:3])}{more}"
            print(f"{source.path}: less than half as long as this class's usual recording, perhaps cut off: {named}")


def _report(out: Path, done: int) -> None:
    manifest = read_manifest(out)
    train, test = (manifest["splits"][split] for split in SPLITS)
    print(f"{'class':<12}{'training':>9}{'test':>6}")
    for name in manifest["settings"]["classes"]:
        print(f"{name:<12}{train['recordings_per_class'][name]:>9}{test['recordings_per_class'][name]:>6}")
    total, bytes_ = train["shape"][0] + test["shape"][0], sum(file["bytes"] for file in manifest["files"].values())
    again = f" ({done} of them by an earlier run)" if done else ""
    shape = "x".join(map(str, train["shape"][1:]))
    print(f"{total} recordings{again} integrated to {shape} frames, {bytes_ / 2**20:.1f} MiB in {out}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends like Ctrl-C, workers included."""


def _stop(number: int, frame: object) -> NoReturn:
    raise _Terminated


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dataset", type=dataset_name(PREPARED), default=PREPARED[0], metavar="NAME",
                        help=f"one of {', '.join(PREPARED)} (default: {PREPARED[0]})")  # fmt: skip
    parser.add_argument("--archives", type=Path, required=True, metavar="DIR", help="where the archives are")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the frames go")
    kinds = f"{' or '.join(KINDS)}, as --frames of main.py (default: as there, or counts with another --size)"
    parser.add_argument("--frame_kind", choices=tuple(KINDS), help=kinds)
    parser.add_argument("--frames", type=number(int, 1), default=10, help="frames in a recording (default: 10)")
    sizes = ", ".join(f"{DATASETS[name].frame_size} for {name}" for name in PREPARED)
    parser.add_argument("--size", type=number(int, 1), help=f"pixels a side (default: {sizes})")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the split (default: 0)")
    parser.add_argument("--workers", type=number(int, 1), default=os.cpu_count(), help="processes (default: all cores)")
    signal.signal(signal.SIGTERM, _stop)
    try:
        raise_on_interrupt()
        prepare(**vars(parser.parse_args()))
    except BrokenExecutor:
        return complain(parser.prog, "a worker process was killed, perhaps for memory: fewer --workers")
    except (UserError, OSError) as error:
        return complain(parser.prog, error)
    except KeyboardInterrupt as stop:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
