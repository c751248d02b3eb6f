"""Peak host memory while a model of some hundred MB loads: what the devices hold and the largest tensor, no more.

On a CPU the devices' memory is the host's, so that both are in one number: the anonymous memory of a process that does
nothing but load, read from outside while it does. Pages of the mapped file do not count: they are the page cache's, and
the kernel takes them back when it needs them.
"""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from mesh_models import tensor_shapes
from reference_models.folders import write_folder

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process holds")

LAYERS, WIDTH, MLP, VOCABULARY = 20, 512, 2048, 8192
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
ELEMENTS = sum(int(np.prod(shape)) for shape in tensor_shapes(CONFIG).values())
LARGEST = VOCABULARY * WIDTH  # the embedding: 17 MB in float32, of 352
LOADER = """
import sys
from pathlib import Path
import jax
{before}
path, dtype, devices, model_axis = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.mesh import make_mesh
keep_freed_memory()  # as the command line does: what is freed stays with the process, and may be used again
mesh = make_mesh(int(model_axis))
jax.numpy.zeros(8).block_until_ready()
print("ready", flush=True)
sys.stdin.readline()
model = jax.block_until_ready(load_model(Path(path), dtype=dtype, mesh=mesh))
print(sum(shard.data.nbytes for w in jax.tree.leaves(model) for shard in w.addressable_shards), flush=True)
sys.stdin.readline()
"""


def anonymous_bytes(process: int) -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1]) * 1024


def load_apart(path: Path, dtype: str, devices: int, model_axis: int, before: str = "") -> tuple[int, int]:
    """Peak memory above what the process had before, and what its devices hold in the end; bytes."""
    command = [sys.executable, "-c", LOADER.format(before=before), str(path), dtype, str(devices), str(model_axis)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            before = peak = anonymous_bytes(process.pid)
            answer = []
            waiting = threading.Thread(target=lambda: answer.append(process.stdout.readline()))
            waiting.start()
            process.stdin.write("\n")
            process.stdin.flush()
            while waiting.is_alive():
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(0.0005)  # touching 4 MB for the first time takes longer
        finally:
            process.kill()
    return peak - before, int(answer[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same model as safetensors (float32), and as GGUF in types that are dequantised."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).standard_normal((64, MLP), np.float32)
    tensors = {
        name: np.resize(noise, shape) if len(shape) == 2 else np.ones(shape, np.float32)
        for name, shape in tensor_shapes(CONFIG).items()
    }
    found = {"safetensors": write_folder(folder / "safetensors", CONFIG, tensors)}
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        found[kind.name] = folder / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(found[kind.name], "llama")
        writer.add_block_count(LAYERS)
        writer.add_context_length(64)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(8)
        writer.add_rope_dimension_count(64)
        writer.add_rope_freq_base(500.0)
        writer.add_layer_norm_rms_eps(1e-5)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
        row = {width: gguf.quantize(noise[:, :width], kind) for width in (WIDTH, MLP)}
        for name, tensor in tensors.items():
            theirs = names.get_name(name, try_suffixes=(".weight",))
            if tensor.ndim == 1:
                writer.add_tensor(theirs, tensor)
            else:
                packed = row[tensor.shape[1]]
                writer.add_tensor(theirs, np.resize(packed, (len(tensor), packed.shape[1])), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return found


@pytest.mark.parametrize(
    ("file", "dtype", "devices"),
    [
        ("safetensors", "float32", 1),
        ("Q8_0", "bfloat16", 8),
        pytest.param("safetensors", "float32", 8, marks=pytest.mark.slow),
        pytest.param("safetensors", "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param("safetensors", "bfloat16", 8, marks=pytest.mark.slow),
        pytest.param("Q8_0", "float32", 1, marks=pytest.mark.slow),
        pytest.param("F16", "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param("F16", "bfloat16", 8, marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_what_devices_hold_and_the_largest_tensor(file, dtype, devices, files):
    peak, held = load_apart(files[file], dtype, devices, model_axis=devices)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert held == pytest.approx(ELEMENTS * size, rel=0.005)  # eight devices have eight copies of the norms
    # No slack: what threads, the allocator and the header take, 4 to 8 MB, fits beside a tensor that is not there yet
    # when the embedding has gone to the devices.
    assert held <= peak <= held + LARGEST * 4


def test_a_copy_of_one_stack_of_weights_is_noticed(files):
    """Buffers that are not aligned as JAX wants them are copied on their way to the device."""
    before = """
import numpy as np
from saex_pipe.common.llm import load
load._aligned_zeros = lambda shape, dtype: np.zeros(int(np.prod(shape)) * dtype.itemsize + 4, np.uint8)[4:].view(
    dtype).reshape(shape)
"""
    peak, held = load_apart(files["safetensors"], "float32", 1, model_axis=1, before=before)
    assert peak > held + LARGEST * 4
