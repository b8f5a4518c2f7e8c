"""A long run under random kills: `python tests/soak.py --scenes 20000 --kills 20`.

Attacks scenes of the embedded set twice: undisturbed on one device, whose memory is sampled, and
killed at random moments and resumed on 1, 2 or 4 simulated devices. Prints memory after warm-up, and
whether both have the same bytes. Takes 40 minutes on two cores at this size.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from adv2_jax.data import shapes

# the class is the brightest channel: right on every scene by construction, and cheap
NETWORK = """
import jax

@jax.tree_util.register_static
class Brightest:
    def features(self, image, act=jax.nn.relu):
        h, w, c = image.shape
        return act(image.reshape(h // 4, 4, w // 4, 4, c).mean((1, 3)) - 0.3)

    def head(self, features):
        return 10 * features.mean((0, 1))

network = Brightest()
"""


def write_scenes(folder: Path, count: int) -> None:
    """Write scenes as files, in folders by the class that the network gives them."""
    for i in range(3):
        (folder / "scenes" / str(i)).mkdir(parents=True)
    for start in range(0, count, 500):
        for i, image in enumerate(shapes.generate(min(500, count - start), start=start).images):
            pooled = image.reshape(16, 4, 16, 4, 3).mean((1, 3)) / 255 - 0.3
            label = pooled.clip(0).mean((0, 1)).argmax()
            Image.fromarray(image).save(folder / "scenes" / str(label) / f"{start + i:05d}.png")
    (folder / "network.py").write_text(NETWORK)


def start(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "adv2_jax", "attack", "--model", "network.py:network"]
    command += ["--images", "scenes", "--size", "64", "--interpreter", "cam", "--steps", "3"]
    command += ["--warm-steps", "1", "--batch-size", "16", "--snapshots", "0", "--out", out]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    return subprocess.Popen([*command, "--quiet", *options], cwd=folder, env=os.environ | flags)


def parts(folder: Path, out: str) -> int:
    log = folder / out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def memory(process: subprocess.Popen[bytes]) -> float:
    """Return the resident memory of a process in MiB; 0 when it has ended."""
    try:
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def undisturbed(folder: Path) -> None:
    process, samples = start(folder, "one", "--devices", "1"), []
    while process.poll() is None:
        samples.append((parts(folder, "one"), memory(process)))
        time.sleep(1)
    assert process.returncode == 0
    total = parts(folder, "one")
    warm = np.array([used for n, used in samples if total / 10 < n < total and used])
    low, middle, high = np.percentile(warm, [0, 50, 100])
    print(f"{total} parts; memory after the first tenth, MiB: {low:.0f} {middle:.0f} {high:.0f}")
    print(f"from {low / middle - 1:+.1%} to {high / middle - 1:+.1%} of the median;", end=" ")
    print(f"highest, results and report included: {max(used for _, used in samples):.0f} MiB")


def killed(folder: Path, kills: int, chance: random.Random) -> None:
    total = parts(folder, "one")
    for i in range(kills + 1):
        devices = chance.choice(["1", "2", "4"])
        resume = ["--resume"] if (folder / "killed" / "batches" / "settings.json").exists() else []
        process = start(folder, "killed", "--devices", devices, *resume)
        if i < kills:
            # uniform over what is left, so that the last kills come near the end, and after it
            left = total - parts(folder, "killed")
            goal = total - left + chance.uniform(0, 2 * left / (kills - i))
            while process.poll() is None and parts(folder, "killed") < goal:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        code = process.wait()
        print(f"{devices} devices, {parts(folder, 'killed')} parts, exit code {code}", flush=True)
        if code == 0:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path, help="where to work; is made")
    arguments = parser.parse_args()
    write_scenes(arguments.folder, arguments.scenes)
    undisturbed(arguments.folder)
    killed(arguments.folder, arguments.kills, random.Random(arguments.seed))
    one, other = (
        hashlib.sha256((arguments.folder / out / "results.npz").read_bytes()).hexdigest()
        for out in ("one", "killed")
    )
    print(f"sha256 {one}\n       {other}\n{'the same bytes' if one == other else 'OTHER BYTES'}")
    sys.exit(one != other)


if __name__ == "__main__":
    main()
