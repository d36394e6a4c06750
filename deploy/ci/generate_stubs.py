"""Generates the gRPC code from proto/ into stillpoint/wire/v1: `python deploy/ci/generate_stubs.py [OUTPUT]`.

The output keeps the package path of the .proto files, so the generated imports are right as they stand.
OUTPUT is the folder that `stillpoint/wire/v1` lies in, the checkout by default.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("stillpoint/wire/v1")


def generate(output: Path) -> None:
    sources = sorted((ROOT / "proto" / PACKAGE).glob("*.proto"))
    assert sources, "proto/stillpoint/wire/v1 holds no .proto file"
    package = output / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    for stale in package.glob("*_pb2*.py*"):
        stale.unlink()
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
    command += [f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *map(str, sources)], check=True)
    (package / "__init__.py").touch()


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
