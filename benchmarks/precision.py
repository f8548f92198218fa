"""Memory layout and precision: which is fastest on this device, for training and for scoring.

    python benchmarks/precision.py [--backbone tf_efficientnet_lite0] [--size 128]

What `training.precision = "auto"` and the channels-last layout rest on. One thread on a CPU, as folds
side by side train; every way takes its turn in each round, and the median over rounds is printed.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import timm
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    ways = [(layout, precision) for layout in ("channels first", "channels last") for precision in ("fp32", "bf16")]
    rates: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(options.rounds):
        for layout, precision in ways:
            for phase, rate in measure(options, device, layout, precision).items():
                rates.setdefault((phase, layout, precision), []).append(rate)
    print(f"{options.backbone}, {options.size} px, batch {options.batch}, {device.type}, images/s (median)")
    for phase in ("training", "scoring"):
        reference = median(rates[phase, "channels first", "fp32"])
        for layout, precision in ways:
            rate = median(rates[phase, layout, precision])
            print(f"{phase:9} {layout:15} {precision}  {rate:8.1f}   {rate / reference:.2f}")


def measure(options: argparse.Namespace, device: torch.device, layout: str, precision: str) -> dict[str, float]:
    memory = torch.channels_last if layout == "channels last" else torch.contiguous_format
    network = timm.create_model(options.backbone, num_classes=1).to(device, memory_format=memory)
    x = torch.randn(options.batch, 3, options.size, options.size, device=device).contiguous(memory_format=memory)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(x).float().square().mean()

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    def rate(work: object, repeats: int) -> float:
        assert callable(work)
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return options.batch * repeats / (time.perf_counter() - started)

    repeats = 2 if device.type == "cpu" else 20
    network.train()
    training = rate(step, repeats)
    network.eval()
    with torch.inference_mode():
        scoring = rate(forward, repeats)
    return {"training": training, "scoring": scoring}


if __name__ == "__main__":
    main()
