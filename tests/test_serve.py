"""`slm-export serve`: the official client against bundles in their runtimes, held against transformers."""

from __future__ import annotations

import json
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import openai
import pytest
import torch
from conftest import ROOT
from forked import Forked
from serving import UNQUANTIZED, Served, save_chat_model, serving

from slm_export.graph.model import build_reference
from slm_export.source.load import load_checkpoint

TOKEN = "the-token-of-a-test"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
RENDERED = "system: Be brief.\nuser: def add(a, b):\nassistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serving")
    save_chat_model(made / "tiny")
    families.save(families.ENCODERS["bert"], made / "encoder")
    families.save_tokenizer(made / "encoder")
    return made


def bundle(folder: Path, model: str, format: str, quick_cli: Forked) -> Path:
    out = folder / f"{model}-{format}"
    if not out.exists():
        done = quick_cli(model, *UNQUANTIZED, "--format", format, "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module", params=["onnx", pytest.param("executorch", marks=pytest.mark.slow)])
def chat(folder: Path, request: pytest.FixtureRequest, quick_cli: Forked) -> Iterator[Served]:
    with serving(bundle(folder, "tiny", request.param, quick_cli)) as served:
        yield served


def client(served: Served, token: str = "none is needed") -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key=token, max_retries=0, timeout=300)


