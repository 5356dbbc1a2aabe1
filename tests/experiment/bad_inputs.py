"""Command lines that the training scripts must refuse, the files that they name, and what has to be said of each.

tests/experiment/test_bad_input.py holds the scripts to it.
"""

import os
import pickle
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.cifar_format import write_cifar10, write_cifar100, write_mnist
from tests.event_files import random_layout_a
from tests.experiment.script_helpers import ANALYSIS, CIFAR, DVS, FOLDERS, load, run_here, tiny_networks
from tests.photo_files import write_photos
from util.dataset.event_frames import SPLITS, write_manifest, write_split
from util.train import checkpoint

GIVEN = ["--num_epoch", "1", "--T", "1", "--num_workers", "0", "--log_path", "log"]
IMAGES = ["--dataset", "CIFAR10", "--data_path", "data", "--arch", "vgg11", "--image_size", "8"]  # vgg11 is tiny here
PHOTOS = ["--dataset", "FOLDER", "--data_path", "photos", "--arch", "vgg11", "--image_size", "8"]
FRAMES = ["--dataset", "CIFAR10_DVS_Aug", "--frames", "counts", "--arch", "vgg11", "--T", "2", "--num_workers", "0"]


class Case(NamedTuple):
    script: Path
    line: str  # as shown
    argv: list[str]
    words: list[str]  # that the message must hold


class Payload:
    """Unpickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@contextmanager
def surroundings() -> Iterator[None]:
    """Networks of two layers, no network to download from, and no way into directories called locked, even for root."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    allowed = os.access
    with pytest.MonkeyPatch.context() as patch, tiny_networks("vgg11", "resnet19"):
        patch.setattr(urllib.request, "urlopen", refuse)
        patch.setattr(os, "access", lambda path, *more: Path(path).name != "locked" and allowed(path, *more))
        yield


