"""A federation from its file to an adapter, all clients on this machine by Flower's simulation engine."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import Cli, command, environment
from forked import Forked

pytest.importorskip("flwr")
pytest.importorskip("ray")

from safetensors.numpy import load_file

from slm_export.federated.state import FILE, State, load_state

SETTINGS = """
out = "adapter"

[model]
base    = "{base}"
rank    = 2

[data]
texts = ["texts"]

[rounds]
number  = {rounds}
clients = {clients}

[local]
steps  = 2
batch  = 2
length = 32

{more}
"""


def write(folder: Path, base: Path, clients: int, rounds: int = 1, more: str = "") -> Path:
    texts = folder / "texts"
    texts.mkdir()
    for topic in range(4):
        lines = "\n\f\n".join(
            f"# {topic} {i}\n" + f"value_{topic} = compute({i}) + {topic}\n" * 6 for i in range(10)
        )
        (texts / f"topic-{topic}.txt").write_text(lines)
    path = folder / "federation.toml"
    path.write_text(SETTINGS.format(base=base, clients=clients, rounds=rounds, more=more))
    return path


def changed(folder: Path) -> bool:
    """Of a new adapter one half is zeros; they are not, once anything was learned."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return all(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.slow  # not for its length alone: Ray gives up where its agent takes longer than 15 s to start
def test_a_small_federation(tmp_path: Path, tiny_llama: Path, cli: Cli, quick_cli: Forked) -> None:
    settings = write(tmp_path, tiny_llama, 3)
    done = cli("federate", "simulate", settings, "--json", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["federation"]
    assert told["rounds"] == {"asked": 1, "done": 1, "that_changed": 1, "stopped": None}
    assert told["updates"] == {"drawn": 3, "good": 3}
    assert told["refused"] == {}
    assert told["privacy"] == {"unit": "none"}
    assert changed(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "federation.json").read_text())["federation"] == told
    planned = quick_cli(
        "plan", tmp_path / "adapter", "--target", "host", "--format", "onnx", "--json", cwd=tmp_path
    )
    assert planned.returncode == 0, planned.stderr
    # Nothing of a text, and no name of a machine or a person, is in what is handed on.
    for name in ("federation.json", "learning.json"):
        text = (tmp_path / "adapter" / name).read_text()
        assert "compute(" not in text
        assert str(tmp_path) not in text


def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, tiny_llama: Path, quick_cli: Forked
) -> None:
    settings = write(tmp_path, tiny_llama, 3)
    settings.write_text(settings.read_text().replace('[data]\ntexts = ["texts"]', ""))
    for kind, missing in (("simulate", "[data]"), ("server", "[server]"), ("client", "[client]")):
        done = quick_cli("federate", kind, settings, cwd=tmp_path)
        assert done.returncode == 2
        assert missing in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_a_killed_server_is_gone_on_with_by_the_same_command(tmp_path: Path, tiny_llama: Path) -> None:
    settings, cache = write(tmp_path, tiny_llama, 3, rounds=10), tmp_path / "cache"
    env = environment({"OMP_NUM_THREADS": "1", "SLM_EXPORT_CACHE": str(cache)})
    arguments = command("federate", "simulate", settings, "--json")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, env=env, cwd=tmp_path, start_new_session=True, **quiet) as process:
        while process.poll() is None and (kept := stored(cache)) is None:
            time.sleep(0.1)
        assert process.poll() is None, "it ended before a round was stored, or after all were"
        os.killpg(process.pid, signal.SIGKILL)
    kept = stored(cache)
    assert kept is not None
    assert not (tmp_path / "adapter").exists()
    done = subprocess.run(arguments, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["federation"]
    assert told["rounds"]["that_changed"] == 10
    first = told["each_round"][0]
    assert (first["loss_before"], first["loss_after"]) == (
        kept.rounds[0].loss_before,
        kept.rounds[0].loss_after,
    )
    assert stored(cache) is None, "what is done is not kept"


def stored(cache: Path) -> State | None:
    """Where a federation stands, once a round of it is done."""
    found = list((cache / "learning").glob(f"*/{FILE}"))
    state = load_state(found[0].parent) if found else None
    return state if state is not None and state.rounds else None


@pytest.mark.slow
def test_nothing_listens_where_others_could_reach_it(tmp_path: Path, tiny_llama: Path) -> None:
    settings = write(tmp_path, tiny_llama, 3)
    heard: set[str] = set()
    with subprocess.Popen(
        command("federate", "simulate", settings), env=environment({"OMP_NUM_THREADS": "1"}), cwd=tmp_path
    ) as process:
        whole = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error):
                for each in (whole, *whole.children(recursive=True)):
                    with suppress(psutil.Error):
                        heard |= {
                            one.laddr.ip
                            for one in each.net_connections("inet")
                            if one.status == psutil.CONN_LISTEN
                        }
            time.sleep(0.2)
    assert process.returncode == 0
    assert heard
    # Ray writes an address of IPv4 as one of IPv6.
    assert all(ipaddress.ip_address(one.removeprefix("::ffff:")).is_loopback for one in heard), heard


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True])
def test_twenty_clients_with_user_level_privacy(
    tmp_path: Path, pycode: Path, cli: Cli, quick_cli: Forked, secure: bool
) -> None:
    more = '[privacy]\nunit = "user"\nepsilon = 8.0\ndelta = 1e-2\nclip = 0.5\n'
    if secure:
        more += "[aggregation]\nsecure = true\n"
    settings = write(tmp_path, pycode, 20, 2, more)
    done = cli("federate", "simulate", settings, "--json", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["federation"]
    assert told["updates"] == {"drawn": 40, "good": 40}
    assert told["rounds"]["that_changed"] == 2
    privacy = told["privacy"]
    assert (privacy["unit"], privacy["secure_aggregation"]) == ("user", secure)
    assert 0 < privacy["spent"]["epsilon"] <= privacy["declared"]["epsilon"] == 8.0
    assert privacy["noise"] > 0
    assert changed(tmp_path / "adapter")
    bundle = ("--target", "host", "--format", "onnx", "--bits", "8", "--no-verify", "--no-bench")
    exported = quick_cli(tmp_path / "adapter", *bundle, "--out", "bundle", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    learned = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["model"]["learned"]
    assert learned["by"] == "federate"
    assert learned["settings"]["privacy"] == privacy
    page = (tmp_path / "bundle" / "report.html").read_text()
    assert "user-level" in page


@pytest.mark.slow
def test_example_level_privacy_is_spent_by_the_clients(tmp_path: Path, pycode: Path, cli: Cli) -> None:
    more = '[privacy]\nunit = "example"\nepsilon = 8.0\ndelta = 1e-2\nclip = 0.5\n'
    done = cli(
        "federate", "simulate", write(tmp_path, pycode, 4, 2, more), "--json", env={"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["federation"]
    assert told["rounds"]["that_changed"] == 2
    epsilons = [each["epsilon"] for each in told["each_round"]]
    assert 0 < epsilons[0] < epsilons[1] <= 8.0
    assert told["privacy"]["spent"]["epsilon"] == epsilons[1]
    assert [each["loss_before"] for each in told["each_round"]] == [None, None]
