"""What the Python packages of the container image weigh: python benchmarks/deployment/image_size.py

No wheel is downloaded and nothing is installed. pip resolves the Dockerfile's requirements for Linux on x86-64; the
server says how large each wheel is, and how much it unpacks to stands in its last bytes, which are read alone. pip
compiles what it installs, which adds to that: `--measure_compiled FOLDER` says how much, for an installed folder.

pip's settings on this machine are left out of account: with a torch of its own they would not give a user's image.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6
SHOWN = 12
BLOCK = 2**20


class Weight(NamedTuple):
    """Bytes of one package."""

    name: str
    wheel: int
    unpacked: int


class RemoteFile(io.RawIOBase):
    """A file behind an address, read in blocks as they are asked for."""

    def __init__(self, url: str) -> None:
        self.url, self.place, self.blocks = url, 0, {}
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        """Up to the end of the block that the place lies in."""
        index, skipped = divmod(self.place, BLOCK)
        data = self.block(index)[skipped : skipped + len(buffer)] if self.place < self.size else b""
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def block(self, index: int) -> bytes:
        if index not in self.blocks:
            first, last = index * BLOCK, min((index + 1) * BLOCK, self.size) - 1
            asked = urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{last}"})
            with urllib.request.urlopen(asked) as answer:
                if answer.status != 206:
                    raise OSError(f"{self.url}: the server sends the whole file instead of a part")
                self.blocks[index] = answer.read()
        return self.blocks[index]


def requirements() -> list[str]:
    """What the Dockerfile's lines that run pip ask for."""
    found = re.findall(r"pip install ([^&\n]*)", (ROOT / "Dockerfile").read_text().replace("\\\n", " "))
    words = [word.strip("'") for line in found for word in line.split() if not word.startswith("-")]
    return [word for word in words if word != "constraints.txt"]


def unpinned(names: list[str]) -> list[str]:
    """Those that constraints.txt leaves to the day of the build."""
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return sorted({plain(name) for name in names} - {plain(pin) for pin in pins})


def plain(name: str) -> str:
    """A package's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolved(python: str) -> list[tuple[str, str]]:
    """Name and address of each wheel that pip would install from the index, on Linux on x86-64.

    Raises:
        RuntimeError: pip finds no set of versions; with what it said.
    """
    command = [sys.executable, "-m", "pip", "install", "--isolated", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", "--target", "unused", "--only-binary", ":all:", "--python-version", python]
    for level in range(5, 40):
        command += ["--platform", f"manylinux_2_{level}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--platform", "linux_x86_64"]
    command += ["-c", str(ROOT / "constraints.txt"), *requirements()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull}
    )
    if done.returncode:
        raise RuntimeError(f"pip cannot resolve the image's packages: {done.stderr.strip()}")
    found = json.loads(done.stdout)["install"]
    wheels = [(item["metadata"]["name"], item["download_info"]) for item in found]
    return [(name, source["url"]) for name, source in wheels if "dir_info" not in source]  # the project itself


def weigh(name: str, url: str) -> Weight:
    """One wheel, by its own list of what is in it."""
    file = RemoteFile(url)
    with zipfile.ZipFile(io.BufferedReader(file)) as wheel:
        return Weight(name, file.size, sum(entry.file_size for entry in wheel.infolist()))


def compiled(site_packages: Path) -> tuple[int, int]:
    """Bytes of compiled files and of all files in a folder."""
    files = [path for path in site_packages.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_size for path in files if path.suffix == ".pyc"), sum(
        path.stat().st_size for path in files
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python_version", default="3.11", help="of the image")
    parser.add_argument("--measure_compiled", type=Path, metavar="FOLDER", help="an installed site-packages instead")
    args = parser.parse_args()
    if args.measure_compiled:
        part, whole = compiled(args.measure_compiled)
        print(f"{part / MB:,.0f} MB of {whole / MB:,.0f} MB are compiled files (.pyc)")
        return
    weights = sorted((weigh(*wheel) for wheel in resolved(args.python_version)), key=lambda weight: -weight.unpacked)
    rest = weights[SHOWN:]
    rows = [*weights[:SHOWN], Weight(f"{len(rest)} others", sum(w.wheel for w in rest), sum(w.unpacked for w in rest))]
    nvidia = [w for w in weights if w.name.startswith(("nvidia-", "cuda-", "triton"))]
    rows.append(Weight("of all, CUDA and triton", sum(w.wheel for w in nvidia), sum(w.unpacked for w in nvidia)))
    rows.append(Weight(f"all {len(weights)}", sum(w.wheel for w in weights), sum(w.unpacked for w in weights)))
    print("| package | wheel, MB | unpacked, MB |\n|---|---|---|")
    for name, wheel, unpacked in rows:
        print(f"| {name} | {wheel / MB:,.0f} | {unpacked / MB:,.0f} |")
    print(f"\nleft open by constraints.txt: {', '.join(unpinned([weight.name for weight in weights])) or 'none'}")


if __name__ == "__main__":
    main()
