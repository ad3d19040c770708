"""Train the shipped Fashion-MNIST networks and cut the shipped subset of the images.

Writes fashion_mnist.npz, fashion_cnn.safetensors and fashion_resnet.safetensors to
skperf/datasets/data and prints the accuracies. Needs the full data set:

    python -m benchmarks.data fetch fashion_mnist
    PYTHONPATH=. python scripts/train_fashion_networks.py
"""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data.recipes import prepare
from skperf.backbone.architectures import SmallConvNet, SmallResNet

DATA = Path(__file__).parents[1] / "skperf" / "datasets" / "data"
TRAIN_ROWS_PER_CLASS = 100
TEST_ROWS_PER_CLASS = 200
BATCH_SIZE = 128


def balanced_rows(target: np.ndarray, n_per_class: int, random_state: np.random.RandomState):
    """Return sorted indices of `n_per_class` random rows of every class."""
    rows = [
        random_state.choice(np.flatnonzero(target == code), n_per_class, replace=False)
        for code in np.unique(target)
    ]
    return np.sort(np.concatenate(rows))


def write_subset(arrays: dict[str, np.ndarray]) -> None:
    """Write the shipped rows: part of the training set, then part of the test set."""
    random_state = np.random.RandomState(0)
    train = balanced_rows(arrays["target_train"], TRAIN_ROWS_PER_CLASS, random_state)
    test = balanced_rows(arrays["target_test"], TEST_ROWS_PER_CLASS, random_state)
    np.savez_compressed(
        DATA / "fashion_mnist.npz",
        images_train=arrays["images_train"][train],
        target_train=arrays["target_train"][train],
        images_test=arrays["images_test"][test],
        target_test=arrays["target_test"][test],
    )


def jitter(images: Tensor) -> Tensor:
    """Mirror half of the images and shift each batch by up to two pixels."""
    images = torch.where(torch.rand(len(images), 1, 1) < 0.5, images.flip(2), images)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return F.pad(images, (2 + right, 2 - right, 2 + down, 2 - down))[:, 2:-2, 2:-2]


def train(network: nn.Module, images: Tensor, target: Tensor, n_epochs: int, lr: float) -> None:
    """Train with AdamW and a one-cycle schedule; the user's defaults would do as well."""
    n_steps = n_epochs * -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps)
    network.to(memory_format=torch.channels_last).train()
    for epoch in range(n_epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(network(jitter(images[rows])), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1}: {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, target: Tensor) -> float:
    """Return the share of right answers."""
    right = [
        (network(x).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), target.split(1000), strict=True)
    ]
    return float(torch.stack(right).sum() / len(images))


def main() -> None:
    """Train both networks on the whole training set and measure on the whole test set."""
    torch.set_num_threads(1)
    arrays = dict(np.load(prepare("fashion_mnist")))
    write_subset(arrays)
    images, test_images = (
        torch.from_numpy(arrays[f"images_{subset}"]).float() / 255 for subset in ("train", "test")
    )
    target, test_target = (
        torch.from_numpy(arrays[f"target_{subset}"]).long() for subset in ("train", "test")
    )
    plan = {
        "fashion_cnn": (SmallConvNet, 6, 4e-3, torch.float32),
        "fashion_resnet": (SmallResNet, 6, 4e-3, torch.float16),
    }
    for name, (architecture, n_epochs, lr, stored) in plan.items():
        torch.manual_seed(0)
        network = architecture()
        print(name, sum(p.numel() for p in network.parameters()), "parameters", flush=True)
        train(network, images, target, n_epochs, lr)
        print(f"  test accuracy {accuracy(network, test_images, test_target):.4f}")
        state = {
            key: (value.to(stored) if value.is_floating_point() else value).contiguous()
            for key, value in network.state_dict().items()
        }
        save_file(state, DATA / f"{name}.safetensors")
        network.load_state_dict(state)
        print(f"  as stored     {accuracy(network, test_images, test_target):.4f}")
        print(
            f"  training rows {accuracy(network, images[:10000], target[:10000]):.4f}", flush=True
        )


if __name__ == "__main__":
    main()
