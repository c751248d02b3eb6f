"""Settings of the view stage."""

from typing import Annotated, ClassVar

from saex_pipe.common.config import StageConfig, Upstream, setting


class Config(StageConfig):
    """The browser view of a feature cache: a static page of its best features, and a local server for all of them."""

    stage: ClassVar[str] = "view"
    folder: ClassVar[str] = "page"

    cache: Annotated[str, Upstream("cache")] = setting(unit="URI", meaning="the output of the cache stage")
    scores: Annotated[str | None, Upstream("scores", only_with=("evaluate",))] = setting(
        None, unit="URI", meaning="the output of the evaluate stage, whose scores the page shows; none: no scores"
    )
    features: int = setting(
        100, unit="features", meaning="how many of the best features the static page shows", ge=1, le=2000
    )
    serve: bool = setting(
        False,
        unit="",
        meaning="after writing the page, serve it and every other feature on this machine until Ctrl-C",
        affects_result=False,
    )
    port: int = setting(
        8765,
        unit="TCP port",
        meaning="port of the local server; 0 takes a free one",
        affects_result=False,
        ge=0,
        le=65535,
    )

    @property
    def runs_when_finished(self) -> bool:
        """The server serves whenever it is asked for."""
        return self.serve
