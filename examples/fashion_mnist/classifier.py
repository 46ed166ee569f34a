"""A small classifier of Fashion-MNIST, whose features stand in for those of large photographs.

Networks trained on photographs of 224 pixels see little in grey pictures of 28. This one is trained
on the 60,000 training pictures in a minute or two; on the 10,000 others it is right nine times in
ten.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.fashion_mnist.data import CLASSES
from pilotage.guidance.files import atomic

FEATURES = 128
EPOCHS, BATCH, RATE = 4, 100, 3e-3


class Classifier(nn.Module):
    """Three convolutions and two linear maps; what is between the latter are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, FEATURES),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(FEATURES, len(CLASSES)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (N, 10) of pictures (N, 1, 28, 28), uint8."""
        return self.head(self.body(pictures.float() / 127.5 - 1))

    @torch.inference_mode()
    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 128), before their activation, and classes (N,) of pictures, uint8."""
        found = [self.body(part.float() / 127.5 - 1) for part in pictures.split(500)]
        features = torch.cat(found)
        return features, self.head(features).argmax(1)

    def train_on(self, pictures: Tensor, labels: Tensor, epochs: int = EPOCHS) -> Classifier:
        """Fit it, from seed 0 on; back in evaluation mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
            optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
            steps = epochs * (len(pictures) // BATCH)
            slope = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
            self.train()
            with tqdm(total=steps, desc="classifier", unit="step") as bar:
                for _ in range(epochs):
                    order = torch.randperm(len(pictures))
                    for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
                        loss = cross_entropy(self(pictures[rows]), labels[rows])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        slope.step()
                        bar.update()
        return self.eval()


def trained(path: Path, pictures: Tensor, labels: Tensor) -> Classifier:
    """The classifier that a safetensors file holds, or else a new one, which it then holds."""
    network = Classifier().eval()
    if path.is_file():
        network.load_state_dict(load_file(path))
        return network
    network.train_on(pictures, labels)
    with atomic(path) as partial:
        save_file(network.state_dict(), partial)
    return network
