"""The package as a user installs it: from a wheel, away from the checkout, beside the SGLang they already have."""

from __future__ import annotations

import configparser
import io
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.server import Server, server_env

REPOSITORY = Path(__file__).resolve().parents[2]

CLEAN = {"PYTHONPATH": None, "PYTHONHOME": None, "VIRTUAL_ENV": None}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, in a folder and an environment without the checkout."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=server_env(CLEAN),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, because a build leaves its own folders beside them."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(
        REPOSITORY,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests"),
    )
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", target, source, cwd=source)
    [path] = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment that has our wheel, and everything else from the environment of this test run."""
    folder = tmp_path_factory.mktemp("installed")
    assert not folder.is_relative_to(REPOSITORY)
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)

    # a view of this environment's packages without our own distribution and its editable hooks
    view = folder / "dependencies"
    view.mkdir()
    for packages in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        for entry in Path(packages).iterdir():
            ours = "sglang_sparsespec" in entry.name.replace("-", "_")
            if not ours and not (view / entry.name).exists():
                (view / entry.name).symlink_to(entry)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # through site.addsitedir, so that the .pth files of the dependencies count as well
    Path(purelib, "dependencies.pth").write_text(f"import site; site.addsitedir({str(view)!r})\n")
    return python


def test_wheel_carries_everything_that_runs(wheel: Path) -> None:
    """`patches/` and `kernels/` lie outside the package folder: an editable install works without them in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = configparser.ConfigParser()
        [entry_points_txt] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        entry_points.read_file(io.TextIOWrapper(archive.open(entry_points_txt)))
    expected = {"sglang_sparsespec/py.typed", "sglang_sparsespec/kernels/README.md"}
    for folder, prefix in (
        ("sglang_sparsespec", ""),
        ("patches", "sglang_sparsespec/"),
        ("kernels", "sglang_sparsespec/"),
    ):
        for pattern in ("*.py", "*.md"):
            expected |= {prefix + str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / folder).rglob(pattern)}
    assert "sglang_sparsespec/patches/__init__.py" in expected
    assert expected <= names, f"missing from the wheel: {sorted(expected - names)}"
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert dict(entry_points["sglang.srt.plugins"]) == {"sparsespec": "sglang_sparsespec.plugin:register"}
    strangers = {name.split("/")[0] for name in names} - {"sglang_sparsespec"}
    assert all(name.endswith(".dist-info") for name in strangers), strangers


def test_wheel_is_what_the_new_environment_imports(installed: Path, tmp_path: Path) -> None:
    """If the editable install shone through, the server test below would test the checkout."""
    code = (
        "import importlib.metadata as m, sglang_sparsespec as s, sglang_sparsespec.patches as p, sglang, sys;"
        "found = [d for d in m.distributions() if d.metadata['Name'].replace('_', '-') == 'sglang-sparsespec'];"
        "points = [e for e in m.entry_points(group='sglang.srt.plugins') if e.name == 'sparsespec'];"
        "print(s.__file__, p.__file__, found[0].locate_file(''), len(found), len(points), sep='\\n')"
    )
    *files, num_distributions, num_entry_points = run(installed, "-c", code, cwd=tmp_path).split("\n")[:5]
    for file in files:
        assert Path(file).is_relative_to(installed.parents[1]), f"{file} does not come from the wheel"
    assert (num_distributions, num_entry_points) == ("1", "1")


def test_wheel_serves_sparsespec_away_from_the_checkout(installed: Path, tiny_qwen3_path: Path, tmp_path: Path) -> None:
    """What a user gets who never clones the repository."""
    command = [str(installed), "-m", "sglang.launch_server"]
    args = ("--speculative-algorithm", "SPARSESPEC")
    with Server(tiny_qwen3_path, *args, command=command, cwd=tmp_path, env=CLEAN) as server:
        response = server.generate({"text": "Hello", "sampling_params": {"temperature": 0, "max_new_tokens": 32}})
        assert len(response["output_ids"]) == 32
        assert response["meta_info"]["spec_verify_ct"] > 0
        assert server.accept_length() is not None
        server.idle_check()