class Source:
    """The source model in transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def writes(self, ids: list[int], tokens: int) -> str:
        with torch.no_grad():
            out = self.model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
            )
        text: str = self.tokenizer.decode(out[0][len(ids) :])
        return text


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source(folder / "tiny")


def test_a_chat_is_the_source_models_own(chat: Served, source: Source) -> None:
    ids = source.tokenizer(RENDERED, add_special_tokens=False)["input_ids"]
    expected = source.writes(ids, 8)
    asked: Any = {"model": chat.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    whole = client(chat).chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 8)

    options: Any = {"include_usage": True}
    parts = list(client(chat).chat.completions.create(**asked, stream=True, stream_options=options))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].usage == whole.usage
    assert len(parts) > 3


def test_completions_take_texts_and_tokens(chat: Served, source: Source) -> None:
    texts = ["def fibonacci(n):", "class Stack:"]
    every = [source.tokenizer(text)["input_ids"] for text in texts]
    expected = [source.writes(ids, 6) for ids in every]
    create = client(chat).completions.create
    several = create(model=chat.model, prompt=texts, temperature=0, max_tokens=6)
    assert [choice.text for choice in several.choices] == expected
    assert [choice.index for choice in several.choices] == [0, 1]
    assert (
        create(model=chat.model, prompt=every[0], temperature=0, max_tokens=6).choices[0].text == expected[0]
    )
    # A text that ends the answer is not part of it, wherever pieces part.
    stop = expected[0][2:5]
    stopped = create(model=chat.model, prompt=texts[0], temperature=0, max_tokens=6, stop=stop).choices[0]
    assert stopped.text == expected[0][: expected[0].index(stop)]
    assert stopped.finish_reason == "stop"
    streamed = create(model=chat.model, prompt=texts[0], temperature=0, max_tokens=6, stop=stop, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == stopped.text


def test_a_seed_makes_an_answer_repeatable(chat: Served) -> None:
    def answer(seed: int) -> str:
        made = client(chat).completions.create(
            model=chat.model, prompt="def f():", max_tokens=12, seed=seed, top_p=0.9
        )
        return made.choices[0].text

    assert answer(1) == answer(1) != answer(2)


def test_models_are_listed(chat: Served) -> None:
    assert [model.id for model in client(chat).models.list()] == [chat.model]
    assert client(chat).models.retrieve(chat.model).id == chat.model
    with pytest.raises(openai.NotFoundError, match=f"no model 'gpt' here; this server has '{chat.model}'"):
        client(chat).models.retrieve("gpt")


def test_the_example_of_the_page_runs(
    chat: Served, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found
    code = found[1]
    here = {
        "http://127.0.0.1:8080/v1": chat.url,
        "pycode-5m": chat.model,
        "max_tokens=64": "max_tokens=6, temperature=0",
    }
    for there, ours in here.items():
        assert there in code
        code = code.replace(there, ours)
    exec(code, {})
    ids = source.tokenizer("def fibonacci(n):")["input_ids"]
    assert capsys.readouterr().out == source.writes(ids, 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"n": 2}, "'n' is not supported by this server; leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"extra_body": {"temprature": 1}}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"messages": []}, "messages: Tuple should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: Tuple should have at most 4 items"),
        ({"stop": [""]}, "stop: a stop sequence has 1 to 256 characters"),
        ({"stream_options": {"include_usage": True}}, "'stream_options' is of use with 'stream' alone"),
        ({"messages": [{"role": "user", "content": "word " * 99}]}, "tokens, but the context holds 64"),
    ],
)
def test_what_is_not_understood_is_refused(chat: Served, change: dict[str, Any], words: str) -> None:
    asked: Any = {"model": chat.model, "messages": MESSAGES, "max_tokens": 2, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client(chat).chat.completions.create(**asked)
    assert words in caught.value.message
    if "stream_options" not in change:
        with pytest.raises(openai.BadRequestError):
            client(chat).chat.completions.create(**asked, stream=True)


def test_what_asks_for_nothing_is_let_pass(chat: Served) -> None:
    made = client(chat).chat.completions.create(
        model=chat.model,
        messages=MESSAGES,
        max_completion_tokens=1,
        n=1,
        presence_penalty=0,
        user="somebody",
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert made.usage is not None
    assert made.usage.completion_tokens == 1


def answer_of(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        url, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_web_pages_are_kept_out(chat: Served) -> None:
    body = json.dumps({"model": chat.model, "prompt": "x", "max_tokens": 1}).encode()
    url = f"{chat.url}/completions"
    assert answer_of(url, body, content_type="application/json")[0] == 200
    # What a form or a script of a page may send without asking first, and a name that leads here by a trick.
    assert answer_of(url, body, content_type="text/plain")[0] == 415
    code, said = answer_of(url, body, content_type="application/json", host="evil.example")
    assert (code, said["error"]["message"]) == (403, "this server is asked as localhost or 127.0.0.1 alone")


def test_requests_of_no_sense_have_answers_in_the_same_form(chat: Served) -> None:
    assert answer_of(f"{chat.url}/nothing")[0] == 404
    assert answer_of(f"{chat.url}/completions")[0] == 405
    code, said = answer_of(f"{chat.url}/completions", b"{", content_type="application/json")
    assert code == 400
    assert said["error"]["message"].startswith("the body is not valid JSON")
    code, said = answer_of(f"{chat.url}/completions", b"[" * 100_000, content_type="application/json")
    assert code == 400
    code, _ = answer_of(f"{chat.url}/completions", b" " * (9 << 20), content_type="application/json")
    assert code == 413
    code, said = answer_of(
        f"{chat.url}/embeddings",
        json.dumps({"model": chat.model, "input": "x"}).encode(),
        content_type="application/json",
    )
    assert code == 400
    assert "a model for text-generation; this address needs one for" in said["error"]["message"]


def test_embeddings_are_the_source_models_own(folder: Path, quick_cli: Forked) -> None:
    checkpoint = load_checkpoint(folder / "encoder")
    reference: Any = build_reference(checkpoint)
    eager = families.eager(families.ENCODERS["bert"], folder / "encoder")
    texts = ["the first text", "a second, longer one"]
    with serving(
        bundle(folder, "encoder", "onnx", quick_cli), "--token-env", "OURS", extra={"OURS": TOKEN}
    ) as served:
        with pytest.raises(openai.AuthenticationError, match="no token, or not the right one"):
            client(served).embeddings.create(model=served.model, input=texts)
        ours = client(served, TOKEN)
        made = ours.embeddings.create(model=served.model, input=texts)
        plain = ours.embeddings.create(model=served.model, input=texts, encoding_format="float")
        alone = ours.embeddings.create(model=served.model, input=texts[1])
        with pytest.raises(openai.BadRequestError, match="have 64 dimensions"):
            ours.embeddings.create(model=served.model, input=texts, dimensions=32)
        with pytest.raises(openai.BadRequestError, match="token 999999 is none of the"):
            ours.embeddings.create(model=served.model, input=[999_999])
        with pytest.raises(openai.BadRequestError, match="needs one for text-generation"):
            ours.completions.create(model=served.model, prompt="x")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "encoder")
    counted = 0
    for number, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        counted += ids.numel()
        with torch.no_grad():
            hidden = eager(ids, attention_mask=torch.ones_like(ids))[0]
            expected = reference.pooling(hidden, torch.ones_like(ids))[0]
        got = torch.tensor(made.data[number].embedding)
        assert families.apart(got, expected) <= families.UNQUANTIZED
        assert torch.equal(got, torch.tensor(plain.data[number].embedding))
    assert made.usage.prompt_tokens == counted
    assert alone.data[0].embedding == made.data[1].embedding


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path, quick_cli: Forked) -> None:
    made = bundle(folder, "tiny", "onnx", quick_cli)
    done = quick_cli("serve", made, "--host", "0.0.0.0", cwd=tmp_path)
    assert done.returncode == 2
    assert "--host 0.0.0.0: other machines could reach it, so requests must bring a token" in done.stderr
    done = quick_cli("serve", made, "--token-env", "NOT_SET", cwd=tmp_path)
    assert done.returncode == 2
    assert "--token-env NOT_SET: no such variable is set" in done.stderr

    shutil.copytree(made, tmp_path / "changed")
    artifact = tmp_path / "changed" / "onnx" / "model.onnx"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"\0")
    done = quick_cli("serve", "changed", "--port", "0", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert "onnx/model.onnx: changed" in json.loads(done.stdout)["error"]["message"]

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = quick_cli("serve", made, "--port", str(port), cwd=tmp_path)
    assert done.returncode == 4
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in done.stderr
