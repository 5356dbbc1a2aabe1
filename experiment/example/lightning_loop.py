"""The same in Lightning. Needs `pip install . pytorch-lightning`

python experiment/example/lightning_loop.py
"""

import pytorch_lightning as lightning
import torch
from rate_backprop import rate_model_setting
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

T = 4


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), neuron.LIFNode(), layer.MaxPool2d(2),
            layer.Flatten(), layer.Linear(32 * 16, 128), neuron.LIFNode(), layer.Linear(128, 10),
        )  # fmt: skip
        rate_model_setting(self.net, time_step=T, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self.net)
        return self.net(x.expand(T, *x.shape)).mean(0)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


lightning.seed_everything(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
train, test = torch.utils.data.random_split(data, [1437, 360])
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", **quiet)
trainer.fit(model := Digits(), DataLoader(train, 32, shuffle=True))
(found,) = trainer.test(model, DataLoader(test, 360), verbose=False)
print(f"epoch 3: test accuracy {found['accuracy']:.1%}")
