"""Train the same model with the pipelines "recipe" and "device" on equal seeds, and compare.

    python scripts/compare_pipelines.py --data digits --epochs 12 --seeds 0 1 2

One line of JSON per run, then mean and spread per pipeline. Weights, order and dropout follow the
seed; the two pipelines draw the same distributions from different random numbers.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn import functional as F

from lsmha_fast import create_model, data


def train(pipeline, seed, options):
    """Accuracy on the test split after the last epoch, and the mean training loss of it."""
    sets = {"tier": "easy"} if options.data == "glyphs100" else {}
    train_set = data.load_dataset(options.data, "train", **sets)
    test_set = data.load_dataset(options.data, "test", **sets)
    torch.manual_seed(seed)
    model = create_model(options.model, train_set.num_classes, num_heads=options.num_heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    batches = data.make_batches(
        train_set, batch_size=options.batch_size, pipeline=pipeline, seed=seed
    )
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, steps)
    start = time.perf_counter()
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for images, targets in batches.epoch(epoch):
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
    seconds = time.perf_counter() - start
    return total / len(batches), accuracy(model, test_set), seconds


@torch.no_grad()
def accuracy(model, dataset):
    model.eval()
    right = 0
    for images, labels in data.Batches(dataset, 500):
        x = data.normalize(images, dataset.mean, dataset.std)
        right += int((model(x).argmax(1) == labels).sum())
    return right / len(dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=("digits", "glyphs100"))
    parser.add_argument("--model", default="cct_2_3x2_32")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    found = {"recipe": [], "device": []}
    for seed in options.seeds:
        for pipeline, results in found.items():
            loss, right, seconds = train(pipeline, seed, options)
            results.append((loss, right))
            row = {"pipeline": pipeline, "seed": seed, "train_loss": round(loss, 4)}
            row |= {"test_accuracy": round(right, 4), "seconds": round(seconds, 1)}
            print(json.dumps(row), flush=True)
    for pipeline, results in found.items():
        loss, right = zip(*results, strict=True)
        print(f"{pipeline}: test accuracy {spread(right)}, last training loss {spread(loss)}")


def spread(values):
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} +- {deviation:.4f} (n = {len(values)})"


if __name__ == "__main__":
    main()
