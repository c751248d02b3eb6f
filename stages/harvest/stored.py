"""What a harvest stores: its taps, spelt out, and the type of each."""

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.stages.harvest.config import Config


def stored_dtypes(config: Config, architecture: Architecture) -> dict[str, str]:
    """The taps of a harvest from this model, and what each is stored as (a key of ``DTYPES``)."""
    taps = tap_names.expand(config.taps, architecture)
    found: dict[str, str] = dict.fromkeys(taps, config.store_dtype)
    for text in config.tap_dtypes:
        pattern, _, dtype = text.partition("=")
        if dtype not in DTYPES:
            raise InputError(f"harvest.tap_dtypes has {text!r}", f"write PATTERN=DTYPE with one of {', '.join(DTYPES)}")
        named = [tap for tap in tap_names.expand((pattern,), architecture) if tap in found]
        if not named:
            raise InputError(
                f"harvest.tap_dtypes has {text!r}, which is none of the taps", f"harvest.taps holds {', '.join(taps)}"
            )
        found |= dict.fromkeys(named, dtype)
    return found
