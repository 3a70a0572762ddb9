"""Memory does not grow with the batches read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from walt_jax import media
from walt_jax.data.preparation import prepare_dataset

_READ = """
import gc, os, sys
from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import open_dataset

def resident():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

config = DataConfig(sys.argv[1], num_frames=5, sizes=((16, 16), (16, 24)), eval_fraction=0.0)
pipeline = Pipeline(open_dataset(config.path), config, batch_size=4, seed=0)
sizes = {}
for k, batch in enumerate(pipeline.batches(), 1):
    if k in (2_000, 10_000):
        sizes[k] = resident()
    if k == 10_000:
        break
print(sizes[2_000], sizes[10_000])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_ten_thousand_batches(tmp_path):
    for i in range(12):
        frames = np.full((16, 32, 32 + 16 * (i % 2), 3), 20 * i, np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        media.write_mp4(tmp_path / "in" / f"{i}.mp4", frames, 8)
    prepare_dataset(tmp_path / "in", tmp_path / "records", short_side=16)
    command = [sys.executable, "-c", _READ, str(tmp_path / "records")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    early, late = map(float, done.stdout.split())
    # An epoch of 3 batches: 2,666 epochs lie between the two.
    assert late - early < 8, f"{early:.0f} MiB after 2,000 batches, {late:.0f} after 10,000"
    print(f"resident after 2,000 batches {early:.1f} MiB, after 10,000 {late:.1f} MiB")
