"""Makes the environment of the pretended GPU, and runs the tests on it: ``make pretended-gpu``.

python -m tests.pretended_gpu.build [--folder .pretended-gpu] [PYTEST ARGUMENTS]

The environment has torch's CUDA build: gigabytes. Where there is no compiler, or no such build, it says so and exits
with 0. Without pytest arguments it runs all of `tests/gpu` and `tests/pretended_gpu`, and a few benchmarks.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TORCH = "2.11.0"
# Triton 3.6's interpreter makes scalars of arrays, which numpy 2.4 forbids.
PACKAGES = ("numpy<2.4", "expecttest", "hypothesis", "pytest", "pytest-benchmark")
PLUGIN = ("-p", "tests.pretended_gpu.plugin", "-p", "no:cacheprovider", "-q")
COMMANDS = (
    ("tests/gpu", "tests/pretended_gpu"),
    ("bench", "--part", "quick", "--device", "cuda", "--rounds", "1", "-k", "4x4-fp32 or 148x16-fp32 or mlp"),
)


class SkippedError(Exception):
    """There can be no pretended GPU here; the message says why."""


def run(*command: object) -> str:
    """Runs a command and returns what it prints.

    Raises:
        SkippedError: It failed.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SkippedError(f"{Path(str(command[0])).name} failed: {done.stderr[-500:]}")
    return done.stdout


def make_environment(home: Path) -> Path:
    """Installs torch's CUDA build and what the tests need. Returns the environment's packages."""
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        venv.create(home, with_pip=True)
        run(python, "-m", "pip", "install", "--quiet", f"torch=={TORCH}", *PACKAGES)
        (home / "installed").touch()
    if run(python, "-c", "import torch; print(torch.version.cuda)").strip() == "None":
        raise SkippedError(f"pip found no CUDA build of torch {TORCH}")
    return next((home / "lib").glob("python3*/site-packages"))


def symbols(which: str, *libraries: Path) -> set[str]:
    """The functions of CUDA's driver and runtime that libraries lack (``undefined``) or have (``defined``)."""
    found = run("nm", "-D", f"--{which}-only", *libraries)
    return set(re.findall(r"\b(?:__cuda|cuda|cu)[A-Z]\w*", found))


def compile_driver(packages: Path) -> None:
    """Compiles driver.cpp, and puts it where torch and Triton look for CUDA's driver and runtime."""
    if not (shutil.which("g++") and shutil.which("nm")):
        raise SkippedError("there is no g++")
    (runtime,) = packages.glob("nvidia/cu*/lib/libcudart.so.??")
    driver = runtime.with_name("libcuda.so.1")
    if driver.exists() and runtime.stat().st_mtime > (HERE / "driver.cpp").stat().st_mtime:
        return
    includes = [f"-I{folder}" for folder in packages.glob("nvidia/cu*/include")]
    includes += [f"-I{packages / 'triton' / 'backends' / 'nvidia' / 'include'}"]
    with tempfile.TemporaryDirectory() as folder:
        source, versions, built = (Path(folder) / name for name in ("missing.c", "versions", runtime.name))
        versions.write_text(f"{runtime.name} {{ global: cuda*; __cuda*; cu*; gpu_*; local: *; }};\n")
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", *includes, HERE / "driver.cpp", "-ldl"]
        command += [f"-Wl,-soname,{runtime.name}", f"-Wl,--version-script={versions}", "-o", built]
        run(*command)
        # What torch's libraries are linked to and never call here.
        missing = symbols("undefined", *packages.glob("torch/lib/*.so")) - symbols("defined", built)
        source.write_text("".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(missing)))
        run("gcc", "-c", "-w", "-fPIC", source, "-o", source.with_suffix(".o"))
        run(*command, source.with_suffix(".o"))
        # Not in place: another process may have loaded the old one.
        shutil.copy(built, runtime.with_name("new"))
        runtime.with_name("new").replace(runtime)
    driver.unlink(missing_ok=True)
    driver.symlink_to(runtime.name)


def environment_variables(packages: Path) -> dict[str, str]:
    """For processes on the pretended GPU."""
    (driver,) = packages.glob("nvidia/cu*/lib/libcuda.so.1")
    libraries = str(driver.parent)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "TRITON_LIBCUDA_PATH": libraries,
        "PYTHONPATH": str(ROOT),
        "FUSED_CLR_TEST_GPU": "1",
        "PRETENDED_GPU": "1",
        "PRETENDED_GPU_DEVICES": "2",
    }


def main() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".pretended-gpu", help="where the environment is made")
    arguments, own = parser.parse_known_args()
    home = arguments.folder.resolve()
    try:
        packages = make_environment(home)
        compile_driver(packages)
    except SkippedError as error:
        print(f"pretended GPU skipped: {error}")
        return 0
    command = [home / "bin" / "python", "-m", "pytest", *PLUGIN]
    variables = environment_variables(packages)
    commands = [tuple(own)] if own else COMMANDS
    return max(subprocess.run([*command, *each], cwd=ROOT, env=variables).returncode for each in commands)


if __name__ == "__main__":
    sys.exit(main())
