from typing import Annotated, ClassVar

import pytest

from saex_pipe.common.config import (
    Resource,
    StageConfig,
    Upstream,
    canonical_digest,
    comma_list,
    parse_assignment,
    setting,
)
from saex_pipe.common.errors import InputError


class Config(StageConfig):
    stage: ClassVar[str] = "bake"
    folder: ClassVar[str] = "bread"

    flour: Annotated[str, Upstream("mill")] = setting(unit="URI", meaning="ground grain")
    water: Annotated[str | None, Resource()] = setting(None, unit="URI", meaning="a well")
    salt: float = setting(2.0, unit="grams", meaning="how much", ge=0, le=10)
    shapes: tuple[str, ...] = setting(("loaf",), unit="names", meaning="forms")
    sizes: tuple[int, ...] = setting((1,), unit="kg", meaning="weights")
    seeds: tuple[str, ...] | None = setting(None, unit="names", meaning="on top", affects_result=False)
    oven: str = setting("old", unit="", meaning="where", affects_result=False)


VALID = {"out": "x", "flour": "y"}


def test_result_fields_leave_out_places_and_what_does_not_change_the_result():
    config = Config.create(VALID | {"salt": 3})
    assert config.result_fields() == {"salt": 3.0, "shapes": ["loaf"], "sizes": [1]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slat": 3}, "bake has no key 'slat'; did you mean salt?"),
        ({"salt": 11}, "bake.salt = 11: Input should be less than or equal to 10"),
        ({"salt": "much"}, "bake.salt = 'much': Input should be a valid number"),
    ],
)
def test_a_bad_value_is_named_with_its_limit_and_remedy(values, message):
    with pytest.raises(InputError) as caught:
        Config.create(VALID | values)
    assert message in str(caught.value)
    assert "saex-pipe config bake" in str(caught.value)


def test_a_missing_key_is_named_with_its_meaning():
    with pytest.raises(InputError, match=r"bake\.flour is missing; set it to ground grain"):
        Config.create({"out": "x"})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config.create(VALID).salt = 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k=32", ("k", 32)),
        ("a.rate=1e-3", ("a.rate", 1e-3)),
        ("flag=true", ("flag", True)),
        ("name=topk", ("name", "topk")),
        ('name="32"', ("name", "32")),
        ("k=none", ("k", None)),
        ('k="none"', ("k", "none")),
        ("list=[1, 2]", ("list", [1, 2])),
        ("uri=gs://b/x=y", ("uri", "gs://b/x=y")),
    ],
)
def test_assignments_are_read_as_toml_or_as_text(text, expected):
    assert parse_assignment(text) == expected


def test_an_assignment_without_a_sign_is_refused():
    with pytest.raises(InputError, match="not of the form key=value"):
        parse_assignment("k32")


def test_comma_lists_are_for_list_settings_only():
    assert comma_list(Config, "shapes", "loaf, roll") == ["loaf", "roll"]
    assert comma_list(Config, "shapes", "bun.{1,2}, roll") == ["bun.{1,2}", "roll"]
    assert comma_list(Config, "sizes", 3) == [3]
    assert comma_list(Config, "seeds", "poppy,sesame") == ["poppy", "sesame"]
    assert comma_list(Config, "oven", "a,b") == "a,b"


def test_none_unsets_what_may_be_unset_and_is_a_word_elsewhere():
    assert comma_list(Config, "water", None) is None
    assert comma_list(Config, "seeds", None) is None
    assert comma_list(Config, "oven", None) == "none"
    assert comma_list(Config, "shapes", None) == ["none"]


def test_the_digest_depends_on_values_and_not_on_order():
    assert canonical_digest({"a": 1, "b": [2.5]}) == canonical_digest({"b": [2.5], "a": 1})
    assert canonical_digest({"a": 1}) != canonical_digest({"a": 2})
