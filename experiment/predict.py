"""Name what is in images, or in recordings of an event camera, by a network that the training scripts trained.

python experiment/predict.py log/RUN cat.jpg dog.png
python experiment/predict.py log/RUN/model_weights.pth FOLDER --top 1 --json
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util.train.before_torch  # noqa: F401  (before torch)
from util.errors import UserError
from util.train.options import Parser, complain
from util.train.predictor import Predictor
from util.train.values import number

BATCH = 64


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="CHECKPOINT", help="a checkpoint, or a run directory: its best weights")
    parser.add_argument("paths", metavar="FILE", nargs="+",
                        help="images, or recordings if trained on them (.aedat, .bin, .pt); or folders")  # fmt: skip
    parser.add_argument("--top", type=number(int, 1), default=5, metavar="N", help="classes to name (default: 5)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--script", metavar="FILE", help="of your own, which made the run (doc/guide/architecture.md)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the console cannot print
    try:
        predictor = Predictor(args.run, args.device, args.script)
        files = predictor.files(args.paths)
        while batch := list(islice(files, BATCH)):
            rows = predictor.probabilities([predictor.read(file) for file in batch])
            for file, row in zip(batch, rows, strict=True):
                print(line(file, predictor.ranked(row, args.top), args.json), flush=True)
    except (UserError, OSError) as error:
        return complain(parser.prog, error)
    except KeyboardInterrupt:
        return 130
    return 0


def line(file: Path, ranked: list[tuple[str, float]], as_json: bool) -> str:
    if as_json:
        classes = [{"class": name, "probability": round(probability, 6)} for name, probability in ranked]
        return json.dumps({"file": str(file), "classes": classes})
    return f"{file}: " + ", ".join(f"{name} {100 * probability:.2f} %" for name, probability in ranked)


if __name__ == "__main__":
    sys.exit(main())
