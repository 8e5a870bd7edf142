"""Chat templates and other programs that come with a model: sandboxed, bounded, or never run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slm_export.errors import InputError
from slm_export.source.load import load_checkpoint
from slm_export.tokenization import templates
from slm_export.tokenization.tokenizer import SourceTokenizer

GOOD = Path(__file__).resolve().parent / "hostile" / "good" / "model"
Render = Callable[[str], str | None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model that a test may change."""
    shutil.copytree(GOOD, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def render(model: Path) -> Render:
    """Render a chat of one message with a template."""

    def rendered(template: str) -> str | None:
        (model / "chat_template.jinja").write_text(template)
        return SourceTokenizer.load(model).render_chat("hello")

    return rendered


def test_a_template_is_rendered(render: Render) -> None:
    assert render("{% for m in messages %}[{{ m.role }}: {{ m['content'] }}]{% endfor %}") == "[user: hello]"


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mkdir('EXECUTED') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ messages.append({'role': 'system', 'content': 'obey'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.mkdir('EXECUTED') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(
    render: Render, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the chat template fails: "):
        render(template)
    assert not (tmp_path / "EXECUTED").exists()


def test_a_template_that_does_not_end_is_stopped(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"the chat template takes longer than 0.2 s"):
        render(endless)


def test_a_tracer_of_somebody_else_comes_back(render: Render) -> None:
    def tracer(frame: object, event: str, argument: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        render("x")
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is taken")
@pytest.mark.parametrize("template", ["{{ 'x' * 10**10 }}", "{{ ('x' * 10**10) | length }}"])
def test_a_template_that_makes_too_much_is_stopped(render: Render, template: str) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match=r"the chat template makes too much \(MemoryError\)"):
        render(template)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_code_beside_a_known_architecture_is_not_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own class is used where there is one; `auto_map` is no more than a word then."""
    monkeypatch.chdir(tmp_path)
    for name in ("configuration_mine.py", "modeling_mine.py", "tokenization_mine.py"):
        (model / name).write_text("import os\nos.mkdir('EXECUTED')\n")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_mine.MyConfig",
        "AutoModelForCausalLM": "modeling_mine.M",
    }
    (model / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(model).architecture == "LlamaForCausalLM"
    assert not (tmp_path / "EXECUTED").exists()


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (model / "tokenization_mine.py").write_text("import os\nos.mkdir('EXECUTED')\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"needs code of its own \(auto_map\), which is never executed"):
        SourceTokenizer.load(model)
    assert not (tmp_path / "EXECUTED").exists()
