"""Feature cache to a page in the browser."""

import json
from typing import Any

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import stage_output
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.view.config import Config
from saex_pipe.stages.view.page import index_page
from saex_pipe.stages.view.ranking import rank
from saex_pipe.stages.view.server import serve

PAGE = "index.html"
SCORES = "scores.json"


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write ``index.html``, the page of the best features, then serve all of them when ``config.serve`` says so."""
    with stage_output(config, force=force) as output, graceful_stop(at_once=True):
        if output.manifest is None:
            Manifest.require(config.cache, ("cache",))
            with FeatureCache(Folder(config.cache)) as cache:
                best = rank(cache, config.features)
                page = index_page(cache, best, read_scores(config.scores)).encode()
            output.folder.write(PAGE, page)
            output.finish(contents={"best_features": best}, totals={"features_shown": len(best), "bytes": len(page)})
    assert output.manifest is not None  # finished above, or found
    if config.serve:
        with FeatureCache(Folder(config.cache)) as cache:
            best = output.manifest.contents["best_features"]
            serve(cache, index_page(cache, best, read_scores(config.scores), served=True), config.port)
    return output.manifest


def read_scores(uri: str | None) -> dict[str, Any]:
    """The scores in the folder at ``uri``, none for None. InputError when they are missing or not JSON."""
    if uri is None:
        return {}
    data = Folder(uri).read(SCORES)
    if data is None:
        raise InputError(f"{uri}/{SCORES} does not exist", "run 'saex-pipe evaluate' or point to its output")
    try:
        scores = json.loads(data)
    except ValueError:
        scores = None
    if not isinstance(scores, dict):
        raise InputError(f"{uri}/{SCORES} does not hold scores", "run 'saex-pipe evaluate' again with --force")
    return scores
