"""The same under DistributedDataParallel: each process takes its part of each batch. Needs `pip install .`

torchrun --standalone --nproc_per_node 2 experiment/example/ddp.py
"""

import torch
import torch.distributed as dist
from rate_backprop import rate_model_setting, sync_batch_norm
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = 4
dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights and order in each process
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)

net = nn.Sequential(
    layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), neuron.LIFNode(), layer.MaxPool2d(2),
    layer.Flatten(), layer.Linear(32 * 16, 128), neuron.LIFNode(), layer.Linear(128, 10),
)  # fmt: skip
rate_model_setting(net, time_step=T, step_mode="m")
sync_batch_norm(net)  # statistics over the batch of all processes
parallel = DistributedDataParallel(net)  # in step mode s: of a module whose forward runs all T steps
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)


def outputs(x: torch.Tensor) -> torch.Tensor:
    functional.reset_net(net)
    return parallel(x.expand(T, *x.shape)).mean(0)


for epoch in range(3):
    net.train()
    for batch in torch.randperm(1437)[:1436].split(32):
        own = batch[rank::world]
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs(images[own]), labels[own]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (outputs(images[1437:]).argmax(1) == labels[1437:]).float().mean()
    if rank == 0:
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.1%}")
dist.destroy_process_group()
