from pathlib import Path

import pytest

from slm_export.errors import InputError
from slm_export.settings import FILE_NAME, Settings, load_settings

WHOLE = """
model = "org/name"
revision = "main"
target = "android"
device = "pixel-8"
formats = ["executorch", "onnx"]
bits = 4
group_size = 64
embedding_bits = 8
head_bits = 16
palettize = 6
context = 1024
eval_text = "texts/held-out.txt"
calibration = "texts/ours.jsonl"
max_size = "600MB"
max_memory = "1GiB"
min_tokens_per_s = 20.0
max_perplexity_ratio = 1.02
min_cosine = 0.97
out = "build"

[[passes]]
pass = "rotate"

[[passes]]
pass = "gptq"
bits = 8

[gates]
max_kl_mean = 0.05

[diff]
max_bytes_increase = 0.02
"""


def settings(folder: Path, text: str) -> Settings:
    (folder / FILE_NAME).write_text(text)
    loaded = load_settings(folder)
    assert loaded is not None
    return loaded


def problem(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        settings(folder, text)
    return str(caught.value)


def test_no_file_is_no_settings(tmp_path):
    assert load_settings(tmp_path) is None


def test_parents_are_not_searched(tmp_path):
    settings(tmp_path, "bits = 8")
    (tmp_path / "inner").mkdir()
    assert load_settings(tmp_path / "inner") is None


def test_an_empty_file_says_nothing(tmp_path):
    assert settings(tmp_path, "") == Settings()


def test_every_key_is_read(tmp_path):
    loaded = settings(tmp_path, WHOLE)
    assert loaded.model_dump(exclude_none=True) == {
        "model": "org/name",
        "revision": "main",
        "target": "android",
        "device": "pixel-8",
        "formats": ("executorch", "onnx"),
        "passes": ({"pass": "rotate"}, {"pass": "gptq", "bits": 8}),
        "bits": 4,
        "group_size": 64,
        "embedding_bits": 8,
        "head_bits": 16,
        "palettize": 6,
        "context": 1024,
        "eval_text": tmp_path / "texts" / "held-out.txt",
        "calibration": tmp_path / "texts" / "ours.jsonl",
        "max_size": "600MB",
        "max_memory": "1GiB",
        "min_tokens_per_s": 20.0,
        "max_perplexity_ratio": 1.02,
        "min_cosine": 0.97,
        "out": tmp_path / "build",
        "gates": {"max_kl_mean": 0.05},
        "diff": {"max_bytes_increase": 0.02},
    }
    assert set(loaded.model_fields_set) == set(Settings.model_fields)


def test_paths_belong_to_the_folder_of_the_file(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "org" / "name").mkdir(parents=True)
    (project / FILE_NAME).write_text(WHOLE.replace('"pixel-8"', '"devices/mine.toml"'))
    monkeypatch.chdir(tmp_path)
    loaded = load_settings(Path("project"))
    assert loaded is not None
    assert loaded.model == str(project / "org" / "name")
    assert loaded.device == str(project / "devices" / "mine.toml")
    assert loaded.out == project / "build"
    assert loaded.eval_text == project / "texts" / "held-out.txt"


@pytest.mark.parametrize("model", ["./none", "../none", ".", "..", "../org/name"])
def test_a_model_written_as_a_path_is_a_path_even_if_it_is_missing(tmp_path, model):
    loaded = settings(tmp_path, f'model = "{model}"')
    assert loaded.model == str((tmp_path / model).resolve())


@pytest.mark.parametrize("model", ["org/name", "gpt2", ".hidden/name"])
def test_a_model_without_such_a_folder_is_a_hub_name(tmp_path, model):
    assert settings(tmp_path, f'model = "{model}"').model == model


def test_absolute_paths_and_home_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    loaded = settings(
        tmp_path, 'model = "/models/m"\nout = "/out"\neval_text = "~/t.txt"\ndevice = "~/d.toml"'
    )
    assert loaded.model == "/models/m"
    assert loaded.out == Path("/out")
    assert loaded.eval_text == tmp_path / "home" / "t.txt"
    assert loaded.device == str(tmp_path / "home" / "d.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bitts = 4", "unknown key 'bitts'; did you mean 'bits'?"),
        ("group-size = 32", "unknown key 'group-size'; did you mean 'group_size'?"),
        ("[gates]\nmin_top1 = 1", "unknown key 'gates.min_top1'"),
        ("bits = 5", "bits is 5; it must be 4, 8, 16 or 32"),
        ("bits = true", "bits is true; it must be 4, 8, 16 or 32"),
        ('bits = "4"', 'bits is "4"; it must be 4, 8, 16 or 32'),
        ("group_size = 48", "group_size is 48; it must be 32, 64, 128 or 256"),
        ("embedding_bits = 2", "embedding_bits is 2"),
        ("head_bits = 2", "head_bits is 2"),
        ("context = 0", "context is 0"),
        ('target = "androd"', 'target is "androd"; it must be'),
        ('formats = "onnx"', 'formats is "onnx"; it must be a list'),
        ('formats = ["onnx", "onnx"]', "formats: 'onnx' is listed twice"),
        ("formats = []", "formats is []; it must have at least 1 item"),
        ('out = " "', "out: an empty path"),
        ("out = 3", "out is 3; it must be text in quotes"),
        ('model = ""', 'model is ""'),
        ("[gates]\nmin_top1_agreement = 2", "gates.min_top1_agreement is 2"),
        ("[gates]\nmax_kl_mean = nan", "gates.max_kl_mean is nan; it must be a finite number"),
        ("bits = ", "not valid TOML"),
    ],
)
def test_mistakes_are_refused(tmp_path, text, expected):
    assert problem(tmp_path, text).startswith(f"slm-export.toml: {expected}")


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(InputError, match="this is a folder"):
        load_settings(tmp_path)


def test_a_dangling_link_is_an_error_and_not_silence(tmp_path):
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "gone.toml")
    with pytest.raises(InputError, match="no such file"):
        load_settings(tmp_path)
