"""A feature cache as a real run leaves it, made up: English contexts, awkward tokens, dead and dense latents."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saex_pipe.common.formats import feature_cache as fc
from saex_pipe.common.formats.folder import Folder

LATENTS = 240
DEAD = (7, 11, 200)
DENSE = 5
HOSTILE = 42  # its tokens try to break out of the page
HOSTILE_TOKENS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'onmouseover='alert(3)",
    "</style></mark>",
    "&lt;b&gt;",
    "\u202egnp.exe",
    "\x00\x1b[31m",
    "$title",
    "javascript:alert(4)",
    "<!--",
]
TEXT = """
The Congress of the United States has, since the peace, been steadily engaged in the great work of reform.\n\n
Our commerce with foreign nations is in a prosperous condition; the revenue of the Treasury exceeds the estimates.\n
I recommend that an appropriation be made for the relief of the Indian tribes upon our western frontier.
War has been averted, and the army and navy of the Republic remain in a state of readiness for the public defense.
Tonight I ask every family in America to believe in the promise of our schools, our workers, and our children.
In the fiscal year ending June 30, 1887, the receipts were $371,403,277.66 and the expenditures $267,932,179.97.
It is a matter of congratulation that the treaty with Great Britain respecting the fisheries was duly ratified.
Internationalization, counterrevolutionaries and antidisestablishmentarianism are words seldom heard in this Hall.
"""


def words() -> list[str]:
    """TEXT as tokens that keep their leading space, as language models have them."""
    tokens = []
    for line in TEXT.strip().split("\n"):
        tokens += [word if i == 0 else f" {word}" for i, word in enumerate(line.split(" "))] + ["\n"]
    return [token for token in tokens if token]


def features(rng: np.random.Generator, rows: int, text: bool) -> dict[str, Any]:
    rate = 10 ** rng.normal(-2.9, 0.55, LATENTS)
    rate[list(DEAD)] = 0
    rate[DENSE] = 0.62
    count = np.minimum(rate * rows, rows).astype(np.int64)
    largest = np.where(count > 0, rng.gamma(4, 5, LATENTS), 0).astype(np.float32)
    decay = np.exp(-np.linspace(0, 6, 24))
    histogram = (count[:, None] * decay / decay.sum() * rng.uniform(0.5, 1.5, (LATENTS, 24))).astype(np.int64)
    vocabulary = words()
    effects = np.sort(rng.gamma(2, 0.4, (LATENTS, 8)), axis=1)[:, ::-1].astype(np.float32)
    shown = [[vocabulary[i] for i in rng.integers(0, len(vocabulary), 8)] if text else [] for _ in range(2 * LATENTS)]
    if text:
        shown[HOSTILE] = HOSTILE_TOKENS[:8]
    others = np.stack([(np.arange(LATENTS) + step) % LATENTS for step in (1, 5, 60, 100, 133)], axis=1)
    return {
        "feature": np.arange(LATENTS, dtype=np.int32),
        "firing_count": count,
        "firing_rate": (count / rows).astype(np.float32),
        "mean_activation": largest * np.float32(0.22),
        "max_activation": largest,
        "histogram": histogram,
        "histogram_edges": (np.linspace(0, 1, 25) * largest[:, None]).astype(np.float32),
        "top_output_tokens": shown[:LATENTS],
        "top_output_effects": effects if text else [[]] * LATENTS,
        "bottom_output_tokens": shown[LATENTS:],
        "bottom_output_effects": -effects if text else [[]] * LATENTS,
        "nearest_features": others.astype(np.int32),
        "nearest_cosines": np.tile(np.array([0.62, 0.44, 0.31, 0.18, -0.07], np.float32), (LATENTS, 1)),
    }


def example(
    rng: np.random.Generator, vocabulary: list[str], feature: int, strength: float, text: bool
) -> dict[str, Any]:
    """One context of 28 tokens; the feature's favourite word, where it comes, is the peak."""
    start = int(rng.integers(0, len(vocabulary) - 28))
    tokens = vocabulary[start : start + 28]
    favourite = vocabulary[feature % len(vocabulary)]
    peak = tokens.index(favourite) if favourite in tokens else int(rng.integers(8, 20))
    if favourite not in tokens:
        tokens[peak] = favourite
    if feature == HOSTILE:
        tokens = (HOSTILE_TOKENS * 3)[:28]
    activations = np.zeros(28, np.float32)
    activations[rng.integers(0, 28, 3)] = strength * rng.random(3)
    activations[max(peak - 1, 0)] = strength * 0.45
    activations[peak] = strength
    window = int(rng.integers(0, 4000))
    return {
        "feature": feature,
        "window": window,
        "position": 60 + peak,
        "activation": strength,
        "context_start": 60,
        "context_activations": activations.tolist(),
        "context_tokens": tokens if text else [],
    }


def examples(rng: np.random.Generator, largest_F: np.ndarray, text: bool) -> dict[str, Any]:
    vocabulary = words()
    rows = []
    for feature, largest in enumerate(largest_F.tolist()):
        if largest == 0:
            continue
        for stratum, low, high, number in (("top", 0.75, 1.0, 12), ("q1", 0.0, 0.3, 4), ("q10", 0.6, 0.75, 4)):
            strengths = np.sort(rng.uniform(low, high, number))[::-1] * largest
            for rank, strength in enumerate(strengths.tolist()):
                row = example(rng, vocabulary, feature, float(np.float32(strength)), text)
                rows.append(row | {"stratum": stratum, "rank": rank})
    return {name: [row[name] for row in rows] for name in fc.EXAMPLES_SCHEMA.names}


def write_manifest(folder: Folder, stage: str) -> None:
    """What the view stage asks of an upstream folder: finished, by that stage, with a digest."""
    empty: dict[str, Any] = {}
    fields = {"stage": stage, "schema_version": 1, "digest": f"{stage} digest", "finished_at": "2024-01-01T00:00:00"}
    others = ("fingerprint", "config", "versions", "contents", "totals", "timings")
    folder.write("manifest.json", json.dumps(fields | dict.fromkeys(others, empty)).encode())


@pytest.fixture(scope="session")
def made_caches(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A finished cache with text, and one as synthetic activations leave it."""
    paths = {}
    for text in (True, False):
        paths[text] = tmp_path_factory.mktemp("made")
        folder = Folder(str(paths[text]))
        rng = np.random.default_rng(0)
        columns = features(rng, 250_000, text)
        model = "SmolLM2-135M-Instruct.Q4_1.gguf" if text else ""
        fc.write_features(folder, columns, fc.CacheSource(model, "blocks.15.resid_pre", "topk", 250_000))
        fc.write_examples(folder, [examples(rng, columns["max_activation"], text)])
        write_manifest(folder, "cache")
    return paths


@pytest.fixture
def make_cache(made_caches: dict[bool, Path], tmp_path: Path) -> Callable[..., Folder]:
    """Gives a test a cache of its own."""

    def make(text: bool = True) -> Folder:
        return Folder(str(shutil.copytree(made_caches[text], tmp_path / ("cache" if text else "toy_cache"))))

    return make


@pytest.fixture
def scores(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "scores"))
    values = {"l0": 32.0, "fvu": 0.1934, "ce_recovered": 0.9731, "dead_fraction": 0.0125, "kl": 0.11}
    folder.write("scores.json", json.dumps(values).encode())
    write_manifest(folder, "evaluate")
    return folder
