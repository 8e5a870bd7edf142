"""What is installed, as a wheel and in place: every folder under the one name ``slm_export``."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("exporters.executorch", "optimizers.group_quantize", "targets.android", "device_profiles")
CHECK = (
    "import importlib, sys\n"
    "from pathlib import Path\n"
    "import slm_export\n"
    "where = Path(slm_export.__file__).resolve().parent\n"
    "assert str(where).startswith(sys.argv[1]), where\n"
    f"for name in {MODULES}:\n"
    "    importlib.import_module('slm_export.' + name)\n"
    "from slm_export.profile import shipped_profiles\n"
    "assert len(shipped_profiles()) > 8\n"
    "from slm_export.evaltext import load_documents\n"
    "from slm_export.targets.ios_package import swift_file\n"
    "assert 'enum TokenizerFiles' in swift_file('TokenizerFiles.swift')\n"
    "assert load_documents(None)\n"
    "for name in ('exporters', 'optimizers', 'targets', 'device_profiles'):\n"
    "    try:\n"
    "        importlib.import_module(name)\n"
    "    except ModuleNotFoundError:\n"
    "        continue\n"
    "    sys.exit(name + ' can be imported by its bare name')\n"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_holds_all_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"slm_export"}
    assert {
        "slm_export/py.typed",
        "slm_export/data/sample.txt",
        "slm_export/data/report.html.j2",
        "slm_export/device_profiles/pixel-8.toml",
        "slm_export/exporters/executorch.py",
        "slm_export/fidelity/tokens.py",
        "slm_export/bench/places/measure.sh",
        "slm_export/targets/kotlin/AndroidManifest.xml",
        "slm_export/targets/kotlin/decoder/executorch.kt.j2",
        "slm_export/targets/swift/Package.swift.j2",
        "slm_export/targets/swift/TokenizerFiles.swift",
        "slm_export/targets/swift/coreml/DecoderRuntime.swift",
        "slm_export/targets/swift/tests/TokenizerTests.swift.j2",
    } <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_installed(wheel: Path, tmp_path: Path) -> None:
    place = (tmp_path / "site").resolve()
    zipfile.ZipFile(wheel).extractall(place)
    command = [sys.executable, "-c", CHECK, str(place)]
    environment = {"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_installation_in_place_works(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHECK, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
