"""The peer of the quality benchmark, in a Python of its own: SAELens trains on given rows with its defaults.

    python infra/bench/peers_quality.py '{"variant": "topk", "k": 32, "latents": ..., "batch_rows": ..., "threads": ...,
        "rows": "rows.npy", "held_out": "held.npy", "moments": [...], "scaled": false}'

``rows`` are float32 rows in the order in which they are trained on; ``moments`` are numbers of rows after which the
SAE is scored on those held out, with the codes it has in training: one JSON line each, with ``rows``, ``l0`` and
``fvu``. With ``scaled`` all rows are multiplied so that those trained on have a mean norm of sqrt(width), as SAELens
does where it is told to normalise. Every other setting is SAELens' default, a constant learning rate of 3e-4 included.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch
from peers_train import Case, saelens_sae


def scores(sae: Any, held_BD: torch.Tensor) -> dict[str, float]:
    """Active latents per row, and the fraction of the variance that is not explained."""
    with torch.no_grad():
        codes_BF = sae.encode(held_BD)
        error = (held_BD - sae.decode(codes_BF)).square().sum()
        variance = (held_BD - held_BD.mean(dim=0)).square().sum()
        return {"l0": float((codes_BF > 0).sum() / len(held_BD)), "fvu": float(error / variance)}


def main() -> None:
    """Train once, and score on the way."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    warnings.simplefilter("ignore")
    request = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(request["threads"])
    rows_BD, held_BD = (np.load(request[name], mmap_mode="r") for name in ("rows", "held_out"))
    batch_rows, width = request["batch_rows"], rows_BD.shape[1]
    norm = float(np.linalg.norm(rows_BD[: 1 << 16], axis=1).mean())
    factor = np.float32(math.sqrt(width) / norm if request["scaled"] else 1.0)
    case = Case(
        peer="saelens",
        variant=request["variant"],
        rows=batch_rows,
        width=width,
        latents=request["latents"],
        k=request["k"],
        precision="float32",
        compile=False,
        threads=request["threads"],
    )
    sae = saelens_sae(case)
    held = torch.from_numpy(held_BD * factor)
    name = f"sae-lens {metadata.version('sae-lens')} {request['variant']}"

    def score(rows: int) -> None:
        print(json.dumps({"name": name, "rows": rows, **scores(sae, held)}), file=answers, flush=True)

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(rows_BD), batch_rows):
            if start in request["moments"]:
                score(start)
            yield torch.from_numpy(rows_BD[start : start + batch_rows] * factor)

    configuration = SAETrainerConfig(
        total_training_samples=len(rows_BD),
        train_batch_size_samples=batch_rows,
        lr_end=3e-5,  # which its runner sets and a constant schedule does not use
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(configuration, sae, batches()).fit()
    score(len(rows_BD))


if __name__ == "__main__":
    main()
