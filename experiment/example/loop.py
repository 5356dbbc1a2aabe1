"""A network and a training loop of one's own, with rate-based backpropagation in two lines. Needs `pip install .`

python experiment/example/loop.py
"""

import torch
from rate_backprop import rate_model_setting
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

T = 4
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)

net = nn.Sequential(
    layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), neuron.LIFNode(), layer.MaxPool2d(2),
    layer.Flatten(), layer.Linear(32 * 16, 128), neuron.LIFNode(), layer.Linear(128, 10),
)  # fmt: skip
rate_model_setting(net, time_step=T, step_mode="m")  # bptt_model_setting(...) for BPTT
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)


def outputs(x: torch.Tensor) -> torch.Tensor:
    """[B, 1, 8, 8] -> [B, 10]: each image at all T steps, and the mean of what comes out."""
    functional.reset_net(net)
    return net(x.expand(T, *x.shape)).mean(0)


for epoch in range(3):
    net.train()
    for batch in torch.randperm(1437).split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs(images[batch]), labels[batch]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (outputs(images[1437:]).argmax(1) == labels[1437:]).float().mean()
    print(f"epoch {epoch + 1}: test accuracy {accuracy:.1%}")
