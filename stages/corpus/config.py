"""Settings of the corpus stage."""

from typing import Annotated, ClassVar, Literal

from saex_pipe.common.config import Resource, StageConfig, setting


class Config(StageConfig):
    """Text to windows of token ids."""

    stage: ClassVar[str] = "corpus"
    folder: ClassVar[str] = "corpus"

    source: Annotated[tuple[str, ...], Resource()] = setting(
        unit="URIs",
        meaning="text files: .txt (one document each), .jsonl or .parquet, each also .gz or .zst",
        min_length=1,
    )
    text_field: str = setting("text", unit="", meaning="field or column that holds the text of a document")
    chat_field: str | None = setting(
        None,
        unit="",
        meaning="field or column with a list of messages (role, content), which the model's chat template turns into "
        "the text of a document; unset: text_field is read as it is",
    )
    tokenizer: Annotated[str, Resource()] = setting(
        unit="URI", meaning="GGUF file or Hugging Face folder whose tokenizer to use (in a chain: the model's)"
    )
    window_length: int = setting(128, unit="tokens", meaning="length of a window", ge=2, le=1 << 20)
    max_tokens: int | None = setting(None, unit="tokens", meaning="size of the store; unset: all the text", ge=1)
    max_document_tokens: int | None = setting(
        None, unit="tokens", meaning="tokens taken of one document, from its start; unset: all of it", ge=1
    )
    packing: Literal["packed", "padded"] = setting(
        "packed",
        unit="",
        meaning="packed: documents end to end; padded: each starts a window, and its last one is padded",
    )
    holdout_fraction: float = setting(
        0.1, unit="fraction of windows", meaning="windows kept from training, of documents of their own", ge=0, lt=1
    )
    document_order: Literal["shuffled", "source"] = setting(
        "shuffled", unit="", meaning="order in which documents are taken; shuffled reads through every source once more"
    )
    seed: int = setting(0, unit="", meaning="seed of the document order", ge=0, lt=1 << 63)
    prepend_bos: Literal["auto", "always", "never"] = setting(
        "auto", unit="", meaning="whether a window starts with the BOS token; auto: where the tokenizer adds one"
    )
    runner: str = setting(
        "FnApiRunner", unit="", meaning="Apache Beam runner; FnApiRunner works in this process", affects_result=False
    )
    runner_options: tuple[str, ...] = setting(
        (), unit="flags", meaning="options passed through to the runner, such as --region=...", affects_result=False
    )
