"""What makes which page or picture in doc/, and with which commit its numbers came.

python experiment/report/pages.py                  the list
python experiment/report/pages.py --make NAME ...  makes those whose path holds a NAME, on this CPU; all: --make doc
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = "experiment/report"
PAGES = {
    "doc/method/method.png": f"{REPORT}/method_figure.py",
    "doc/method/gradient_agreement.csv": f"{REPORT}/gradient_agreement.py",
    "doc/reference/options.md": f"{REPORT}/options.py",
    "doc/results/augmentation_samples.png": f"{REPORT}/augmentation_samples.py",
    "doc/results/digits.csv": f"{REPORT}/results.py digits",
    "doc/results/digits_dvs.csv": f"{REPORT}/results.py digits_dvs",
    "doc/results/event_samples.png": f"{REPORT}/event_samples.py",
    "doc/results/scale_results.csv": f"{REPORT}/loss_scale.py",
    "doc/benchmark/cpu.csv": "experiment/benchmark/main.py --T 2 4 --batch_size 8 --repeats 3 --compile --windows 2 "
    "--out doc/benchmark",
}
# These need more than the repository: data, runs or a GPU; the page says how.
ELSEWHERE = {
    "doc/results/nmnist.csv": f"{REPORT}/results.py nmnist --data_path DIR",
    "doc/results/fashion.csv": f"{REPORT}/results.py fashion --data_path DIR",
    "doc/results/cifar10_results.csv": f"{REPORT}/cifar10_results.py RUN ...",
    "doc/results/real_samples.png": f"{REPORT}/real_samples.py --n_mnist DIR --fashion_mnist DIR",
    "doc/results/analysis_digits_gradients.csv": "experiment/analysis/main.py COMMAND RUN",
    "doc/benchmark/gpu.md": "experiment/benchmark/gpu.py --out DIR",
}


def made(file: str) -> str:
    """The commit that last changed what the file holds, renaming apart, and its day."""
    last = ["git", "log", "-1", "--follow", "--diff-filter=AM", "--format=%h %as", "--", file]
    found = subprocess.run(last, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return found or "not made"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", nargs="+", metavar="NAME")
    names = parser.parse_args().make
    for page, command in {**PAGES, **({} if names else ELSEWHERE)}.items():
        if not names:
            print(f"{page:42} {made(page):20} python {command}")
        elif any(name in page for name in names):
            subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
