#!/usr/bin/env bash
# The method, installed from its sdist and then from its wheel, trains a network in a directory that holds a user's own
# util.py and model.py. Runs in the environment that is active.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT

# From a copy: setuptools leaves build directories beside pyproject.toml.
mkdir "$directory/source" "$directory/mine"
cp -r "$repository"/{pyproject.toml,README.md,LICENSE,util} "$directory/source"
pip install -q build
python -m build --outdir "$directory/dist" "$directory/source" > /dev/null

cd "$directory/mine"
echo 'who = "the user"' | tee util.py > model.py
for package in "$directory"/dist/*.{tar.gz,whl}; do
  pip uninstall -q -y rate-based-backpropagation 2> /dev/null
  pip install -q "$package"
  for name in util model experiment; do
    if (cd / && python -c "import $name" 2> /dev/null); then
      echo "$package gives a module '$name', a name that users have for their own" >&2
      exit 1
    fi
  done
  python - <<'PY'
import pathlib

import model
import rate_backprop
import torch
import util
from rate_backprop import rate_model_setting
from spikingjelly.activation_based import layer, neuron

torch.manual_seed(0)
net = torch.nn.Sequential(layer.Linear(8, 64), neuron.LIFNode(v_threshold=0.1), layer.Linear(64, 3))
rate_model_setting(net, time_step=4, step_mode="m")
net(torch.rand(4, 5, 8)).mean(0).square().sum().backward()

assert util.who == model.who == "the user"
assert all(p.grad.abs().sum() > 0 for p in net.parameters())
assert pathlib.Path(rate_backprop.__file__).with_name("py.typed").exists()
PY
done
