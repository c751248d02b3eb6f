"""Write the map of files in README.md from the first line of every module: ``python infra/readme_map.py``."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipelines", "stages", "common")
OTHER = {
    "pipelines/recipes/README.md": "Where the text of the quickstart comes from.",
    "pipelines/recipes/sotu.jsonl.gz": "The State of the Union addresses, 1790 to 2021.",
    "stages/view/page.css": "The look of the page.",
    "stages/view/page.html": "The frame of the page.",
    "stages/view/page.js": "Sorting and filtering on the page.",
}


def meaning(path: Path) -> str:
    """The first sentence about a file."""
    name = path.relative_to(ROOT).as_posix()
    if name in OTHER:
        return OTHER[name]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    return next((line.split("=", 1)[1].strip(' "') for line in text.splitlines() if line.startswith("title")), "")


def main() -> None:
    """Replace what stands between the two marks."""
    rows = ["| file | what it is |", "|---|---|"]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                rows.append(f"| `{path.relative_to(ROOT).as_posix()}` | {meaning(path)} |")
    readme = ROOT / "README.md"
    table = "\n".join(rows)
    text = readme.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- map:.*?-->\n).*(<!-- end of map -->)", lambda m: m[1] + table + "\n" + m[2], text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
