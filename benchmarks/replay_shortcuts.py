"""What going back costs beyond a bare loop, and what shortcuts would leave out of the scores.

    python -m benchmarks.replay_shortcuts

Rows whose loss hardly has a slope are left out of a step, or curvature is taken at every k-th
step only, k times as large. Neither is in the package: this says why.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import runner
from benchmarks.replay import trained
from benchmarks.replay_configurations import Configuration, digits
from skperf.influence import replay_products
from skperf.influence.replay import Budget, replayed
from skperf.influence.replay_chain import Chain


class Shortened(Chain):
    """A chain that leaves work out; its first step, which is held against autograd, is whole."""

    least, every = 0.0, 1  # slope of a row's loss that counts; steps from curvature to curvature
    kept: list[float] = []  # noqa: RUF012  # shares of rows, over all steps
    taken = -2

    def take(self, *given: Any) -> None:
        """Run forwards and back, and choose the rows."""
        super().take(*given)
        self.taken += 1
        if self.taken >= 0:
            keep = self.slope.abs().sum(0) >= self.least
            self.kept.append(float(keep.float().mean()))
            self.unit, self.scale = self.unit * keep, self.scale * keep
            self.scaled = self.share * self.scale

    def pull(self, towards: Any, into: Any, buffers: Any, scale: float) -> Any:
        """Add the Hessian products of a step that has any."""
        if self.taken % self.every == 0 or self.taken < 0:
            # rows' own rates are not scaled
            more = self.every if self.taken >= 0 else 1
            rows, labels = super().pull(towards, into, buffers, scale * more)
            return rows / more, labels
        moving: Tensor | None = None
        for link in self.links:
            moving = link.moved(moving, towards)
        assert moving is not None
        return self._curved(moving)[0].mul_(scale), None


def main() -> None:
    torch.set_num_threads(1)
    replay_products.Chain = Shortened
    rows = []
    for width, n_queries in ((32, 20), (512, 6)):
        config = Configuration(f"MLP 64-{width}-10, SGD", digits, (width,), nn.Tanh, lr=0.1)
        net, asked, _ = trained(config, 0)
        fitted, part = replayed(net.run_.recorded, Budget(tolerance=0)), slice(0, n_queries)
        whole = None
        for least, every in ((0, 1), (0.1, 1), (0.2, 1), (0.4, 1), (0, 2), (0, 4), (0, 8)):
            Shortened.least, Shortened.every, Shortened.kept = least, every, []
            found = fitted.influence(asked.inputs[part], asked.targets[part])
            if whole is None:
                whole = found
                continue
            errors = (found - whole).norm(dim=1) / whole.norm(dim=1)
            rows.append(
                {
                    "network": config.name,
                    "seed": 0,
                    "shortcut": f"slopes from {least:g} on" if least else f"every {every} steps",
                    "rows that are left": float(np.mean(Shortened.kept)),
                    "steps with curvature": 1 / every,
                    "median error": float(errors.median()),
                    "worst error": float(errors.max()),
                }
            )
            print(*rows[-1].values(), flush=True)
    runner.save(runner.RESULTS / "replay_shortcuts.json", rows)


if __name__ == "__main__":
    main()
