"""One of several processes that train together, one SAE or more; prints which rows of the batches it read."""

import json
import sys

import jax


def main(port: str, processes: str, settings: str, process: str) -> None:
    """Train on four devices of each process with ``settings``, a JSON list of them, one for each SAE."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process))
    from saex_pipe.common.formats.row_reader import RowReader
    from saex_pipe.stages.train import run as train
    from saex_pipe.stages.train.config import Config

    undisturbed, seen = RowReader.batch, set()

    def batch(self, step, rows):
        seen.add((rows.start, rows.stop))
        return undisturbed(self, step, rows)

    RowReader.batch = batch  # type: ignore[method-assign]
    manifests = train.run_sweep([Config.create({"worker": "jax", **one}) for one in json.loads(settings)])
    steps = [manifest.totals["steps"] for manifest in manifests]
    print(json.dumps({"rows": sorted(seen), "steps": steps, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
