"""Peers of ``store.py``, in a Python that has torch, datasets and sae-lens: prints rows per second as one JSON object.

    python infra/bench/peers_store.py FOLDER WINDOWS LENGTH WIDTH BATCH_ROWS BATCHES

Both read the same number of rows of the same width, from files this script writes first, with a warm cache:

- ``saelens``: the reader of cached activations, a Hugging Face dataset with one row a window, in float32, which is what
  its runner writes (Arrow has no bfloat16), through its mixing buffer of half a million rows at most.
- ``safetensors``: shards of 64 MB in bfloat16, slices of 256 rows in random order into a pool of 64, rows permuted.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

RUNS = 3
SLICE_ROWS, POOL_SLICES = 256, 64


def median_rate(batches: Iterator[torch.Tensor], count: int) -> float:
    """Rows per second of ``count`` batches, median over the runs, after one that is not timed."""
    rates = []
    for run in range(RUNS + 1):
        start = time.perf_counter()
        rows = sum(len(batch) for batch, _ in zip(batches, range(count), strict=False))
        if run:
            rates.append(rows / (time.perf_counter() - start))
    return statistics.median(rates)


def saelens(place: Path, windows: int, length: int, width: int, batch_rows: int) -> Iterator[torch.Tensor]:
    from sae_lens.training.activations_store import ActivationsStore

    features = datasets.Features({"tap": datasets.Array2D(shape=(length, width), dtype="float32")})
    random = np.random.default_rng(0)

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(windows):
            yield {"tap": random.standard_normal((length, width), np.float32)}

    kept = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(place / "cache"))
    kept.save_to_disk(str(place / "saelens"))
    store = ActivationsStore(
        model=SimpleNamespace(),
        dataset=datasets.Dataset.from_dict({"tokens": [[0] * length]}),
        streaming=False,
        hook_name="tap",
        hook_head_index=None,
        context_size=length,
        d_in=width,
        n_batches_in_buffer=64,
        total_training_tokens=windows * length,
        store_batch_size_prompts=16,
        train_batch_size_tokens=batch_rows,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(place / "saelens"),
    )
    return iter(store.get_data_loader())


def safetensors(place: Path, windows: int, length: int, width: int, batch_rows: int) -> Iterator[torch.Tensor]:
    shard_rows = max(SLICE_ROWS, (64 << 20) // (2 * width) // SLICE_ROWS * SLICE_ROWS)
    shards = max(1, windows * length // shard_rows)
    values = torch.randn(shard_rows, width).to(torch.bfloat16)
    for shard in range(shards):
        save_file({"tap": values}, str(place / f"{shard}.safetensors"))
    files = [safe_open(str(place / f"{shard}.safetensors"), "pt") for shard in range(shards)]
    slices = [file.get_slice("tap") for file in files]
    generator = torch.Generator().manual_seed(0)
    per_shard = shard_rows // SLICE_ROWS
    while True:
        order = torch.randperm(shards * per_shard, generator=generator)
        for pool in order.split(POOL_SLICES):
            parts = [
                slices[int(n) // per_shard][int(n) % per_shard * SLICE_ROWS : (int(n) % per_shard + 1) * SLICE_ROWS]
                for n in pool
            ]
            rows = torch.cat(parts)
            for chosen in torch.randperm(len(rows), generator=generator).split(batch_rows):
                if len(chosen) == batch_rows:
                    yield rows[chosen]


def main() -> None:
    place = Path(sys.argv[1])
    windows, length, width, batch_rows, batches = map(int, sys.argv[2:])
    datasets.disable_progress_bars()
    torch.set_num_threads(2)
    found = {}
    for peer in (saelens, safetensors):
        own = place / peer.__name__
        own.mkdir(parents=True)
        found[peer.__name__] = median_rate(peer(own, windows, length, width, batch_rows), batches)
        shutil.rmtree(own)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
