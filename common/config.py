"""Stage configurations: frozen pydantic models whose fields carry a unit and a meaning.

The digest of a configuration covers what changes the result, not how or where it is computed: fields
declared with ``affects_result=False`` are left out, and so are URIs (an input counts by the digest of
what it holds, see ``formats.manifest``).
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_args, get_origin

import pydantic

from saex_pipe.common.errors import InputError


@dataclass(frozen=True)
class Upstream:
    """Marks a field that holds the URI of another stage's output folder."""

    folder: str  # the folder under the run root where the chain puts that output
    only_with: tuple[str, ...] = ()  # an optional field is filled in where the chain has one of these stages


@dataclass(frozen=True)
class Resource:
    """Marks a field that holds the URI (or URIs) of files from outside the run."""


def setting(default: Any = ..., *, unit: str, meaning: str, affects_result: bool = True, **limits: Any) -> Any:
    """Declare a field. ``unit`` is what one counts in, "" for a plain choice; ``limits`` are pydantic's."""
    return pydantic.Field(
        default, description=meaning, json_schema_extra={"unit": unit, "affects_result": affects_result}, **limits
    )


class StageConfig(pydantic.BaseModel):
    """Base of every stage's ``Config``: frozen, keyword-only, unknown keys refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)

    stage: ClassVar[str]  # name on the command line
    folder: ClassVar[str]  # folder under the run root
    schema_version: ClassVar[int] = 1  # of the output; part of the digest
    stands_for: ClassVar[str | None] = None  # folder of an earlier stage that later ones read this output instead of

    out: str = setting(unit="URI", meaning="folder that receives this stage's output", affects_result=False)

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> Self:
        """Validate ``values``; an ``InputError`` names the first key, value, limit and remedy."""
        try:
            return cls(**values)
        except pydantic.ValidationError as error:
            raise cls._explain(error, values) from None

    @classmethod
    def _explain(cls, error: pydantic.ValidationError, values: Mapping[str, Any]) -> InputError:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, cls.model_fields, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            return InputError(f"{cls.stage} has no key '{key}'", f"{hint}'saex-pipe config {cls.stage}' lists its keys")
        if first["type"] == "missing":
            field = cls.model_fields[key]
            return InputError(f"{cls.stage}.{key} is missing", f"set it to {field.description} (--set {key}=...)")
        name = f"{cls.stage}.{key} = {values[key]!r}: " if key in values else f"{cls.stage}.{key}: " if key else ""
        message = first["msg"].removeprefix("Value error, ")
        return InputError(f"{name}{message}", f"'saex-pipe config {cls.stage}' says what each key takes")

    @classmethod
    def marked(cls, mark: type[Upstream] | type[Resource]) -> list[str]:
        """Names of the fields annotated with ``mark``."""
        return [name for name, field in cls.model_fields.items() if any(isinstance(m, mark) for m in field.metadata)]

    @property
    def runs_when_finished(self) -> bool:
        """Whether the stage has something to do even where its result stands already."""
        return False

    @property
    def takes_unfinished(self) -> bool:
        """Whether the stage reads inputs that are still being written."""
        return False

    @property
    def worker_name(self) -> str | None:
        """Name of this process among several that write one output, None where it writes alone."""
        return None

    def alone(self) -> Self:
        """The same output made by one process that shares it with no other and waits for none."""
        return self

    def result_fields(self) -> dict[str, Any]:
        """The fields that change the result and are not URIs, as JSON values."""
        by_uri = {*self.marked(Upstream), *self.marked(Resource)}
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if name not in by_uri and field_extra(type(self), name)["affects_result"]
        }


def field_extra(config: type[StageConfig], name: str) -> dict[str, Any]:
    """The unit of a field and whether it affects the result."""
    extra = config.model_fields[name].json_schema_extra
    assert isinstance(extra, dict), f"{config.__name__}.{name} must be declared with setting()"
    return extra


def canonical_digest(value: Any) -> str:
    """sha256 of ``value`` as JSON with sorted keys: equal values give equal digests on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"key=value"`` to key and value. The value is read as TOML, ``none`` as None, all else as a plain string."""
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {text!r} is not of the form key=value", "write for instance --set k=32")
    return key.strip(), parse_value(raw)


def parse_value(raw: str) -> Any:
    """A value as TOML writes it, ``none`` as None, all else as a plain string."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return None if raw.strip() == "none" else raw


def takes_list(config: type[StageConfig], name: str) -> bool:
    """Whether a field holds a list of values."""
    field = config.model_fields.get(name)
    return field is not None and any(
        get_origin(kind) is tuple for kind in (field.annotation, *get_args(field.annotation))
    )


def comma_list(config: type[StageConfig], name: str, value: Any) -> Any:
    """Split ``"a,b"`` (not within braces) where ``name`` takes a list; None is the word where it cannot be unset."""
    field = config.model_fields.get(name)
    if value is None and field is not None and type(None) not in get_args(field.annotation):
        value = "none"
    if takes_list(config, name) and value is not None:
        if isinstance(value, str):
            return [part.strip() for part in re.split(r",(?![^{]*})", value)]
        if not isinstance(value, list | tuple):
            return [value]
    return value
