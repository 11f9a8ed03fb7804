"""Other Pythons, and other versions of torch and triton, each in an environment of its own: ``nox -l`` lists them.

    nox -s tests-3.12              # the core tests with that Python
    nox -s versions                # the oldest and newest torch and triton
    nox -s tests -- -k schedule    # arguments of pytest
    nox -s versions -- --cuda-builds

Where torch has no CPU build for a Python, the session is skipped: the CUDA build is gigabytes. ``--cuda-builds``
installs it all the same.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["versions"]
nox.options.reuse_venv = "yes"

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# All but the frameworks, the pictures and pages, the benchmarks and the slowest.
CORE = ("tests/api", "tests/kernels", "tests/parity", "tests/integrations")
LEFT_OUT = (
    *("tests/api/test_bench.py", "tests/api/test_cli.py", "tests/api/test_demo.py", "tests/api/test_docs.py"),
    *("tests/parity/test_accuracy.py", "tests/parity/test_state_machine.py"),
    *(f"tests/integrations/test_{name}.py" for name in ("examples", "huggingface", "lightning")),
    *(f"tests/integrations/test_{name}.py" for name in ("lightning_captured", "skips_told", "trainer_captured")),
)
TEST_PACKAGES = (
    *("expecttest", "hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "tensorboard"),
    *("matplotlib", "scikit-learn", "tqdm"),
)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Triton 3.6's interpreter makes scalars of arrays, which numpy 2.4 forbids and earlier ones warn of.
FOR_TRITON_3_6 = ("-W", "ignore:Conversion of an array:DeprecationWarning")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The core tests, with the torch that the development environment has."""
    _test(session, "2.13.0", "triton", "numpy")


@nox.session
@nox.parametrize(
    ("torch", "triton", "numpy", "options"),
    [
        nox.param("2.11.0", "triton==3.6.0", "numpy<2.4", FOR_TRITON_3_6, id="oldest"),
        nox.param("2.13.0", "triton==3.6.0", "numpy<2.4", FOR_TRITON_3_6, id="torch-2.13-triton-3.6"),
        nox.param("2.13.0", "triton", "numpy", (), id="torch-2.13-newest-triton"),
        nox.param("", "triton", "numpy", (), id="newest"),
    ],
)
def versions(session: nox.Session, torch: str, triton: str, numpy: str, options: tuple[str, ...]) -> None:
    """The core tests with other versions; an empty one is the newest."""
    _test(session, torch, triton, numpy, *options)


def _test(session: nox.Session, torch: str, triton: str, numpy: str, *options: str) -> None:
    arguments = [argument for argument in session.posargs if argument != "--cuda-builds"]
    if "--cuda-builds" in session.posargs:
        session.install(f"torch=={torch}" if torch else "torch")
    else:
        # From this index alone: elsewhere the newest is a CUDA build.
        build = (f"torch=={torch}+cpu", "--extra-index-url") if torch else ("torch", "--index-url")
        session.run("python", "-m", "pip", "install", "--quiet", "--retries=1", *build, CPU_INDEX, success_codes=(0, 1))
        program = "import torch; print(torch.version.cuda, torch.version.hip)"
        if "None None" not in str(session.run("python", "-c", program, silent=True, success_codes=(0, 1))):
            session.skip(f"no CPU build of torch {torch or '(newest)'} here; -- --cuda-builds installs the other")
    session.install(triton, numpy, *TEST_PACKAGES)
    session.run(
        "python", "-c", "import numpy, torch, triton; print(torch.__version__, triton.__version__, numpy.__version__)"
    )
    pytest = ("pytest", "-q", "--numprocesses=2", "--dist=worksteal", *options, *arguments)
    # 5: none was selected.
    session.run(*pytest, *CORE, *(f"--ignore={path}" for path in LEFT_OUT), success_codes=(0, 5))
    # In a process without the interpreter.
    session.run(*pytest, "tests/ptx", "-m", "ptx", env={"FUSED_CLR_TEST_PTX": "90"}, success_codes=(0, 5))
