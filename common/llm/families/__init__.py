"""The families of decoders that run here, a thin table each."""

from saex_pipe.common.llm.families.family import Family
from saex_pipe.common.llm.families.gemma import GEMMA, GEMMA2, GEMMA3
from saex_pipe.common.llm.families.gpt import GPT2, GPT_NEOX
from saex_pipe.common.llm.families.llama import LLAMA, MISTRAL
from saex_pipe.common.llm.families.phi import PHI3
from saex_pipe.common.llm.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.name: family for family in (GPT2, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, GEMMA2, GEMMA3)
}
