"""Files cut into parts that lie beside each other: ``NAME-00001-of-00003.gguf``, as gguf-split of llama.cpp cuts."""

import re


def part_names(name: str) -> list[str]:
    """The names of all parts, in order, of the file that ``name`` is a part of; of a whole file, its own."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", name, flags=re.ASCII | re.DOTALL)
    if not match or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]