def prepare(root: Path) -> None:
    """Fills ``root`` with data sets, good and bad, two runs, and checkpoints that are none or others."""
    (root / "file").write_text("some text\n")
    for name in ("empty", "locked", "log"):
        (root / name).mkdir()
    make_images(root)
    for split in ("train", "val"):
        write_photos(root / "photos" / split, 2)
    make_frames(root)
    make_recordings(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(checkpoint, "forget_previous", lambda directory: None)
        for name, script, flags in (("run", CIFAR, IMAGES), ("dvs_run", DVS, [*FRAMES, "--data_path", "frames"])):
            assert run_here(*GIVEN, *flags, "--log_path", "runs", "--T", "2", script=script) == 0
            (directory,) = (root / "runs").iterdir()
            directory.rename(root / name)
            (root / "runs").rmdir()
    make_checkpoints(root)


def make_images(root: Path) -> None:
    write_cifar10(root / "data", images_per_batch=2)
    write_cifar100(root / "data100", train_images=4, test_images=2)
    write_mnist(root / "mnist", train_images=4, test_images=2)

    def bad(name: str, file: str, alter: Callable[[bytes], bytes] | None) -> None:
        source, folder = ("mnist", "MNIST/raw") if "idx" in file else ("data", "cifar-10-batches-py")
        shutil.copytree(root / source, root / name)
        path = root / name / folder / file
        content = path.read_bytes()
        path.unlink()
        if alter is not None:
            path.write_bytes(alter(content))

    def edited(**changes: Any) -> Callable[[bytes], bytes]:
        return lambda content: pickle.dumps({**pickle.loads(content), **changes}, protocol=2)

    bad("truncated", "data_batch_2", lambda content: content[:500])
    bad("partly", "data_batch_3", None)
    bad("odd", "test_batch", edited(data=Payload(root / "owned")))
    bad("no_pickle", "data_batch_1", lambda content: b"no pickle")
    bad("listed", "data_batch_1", lambda content: pickle.dumps([1, 2]))
    bad("narrow", "data_batch_4", edited(data=np.zeros((2, 3071), np.uint8)))
    bad("real", "data_batch_4", edited(data=np.full((2, 3072), np.nan, np.float32)))
    bad("labelled", "data_batch_5", edited(labels=[0, 10]))
    bad("negative", "data_batch_5", edited(labels=[0, -1]))
    bad("unequal", "data_batch_5", edited(labels=[0]))
    bad("unnamed", "batches.meta", edited(label_names=["one"]))
    bad("mnist_cut", "train-images-idx3-ubyte", lambda content: content[:-1])
    bad("mnist_head", "t10k-labels-idx1-ubyte", lambda content: b"\0" * 4 + content[4:])
    bad("mnist_label", "train-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a")


def make_frames(root: Path) -> None:
    """Layout a, two frames a recording; train/0.pt is read before training, the others when their turn comes."""
    random_layout_a(root / "frames", time_steps=2, size=8, train=4, test=2)

    def bad(name: str, file: str, pair: Any = None, alter: Callable[[bytes], bytes] | None = None) -> None:
        shutil.copytree(root / "frames", root / name)
        path = root / name / file
        if pair is not None:
            torch.save(pair, path)
        elif alter is not None:
            path.write_bytes(alter(path.read_bytes()))
        else:
            path.unlink()

    good = torch.ones(2, 2, 8, 8)
    bad("f_gap", "train/1.pt")
    bad("f_cut", "train/0.pt", alter=lambda content: content[:-100])
    bad("f_cut_late", "train/3.pt", alter=lambda content: content[:-100])
    bad("f_cut_test", "test/1.pt", alter=lambda content: content[:-100])
    bad("f_text", "train/0.pt", alter=lambda content: b"text")
    bad("f_code", "train/0.pt", pair=[good, Payload(root / "owned")])
    bad("f_nan", "train/2.pt", pair=[good * torch.nan, 0])
    bad("f_infinite", "train/0.pt", pair=[good * torch.inf, 0])
    bad("f_negative", "train/0.pt", pair=[-good, 0])
    bad("f_channels", "train/0.pt", pair=[torch.ones(2, 3, 8, 8), 0])
    bad("f_flat", "train/0.pt", pair=[torch.ones(2, 8, 8), 0])
    bad("f_no_frames", "train/0.pt", pair=[torch.ones(0, 2, 8, 8), 0])
    bad("f_label", "train/0.pt", pair=[good, 10])
    bad("f_label_text", "test/0.pt", pair=[good, "cat"])
    bad("f_triple", "train/0.pt", pair=[good, 0, 0])
    bad("f_alone", "train/0.pt", pair=good)
    bad("f_longer", "train/2.pt", pair=[torch.ones(3, 2, 8, 8), 0])
    (root / "f_no_test" / "train").mkdir(parents=True)
    for split in SPLITS:
        (root / "f_empty" / split).mkdir(parents=True)


def make_recordings(root: Path) -> None:
    """Layout b, as experiment/dvs/prepare.py writes it."""

    def write(name: str, labels: list[int], value: float = 1.0) -> Path:
        (root / name).mkdir()
        for split in SPLITS:
            frames = (np.full((2, 2, 8, 8), value, np.float16) for _ in labels)
            write_split(root / name, split, frames, labels, (2, 2, 8, 8))
        write_manifest(root / name, {"classes": [str(k) for k in range(11)]})
        return root / name

    write("p_good", [0, 1])
    write("p_label", [0, 10])
    write("p_nan", [0, 1], float("nan"))
    (write("p_none", [0, 1]) / "test_frames.npy").unlink()
    (write("p_text", [0, 1]) / "manifest.json").write_text("{")
    manifest = write("p_newer", [0, 1]) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    for name, damage in (("p_cut", lambda content: content[:-2]), ("p_head", lambda content: b"\0" * 8 + content[8:])):
        path = write(name, [0, 1]) / "train_frames.npy"
        path.write_bytes(damage(path.read_bytes()))


def make_checkpoints(root: Path) -> None:
    good = load(root / "run" / "last.pth")
    config = good["config"]

    def save(name: str, content: Any) -> None:
        (root / f"{name}.pth").write_bytes(checkpoint.encode(content))

    def altered(**changes: Any) -> dict[str, Any]:
        return {**good, **changes}

    for name in "abcd":
        (root / "several" / name).mkdir(parents=True)
        for file in (checkpoint.LAST, checkpoint.BEST):
            (root / "several" / name / file).touch()
    whole = (root / "run" / "last.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "none.pth").write_bytes(b"")
    (root / "code.pth").write_bytes(pickle.dumps(Payload(root / "owned")))
    save("code_inside", altered(extra=Payload(root / "owned")))
    save("tensor", torch.zeros(3))
    save("bare_weights", good["model"])
    save("newer", altered(format=good["format"] + 1))
    save("unknown_arch", altered(config={**config, "arch": "resnet9000"}))
    save("no_arch", altered(config={name: value for name, value in config.items() if name != "arch"}))
    save("config_no_dict", altered(config=[1, 2]))
    save("config_of_text", altered(config={**config, "T": "four"}))
    save("config_of_quoted_numbers", altered(config={**config, "T": "4"}))
    save("config_without_arch", altered(config={**config, "arch": None}))
    save("config_of_numbered_keys", altered(config={**config, 7: 7}))
    save("config_of_another_script", altered(config={**config, "polarity": "both"}))
    save("other_weights", altered(model=dict(list(good["model"].items())[:-1])))
    save("other_shapes", altered(model={name: value[..., None] for name, value in good["model"].items()}))
    save("no_weights", altered(model="weights"))
    save("other_optimizer", altered(optimizer={"state": {}, "param_groups": []}))
    save("no_optimizer", {name: value for name, value in good.items() if name != "optimizer"})
    save("no_history", altered(logged=None))
    classes = {name: value[:7] if name.startswith("classifier") else value for name, value in good["model"].items()}
    save("other_classes", altered(model=classes))
    torch.save({**good["model"], "features.0.weight": good["model"]["features.0.weight"] * torch.nan}, root / "nan.pth")
    (root / "flipped.pth").write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    save("step_beyond", altered(step=10**6))
    save("step_of_text", altered(step="one"))
    save("no_meter", altered(meter={}))
    save("other_layers", altered(rates={"sums": {}, "neurons": {}}))
    save("lacking_format", {name: value for name, value in good.items() if name != "format"})


MODELS = "resnet18, resnet19, vggsnn_cifar, vggsnn_dvs"
DATASETS = "CIFAR10, CIFAR100, MNIST, FashionMNIST, DIGITS"
HUGE = "9" * 20
LONG = "a" * 300

# Command line -> what the message must say
FLAGS: list[tuple[str, list[str]]] = [
    ("--arch resnet99", ["--arch", "'resnet99'", MODELS]),
    ("--arch resnet_18", ["--arch", "'resnet_18', did you mean resnet18?"]),
    ("--scheduler cosin", ["--scheduler", "'cosin', did you mean cosine?"]),
    ("--optim AdmaW", ["--optim", "'AdmaW', did you mean AdamW?"]),
    ("--arch os.system", ["--arch", "'os.system'", MODELS]),
    ("--optim LBFGS", ["--optim", "'LBFGS'", "SGD, Adam, AdamW"]),
    ("--scheduler linear", ["--scheduler", "'linear'", "cosine, step, constant"]),
    ("--step_mode x", ["--step_mode", "'x'", "m, s"]),
    ("--T 0", ["--T", "'0'", "at least 1"]),
    ("--T -3", ["--T", "'-3'", "at least 1"]),
    ("--T 2.5", ["--T", "'2.5'", "whole number"]),
    ("--T four", ["--T", "'four'", "whole number"]),
    ("--T nan", ["--T", "'nan'", "whole number"]),
    (f"--T {HUGE}", ["--T", HUGE, "at most"]),
    ("--T", ["--T", "expected one argument"]),
    ("--train_batch_size 0", ["--train_batch_size", "'0'", "at least 1"]),
    ("--grad_accum 3", ["--train_batch_size", "cannot be divided by --grad_accum 3", "use"]),
    ("--grad_accum 0", ["--grad_accum", "'0'", "at least 1"]),
    ("--run a/b", ["--run", "'a/b'", "plain name"]),
    ("--run .hidden", ["--run", "'.hidden'", "plain name"]),
    ("--train_batch_size -8", ["--train_batch_size", "'-8'", "at least 1"]),
    (f"--train_batch_size {HUGE}", ["--train_batch_size", HUGE, "at most"]),
    ("--val_batch_size 0", ["--val_batch_size", "'0'", "at least 1"]),
    (f"--val_batch_size {HUGE}", ["--val_batch_size", HUGE, "at most"]),
    ("--num_epoch 0", ["--num_epoch", "'0'", "at least 1"]),
    ("--num_workers -1", ["--num_workers", "'-1'", "at least 0"]),
    (f"--num_workers {HUGE}", ["--num_workers", HUGE, "at most"]),
    ("--lr 0", ["--lr", "'0'", "above 0"]),
    ("--lr -0.1", ["--lr", "'-0.1'", "above 0"]),
    ("--lr nan", ["--lr", "'nan'", "above 0"]),
    ("--lr inf", ["--lr", "'inf'", "above 0"]),
    ("--lr 1e300", ["--lr", "'1e300'", "at most"]),
    ("--lr 0,1", ["--lr", "'0,1'", "a number", "write a point"]),
    ("--momentum 1", ["--momentum", "'1'", "below 1"]),
    ("--momentum 0.5 --optim Adam", ["--momentum", "--optim SGD"]),
    ("--val_split 1", ["--val_split", "'1'", "below 1"]),
    ("--val_split 0.01", ["--val_split 0.01 of", "without any on one side", "use another share"]),
    ("--early_stop 0", ["--early_stop", "'0'", "at least 1"]),
    ("--wd -1", ["--wd", "'-1'", "at least 0"]),
    ("--wd nan", ["--wd", "'nan'"]),
    ("--lr_warmup_epochs -1", ["--lr_warmup_epochs", "'-1'", "at least 0"]),
    ("--lr_warmup_epochs 1", ["--lr_warmup_epochs 1", "--num_epoch 1"]),
    ("--label_smoothing 1", ["--label_smoothing", "'1'", "below 1"]),
    ("--mixup_alpha -1", ["--mixup_alpha", "'-1'", "at least 0"]),
    ("--mixup_alpha 1e-300", ["--mixup_alpha", "too small"]),
    ("--cutmix_alpha nan", ["--cutmix_alpha", "'nan'"]),
    ("--clip_grad_norm 0", ["--clip_grad_norm", "'0'", "above 0"]),
    ("--model_ema --model_ema_decay 1", ["--model_ema_decay", "'1'", "below 1"]),
    ("--model_ema_decay 0.9", ["--model_ema_decay", "add --model_ema"]),
    ("--decay 0", ["--decay", "'0'", "below 1"]),
    ("--decay 1", ["--decay", "'1'", "below 1"]),
    ("--decay -0.2", ["--decay", "'-0.2'", "below 1"]),
    ("--decay 1.5", ["--decay", "'1.5'", "below 1"]),
    ("--decay 1e-17", ["decay", "1e-17"]),
    ("--decay nan", ["--decay", "'nan'"]),
    ("--neuron izhikevich", ["--neuron", "'izhikevich'", "lif, plif, if"]),
    ("--neuron if --decay 0.5", ["--decay", "--neuron if", "no leak"]),
    ("--surrogate step", ["--surrogate", "'step'", "sigmoid, atan"]),
    ("--surrogate soft-sign", ["--surrogate", "'soft-sign', did you mean soft_sign?"]),
    ("--alpha 0", ["--alpha", "'0'", "above 0"]),
    ("--alpha inf", ["--alpha", "'inf'"]),
    ("--thresh 0", ["--thresh", "'0'", "above 0"]),
    ("--thresh -1", ["--thresh", "'-1'", "above 0"]),
    ("--thresh inf", ["--thresh", "'inf'"]),
    ("--thresh 1e300", ["--thresh", "'1e300'", "at most"]),
    ("--v_reset nan", ["--v_reset", "'nan'", "a number"]),
    ("--v_reset inf", ["--v_reset", "'inf'", "a number"]),
    ("--v_reset zero", ["--v_reset", "'zero'", "none or a number"]),
    ("--seed -2", ["--seed", "'-2'", "at least -1"]),
    (f"--seed {2**32}", ["--seed", str(2**32), f"at most {2**32 - 1}"]),
    ("--seed 1.5", ["--seed", "'1.5'", "whole number"]),
    ("--save_every -1", ["--save_every", "'-1'", "at least 0"]),
    ("--save_every often", ["--save_every", "'often'", "whole number"]),
    ("--amp fp8", ["--amp", "'fp8'", "off, bf16, fp16"]),
    ("--amp", ["--amp", "expected one argument"]),
    ("--amp fp16 --device cpu", ["--amp fp16", "needs a GPU"]),
    ("--compile", ["--compile", "--method rate"]),
    ("--windows 0", ["--windows", "'0'", "at least 1"]),
    ("--windows 2", ["--windows 2", "--method rate"]),
    ("--rate_flag --T 4 --windows 3", ["--windows 3 does not divide --T 4"]),
    ("--cuda_graph --grad_accum 2", ["--cuda_graph", "without --grad_accum"]),
    ("--cuda_graph --device cpu", ["--cuda_graph needs a GPU"]),
    ("--tf32=on", ["--tf32", "on"]),
    ("--deterministic yes", ["unrecognized", "yes"]),
    ("--compile yes", ["unrecognized", "yes"]),
    ("--no-rate_loss_scale", ["--no-rate_loss_scale", "--method rate"]),
    ("--rate_loss_scale", ["--rate_loss_scale", "--method rate"]),
    ("--method sltt", ["--method sltt", "add --step_mode s"]),
    ("--method sltt --step_mode s --T 4 --sltt_steps 5", ["--sltt_steps 5", "--T 4", "at most 4"]),
    ("--sltt_steps 1", ["--sltt_steps 1", "--method sltt"]),
    ("--method slt", ["unknown", "did you mean sltt?"]),
    ("--loss cee", ["unknown", "did you mean ce?"]),
    ("--tet_weight 0.1", ["--tet_weight 0.1", "--loss tet"]),
    ("--loss tet --tet_weight 2", ["--tet_weight", "at most 1"]),
    ("--rate_penalty -1", ["--rate_penalty", "at least 0"]),
    ("--distill --arch spikformer_small", ["--distill", "spikformer_small names none", "--arch"]),
    ("--distill --arch vgg11 --train_batch_size 1", ["--distill", "--train_batch_size of 2"]),
    ("--distill_kl 0.1", ["--distill_kl 0.1 is of --distill"]),
    ("--distill --distill_ce -1", ["--distill_ce", "at least 0"]),
    ("--channels_last=1", ["--channels_last", "1"]),
    ("--detach_reset=no", ["--detach_reset", "no"]),
    ("--sync_bn yes", ["unrecognized", "yes"]),
    ("--model_ema 0.99", ["unrecognized", "0.99"]),
    ("--weights nowhere.pth", ["no checkpoint at", "nowhere.pth"]),
    ("--log_path file", ["--log_path", "file"]),
    ("--resume nowhere", ["no checkpoint at", "nowhere"]),
    ("--evaluate nowhere", ["no checkpoint at", "nowhere"]),
    ("--report new.json", ["--report", "--evaluate"]),
    ("--nonsense 3", ["unrecognized", "--nonsense 3 (--help lists all)"]),
    ("--batch_size 3", ["unrecognized", "--batch_size", "did you mean --train_batch_size?"]),
    ("--rate-flag", ["unrecognized", "--rate-flag, did you mean --rate_flag?"]),
    ("--learning_rate 0.1", ["unrecognized", "--learning_rate 0.1, did you mean --lr?"]),
    ("--no-rateflag", ["unrecognized", "--no-rateflag, did you mean --no-rate_flag?"]),
    ("--num_epochs=3", ["unrecognized", "--num_epochs=3, did you mean --num_epoch?"]),
    ("--arc vgg11", ["unrecognized", "--arc"]),
    ("word", ["unrecognized", "word"]),
    ("-T 4", ["unrecognized", "-T 4, did you mean --T?"]),
    ("--time-steps 4", ["unrecognized", "did you mean --T?"]),
    ("--no-T", ["unrecognized", "--no-T, did you mean --T?"]),
    ("--rate_flag=yes", ["--rate_flag", "yes"]),
    ("--rate_flag False", ["unrecognized", "False"]),
    ("--device nonsense", ["--device nonsense", "no such device"]),
    ("--device meta", ["--device meta"]),
    ("--device cuda:99", ["--device cuda:99", "no such device"]),
]  # fmt: skip
IMAGE_FLAGS: list[tuple[str, list[str]]] = [
    ("--dataset CIFAR11", ["--dataset", "'CIFAR11'", DATASETS]),
    ("--dataset FOLDER", ["--dataset", "FOLDER is of experiment/imagenet/main.py", DATASETS]),
    ("--image_size 0", ["--image_size", "'0'", "at least"]),
    ("--image_size 2", ["image", "2", "4", "1024"]),
    ("--image_size 5000", ["image", "5000", "4", "1024"]),
    ("--image_size 8.5", ["--image_size", "'8.5'", "whole number"]),
    ("--auto_aug 1", ["unrecognized", "1"]),
    ("--cutout=no", ["--cutout", "no"]),
    ("--augment", ["unrecognized", "--augment"]),
    ("--dataset DIGITS", ["DIGITS", "leave --data_path out"]),
]
FRAME_FLAGS: list[tuple[str, list[str]]] = [
    (
        "--dataset CIFAR10",
        ["--dataset", "CIFAR10 is of experiment/cifar/main.py", "N_MNIST, DVS128_GESTURE"],
    ),
    ("--dataset DIGITS_DVS", ["DIGITS_DVS makes its own", "name the --dataset"]),
    ("--augment=no", ["--augment", "no"]),
    ("--frames raw", ["--frames", "'raw'", "published, counts"]),
    ("--image_size 48", ["unrecognized", "--image_size"]),
    ("--cutout", ["unrecognized", "--cutout"]),
    ("--T 3", ["--T 3", "2 frames"]),
    ("--dataset N_CALTECH101", ["frames names no classes", "experiment/dvs/prepare.py"]),
    ("--dataset FRAMES", ["no folder of .npz files a class"]),
    ("--dataset DVS128_GESTURE --data_path absent", ["absent is not a directory with train/0.pt"]),
    ("--arch vggsnn_dvs --train_batch_size 1 --T 2 --step_mode s --data_path f_gap", ["f_gap/train/1.pt is missing"]),
]
FOLDER_FLAGS: list[tuple[str, list[str]]] = [
    ("--dataset CIFAR10", ["--dataset", "CIFAR10 is of experiment/cifar/main.py", "IMAGENET, FOLDER"]),
    ("--image_size 2", ["--image_size", "'2'", "at least 4"]),
    ("--cutout", ["unrecognized", "--cutout"]),
    ("--data_path absent", ["absent"]),
    ("--data_path file", ["file"]),
    ("--data_path empty", ["empty holds no val/"]),
    ("--data_path data", ["data holds no val/"]),
    ("--resume run", ["run/last.pth", "another script", "CIFAR10"]),
]
DATA: list[tuple[str, list[str]]] = [
    ("--dataset CIFAR10", ["CIFAR10 needs --data_path"]),
    ("--dataset CIFAR10 --data_path empty", ["empty/cifar-10-batches-py", "download failed", "no network"]),
    ("--dataset CIFAR10 --data_path absent/deeper", ["absent/deeper/cifar-10-batches-py", "download failed"]),
    ("--dataset MNIST --data_path empty", ["empty/MNIST/raw", "download failed"]),
    ("--dataset CIFAR10 --data_path file", ["file", "not a directory"]),
    ("--dataset CIFAR10 --data_path file/below", ["file"]),
    ("--dataset CIFAR10 --data_path run/last.pth", ["run/last.pth", "not a directory"]),
    ("--dataset CIFAR10 --data_path ~nobody_of_that_name/data", ["~nobody_of_that_name"]),
    (f"--dataset CIFAR10 --data_path {LONG}", ["--data_path", "name too long"]),
    ("--dataset CIFAR100 --data_path data", ["data/cifar-100-python", "download failed"]),
    ("--dataset CIFAR10 --data_path truncated", ["truncated/cifar-10-batches-py/data_batch_2", "truncated or"]),
    ("--dataset CIFAR10 --data_path partly", ["partly/cifar-10-batches-py", "lacks data_batch_3"]),
    ("--dataset CIFAR10 --data_path odd", ["odd/cifar-10-batches-py/test_batch", "contains code"]),
    ("--dataset CIFAR10 --data_path locked", ["locked", "permissions"]),
    ("--dataset CIFAR10 --data_path no_pickle", ["data_batch_1", "truncated or no pickle"]),
    ("--dataset CIFAR10 --data_path listed", ["data_batch_1", "no dictionary"]),
    ("--dataset CIFAR10 --data_path narrow", ["data_batch_4", "shape (2, 3071)"]),
    ("--dataset CIFAR10 --data_path real", ["data_batch_4", "no array of bytes"]),
    ("--dataset CIFAR10 --data_path labelled", ["data_batch_5", "label 10 is out of range"]),
    ("--dataset CIFAR10 --data_path negative", ["data_batch_5", "label -1 is out of range"]),
    ("--dataset CIFAR10 --data_path unequal", ["data_batch_5", "2 images and 1 labels"]),
    ("--dataset CIFAR10 --data_path unnamed", ["batches.meta", "list of 10 names"]),
    ("--dataset MNIST --data_path mnist_cut", ["train-images-idx3-ubyte", "truncated"]),
    ("--dataset MNIST --data_path mnist_head", ["t10k-labels-idx1-ubyte", "header"]),
    ("--dataset MNIST --data_path mnist_label", ["train-labels-idx1-ubyte", "label 10 is out of range"]),
]  # fmt: skip
FRAME_DATA: list[tuple[str, list[str]]] = [  # directory -> what the message must say
    ("empty", ["train/0.pt", "manifest.json"]),
    ("absent", ["absent", "train/0.pt"]),
    ("file", ["file", "train/0.pt"]),
    ("data", ["data", "train/0.pt"]),
    ("locked", ["locked", "permissions"]),
    ("f_no_test", ["f_no_test", "test/0.pt"]),
    ("f_empty", ["f_empty/train/0.pt is missing"]),
    ("f_gap", ["f_gap/train/1.pt is missing"]),
    ("f_cut", ["f_cut/train/0.pt cannot be read"]),
    ("f_cut_late", ["f_cut_late/train/3.pt cannot be read"]),
    ("f_cut_test", ["f_cut_test/test/1.pt cannot be read"]),
    ("f_text", ["f_text/train/0.pt cannot be read"]),
    ("f_code", ["f_code/train/0.pt cannot be read", "not run"]),
    ("f_nan", ["f_nan/train/2.pt", "NaN"]),
    ("f_infinite", ["f_infinite/train/0.pt", "infinite"]),
    ("f_negative", ["f_negative/train/0.pt", "negative"]),
    ("f_channels", ["f_channels/train/0.pt", "[2, 3, 8, 8]"]),
    ("f_flat", ["f_flat/train/0.pt", "[2, 8, 8]"]),
    ("f_no_frames", ["f_no_frames/train/0.pt", "no frames"]),
    ("f_label", ["f_label/train/0.pt", "label 10"]),
    ("f_label_text", ["f_label_text/test/0.pt", "label 'cat'"]),
    ("f_triple", ["f_triple/train/0.pt", "a pair"]),
    ("f_alone", ["f_alone/train/0.pt", "Tensor", "a pair"]),
    ("f_longer", ["f_longer/train/2.pt has 3 frames", "--T 3"]),
    ("p_text", ["p_text/manifest.json is no manifest"]),
    ("p_newer", ["p_newer/manifest.json", "'version': 2"]),
    ("p_none", ["p_none/test_frames.npy is missing"]),
    ("p_cut", ["p_cut/train_frames.npy is truncated"]),
    ("p_head", ["p_head/train_frames.npy is truncated or corrupt"]),
    ("p_label", ["p_label/train_labels.npy", "label 10"]),
    ("p_nan", ["p_nan/train_frames.npy", "NaN"]),
]
FITS: list[tuple[str, list[str]]] = [
    ("--dataset DIGITS --arch vgg13", ["vgg13", "8x8", "16x16"]),
    ("--dataset DIGITS --arch vggsnn_dvs", ["vggsnn_dvs", "8x8", "48x48"]),
    ("--dataset DIGITS --arch vggsnn_dvs --image_size 96", ["vggsnn_dvs", "96x96", "48x48"]),
    ("--dataset CIFAR10 --data_path data --arch vggsnn_cifar --image_size 4", ["vggsnn_cifar", "4x4", "8x8"]),
    ("--dataset DIGITS --arch resnet18 --train_batch_size 1", ["--train_batch_size", "single value"]),
    ("--dataset DIGITS --arch resnet18 --train_batch_size 1 --T 4 --step_mode s", ["--train_batch_size"]),
]
LOG_PATHS: list[tuple[str, list[str]]] = [
    ("--log_path file/below", ["--log_path", "file/below"]),
    (f"--log_path {LONG}", ["--log_path", "name too long"]),
    ("--log_path /proc/nowhere", ["--log_path", "/proc/nowhere"]),
]
CHECKPOINTS: list[tuple[str, list[str]]] = [  # for --resume and for --evaluate alike
    ("absent.pth", ["no checkpoint at", "absent.pth"]),
    ("absent/run", ["no checkpoint at", "absent/run"]),
    ("empty", ["no checkpoint at", "empty"]),
    ("several", ["no checkpoint at", "several holds 4 runs, name one", "several/d"]),
    (LONG, ["name too long"]),
    ("", ["''"]),
    ("file", ["file", "not a checkpoint"]),
    ("none.pth", ["none.pth", "not a checkpoint"]),
    ("cut.pth", ["cut.pth", "truncated"]),
    ("run/config.json", ["run/config.json", "not a checkpoint"]),
    ("data/cifar-10-batches-py/test_batch", ["test_batch", "not a checkpoint"]),
    ("code.pth", ["code.pth", "not a checkpoint"]),
    ("code_inside.pth", ["code_inside.pth", "not a checkpoint"]),
    ("tensor.pth", ["tensor.pth", "not a checkpoint of this project"]),
    ("bare_weights.pth", ["bare_weights.pth", "not a checkpoint of this project"]),
    ("lacking_format.pth", ["lacking_format.pth", "not a checkpoint of this project"]),
    ("newer.pth", ["newer.pth", "format 3", "format 2"]),
    ("unknown_arch.pth", ["unknown_arch.pth"]),
    ("no_arch.pth", ["no_arch.pth"]),
    ("config_no_dict.pth", ["config_no_dict.pth"]),
    ("config_of_text.pth", ["config_of_text.pth"]),
    ("config_of_quoted_numbers.pth", ["config_of_quoted_numbers.pth"]),
    ("config_without_arch.pth", ["config_without_arch.pth"]),
    ("config_of_numbered_keys.pth", ["config_of_numbered_keys.pth"]),
    ("other_weights.pth", ["other_weights.pth", "classifier.bias"]),
    ("other_shapes.pth", ["other_shapes.pth", "do not fit"]),
    ("no_weights.pth", ["no_weights.pth"]),
    ("other_classes.pth", ["other_classes.pth", "do not fit", "classifier"]),
    ("flipped.pth", ["flipped.pth", "checksum"]),
    ("dvs_run/last.pth", ["dvs_run/last.pth", "another script", "CIFAR10_DVS_Aug", "use experiment/dvs/main.py"]),
]


WEIGHTS: list[tuple[str, list[str]]] = [  # for --weights
    ("absent.pth", ["no checkpoint at", "absent.pth"]),
    ("empty", ["no checkpoint at", "empty/model_weights.pth"]),
    ("file", ["file is not a checkpoint"]),
    ("cut.pth", ["cut.pth", "damaged"]),
    ("code.pth", ["code.pth is not a checkpoint", "not run"]),
    ("tensor.pth", ["tensor.pth holds no weights", "neither a checkpoint nor a state_dict"]),
    ("run --arch vggsnn_cifar", ["run/model_weights.pth do not fit"]),
    ("no_weights.pth", ["no_weights.pth holds no weights"]),
    ("other_weights.pth", ["other_weights.pth do not fit", "classifier.bias"]),
    ("nan.pth", ["nan.pth", "not finite"]),
    ("flipped.pth", ["flipped.pth", "checksum"]),
    ("dvs_run", ["dvs_run/model_weights.pth do not fit", "features.0.weight"]),
]


def flag_name(flags: str) -> str:
    return flags.split()[0].removeprefix("--").removeprefix("no-")


RESUME: list[tuple[str, list[str]]] = [
    ("--resume run --evaluate run/last.pth", ["--resume", "--evaluate", "exclude"]),
    ("--resume run --run a", ["--resume", "--run", "exclude"]),
    ("--resume run/model_weights.pth", ["run/model_weights.pth", "last.pth"]),
    ("--resume other_optimizer.pth", ["other_optimizer.pth"]),
    ("--resume no_optimizer.pth", ["no_optimizer.pth"]),
    ("--resume no_history.pth", ["no_history.pth"]),
    ("--resume step_beyond.pth", ["step_beyond.pth is damaged", "step 1000000 of 1"]),
    ("--resume step_of_text.pth", ["step_of_text.pth is damaged"]),
    ("--resume no_meter.pth", ["no_meter.pth is damaged"]),
    ("--resume other_layers.pth", ["other_layers.pth is damaged"]),
    ("--resume run --compile", ["--compile contradicts"]),
    ("--resume run --amp bf16", ["--amp bf16 contradicts"]),
    ("--resume run --device cuda:99", ["--device cuda:99"]),
    ("--resume run --data_path empty", ["empty/cifar-10-batches-py", "download failed"]),
    ("--evaluate run/last.pth --run first", ["--run", "training only"]),
    ("--evaluate run/last.pth --lr 0.5", ["--lr", "training only"]),
    ("--evaluate run/last.pth --mixup_alpha 0.2", ["--mixup_alpha", "training only"]),
    ("--evaluate run/last.pth --weights run", ["--weights", "training only"]),
    ("--resume run --weights run", ["--weights", "contradicts", "--weights none"]),
    ("--resume run --model_ema", ["--model_ema contradicts"]),
    ("--evaluate run --report run/last.pth", ["--report", "run/last.pth is there already"]),
    ("--evaluate run --report absent/report.json", ["--report", "absent/report.json", "absent is no directory"]),
    ("--evaluate run --report locked/report.json", ["--report", "locked/report.json cannot be written"]),
    ("--resume run --report new.json", ["--report", "--evaluate"]),
    ("--evaluate run/last.pth --num_epoch 5", ["--num_epoch", "training only"]),
    ("--evaluate run/last.pth --save_every 5", ["--save_every", "training only"]),
    ("--evaluate run/last.pth --compile", ["--compile", "--method rate"]),
    ("--evaluate run/last.pth --data_path labelled", ["label 10 is out of range"]),
    ("--resume config_of_another_script.pth", ["config_of_another_script.pth", "polarity"]),
    *((f"--resume run {flags}", [flag_name(flags), *words]) for flags, words in {
        "--arch resnet19": ["resnet19", "vgg11"],
        "--dataset CIFAR100 --data_path data100": ["CIFAR100", "CIFAR10"],
        "--neuron plif": ["plif", "lif"],
        "--surrogate atan": ["atan", "sigmoid"],
        "--alpha 2": ["2.0", "4.0"],
        "--decay 0.5": ["0.5", "0.2"],
        "--thresh 2": ["2.0", "1.0"],
        "--v_reset 0": ["0.0"],
        "--no-detach_reset": ["run"],
        "--method rate": ["rate", "bptt"],
        "--loss tet": ["tet", "ce"],
        "--T 8": ["8", "2"],
        "--step_mode s": ["s", "m"],
        "--lr 0.5": ["0.5", "0.1", "a new run", "--weights"],
        "--label_smoothing 0.1": ["0.1", "0.0"],
        "--clip_grad_norm 1": ["1.0", "none"],
        "--num_epoch 9": ["9", "1", "a new run", "--weights"],
        "--seed 5": ["5", "0"],
        "--image_size 16": ["16", "8"],
        "--train_batch_size 3": ["3", "128"],
        "--grad_accum 2": ["2", "1"],
        "--no-auto_aug": ["run"],
        "--log_path elsewhere": ["elsewhere"],
    }.items()),
    *((f"--evaluate run/last.pth {flags}", [flag_name(flags), *words]) for flags, words in {
        "--arch resnet19": ["resnet19", "vgg11"],
        "--dataset CIFAR100 --data_path data100": ["CIFAR100", "CIFAR10"],
        "--neuron plif": ["plif", "lif"],
        "--surrogate atan": ["atan", "sigmoid"],
        "--alpha 2": ["2.0", "4.0"],
        "--decay 0.5": ["0.5", "0.2"],
        "--thresh 2": ["2.0", "1.0"],
        "--v_reset 0": ["0.0"],
        "--image_size 16": ["16", "8"],
    }.items()),
]  # fmt: skip


FRAME_RESUME: list[tuple[str, list[str]]] = [
    ("--resume run", ["run/last.pth", "another script", "CIFAR10", "use experiment/cifar/main.py"]),
    ("--evaluate run", ["run/model_weights.pth", "another script", "CIFAR10"]),
    ("--resume dvs_run --T 3", ["--T 3 contradicts", "--T 2"]),
    ("--evaluate dvs_run --T 3", ["--T 3", "2 frames"]),
    ("--evaluate dvs_run --data_path f_cut_test", ["f_cut_test/test/1.pt cannot be read"]),
    ("--evaluate dvs_run --data_path empty", ["train/0.pt"]),
    ("--resume dvs_run --no-augment", ["--no-augment contradicts"]),
]  # fmt: skip


ANALYSES: list[tuple[str, list[str]]] = [
    ("", ["name what to measure", "gradients"]),
    ("rate run", ["COMMAND", "'rate'", "rates"]),
    ("rates", ["required: RUN"]),
    ("rates absent/run", ["no checkpoint at", "absent/run"]),
    ("rates empty", ["no checkpoint at", "empty"]),
    ("confusion file", ["file", "not a checkpoint"]),
    ("energy cut.pth", ["cut.pth", "truncated"]),
    ("shuffle code_inside.pth", ["code_inside.pth", "not a checkpoint"]),
    ("gradients config_of_text.pth", ["config_of_text.pth"]),
    ("rates config_of_another_script.pth", ["config_of_another_script.pth", "polarity"]),
    ("rates other_weights.pth", ["other_weights.pth", "classifier.bias"]),
    ("confusion run --samples 0", ["--samples", "'0'", "at least 1"]),
    ("gradients run --samples 1", ["--samples", "'1'", "at least 2"]),
    ("gradients run --every 0", ["--every", "'0'", "at least 1"]),
    ("shuffle run --repeats none", ["--repeats", "'none'", "whole number"]),
    ("rates run --repeats 2", ["unrecognized", "--repeats"]),
    ("rates run --data_path empty", ["empty/cifar-10-batches-py", "download failed"]),
    ("rates dvs_run --data_path f_cut_test", ["f_cut_test/test/1.pt cannot be read"]),
    ("rates run --device nonsense", ["--device nonsense", "no such device"]),
    ("rates run --out file/below", ["file/below"]),
]


def cases() -> list[Case]:
    """All of them; a line stands for what is typed beside flags that are good."""
    rows = [
        Case(CIFAR, line, [*IMAGES, *GIVEN, *line.split()], words) for line, words in FLAGS + IMAGE_FLAGS + LOG_PATHS
    ]
    rows += [Case(CIFAR, line, [*GIVEN, *line.split()], words) for line, words in DATA + FITS]
    rows += [
        Case(CIFAR, f"{flag} {file or 'nothing'}", [flag, file], words)
        for flag in ("--resume", "--evaluate")
        for file, words in CHECKPOINTS
    ]
    rows += [
        Case(CIFAR, f"--weights {line}", [*IMAGES, *GIVEN, "--weights", *line.split()], words)
        for line, words in WEIGHTS
    ]
    rows += [Case(CIFAR, line, line.split(), words) for line, words in RESUME]
    frames = [*GIVEN, *FRAMES, "--data_path"]
    rows += [Case(DVS, line, [*frames, "frames", *line.split()], words) for line, words in FLAGS + FRAME_FLAGS]
    rows += [Case(DVS, f"--data_path {name}", [*frames, name], words) for name, words in FRAME_DATA]
    rows += [Case(DVS, line, line.split(), words) for line, words in FRAME_RESUME]
    rows += [Case(FOLDERS, line, [*PHOTOS, *GIVEN, *line.split()], words) for line, words in FLAGS + FOLDER_FLAGS]
    rows += [Case(ANALYSIS, line, line.split(), words) for line, words in ANALYSES]
    return rows
