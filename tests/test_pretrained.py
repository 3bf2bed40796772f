"""Weights to start from: files, runs and published ones, and everything that is wrong with some."""

import hashlib
import importlib.util
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_dataset, save_npz
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import models as torchvision_models
from training import TINY, cifar, make_trainer, tiny_recipe, train

from cifar.checkpoint import load_weights
from cifar.config import ModelConfig, Pretrained, TrainConfig, parse_pretrained
from cifar.errors import ConfigError
from cifar.models import build_model, libraries
from cifar.models.libraries import published_weights, statistics
from cifar.models.pretrained import expected_statistics, start_from_pretrained
from cifar.serialize import contents, digest, from_json, to_json

SQUEEZENET = ModelConfig(name="torchvision:squeezenet1_1", resize=32)
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)


def weights_of(config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_model(config).state_dict()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def using(config: ModelConfig, path: Path) -> ModelConfig:
    fields = {name: getattr(config, name) for name in ("name", "width", "resize", "num_classes")}
    return ModelConfig(**fields, pretrained=parse_pretrained(str(path)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of the tiny network for ten classes."""
    path = tmp_path / "tiny.safetensors"
    save_file(weights_of(TINY), path)
    return path


def test_a_word_is_a_name() -> None:
    assert parse_pretrained("imagenet") == Pretrained(name="imagenet")
    assert str(parse_pretrained("IMAGENET1K_V2")) == "IMAGENET1K_V2"


def test_a_word_that_is_a_run_s_folder_is_that_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert parse_pretrained("base") == Pretrained(name="base"), "an empty folder is no run"
    (tmp_path / "base" / "final").mkdir()
    (tmp_path / "base" / "final" / "model.safetensors").write_bytes(file.read_bytes())
    assert parse_pretrained("base").sha256 == sha256(file)


def test_a_file_is_known_by_its_checksum_and_not_by_its_path(file: Path, tmp_path: Path) -> None:
    found = parse_pretrained(str(file))
    assert found == Pretrained(sha256=sha256(file), path=str(file))
    assert parse_pretrained(f"{file}@{sha256(file)[:8].upper()}") == found
    moved = file.rename(tmp_path / "moved.safetensors")
    here, there = (
        TrainConfig(model=ModelConfig(pretrained=each))
        for each in (found, parse_pretrained(str(moved)))
    )
    assert here != there and digest(here) == digest(there)
    assert digest(here) != digest(TrainConfig())
    assert contents(here) == {"model": {"pretrained": {"sha256": sha256(moved)}}}
    assert from_json(TrainConfig, to_json(here)) == here


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("absent.pth", r"pretrained: 'absent\.pth': no such file; write imagenet, the name of w"),
        ("./notes.txt", r"pretrained: '\./notes\.txt': is no \.safetensors, \.pt, \.pth; write"),
        (".", r"pretrained: '\.': has no final/model\.safetensors; give a run that has ended, or"),
        ("tiny.safetensors@00000000", r"the SHA-256 of the file is [0-9a-f]{64}; give that one"),
        ("~no-such-user-anywhere/x.pth", r"pretrained: .*: no such user"),
        ("folder.pth/", r"pretrained: .*: has no final/model\.safetensors"),
        ("x" * 300 + ".pth", r"pretrained: .*: cannot be read \(File name too long\); give anoth"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(
    text: str, told: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "notes.txt").touch()
    (file.parent / "folder.pth").mkdir()
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError, match=told):
        parse_pretrained(text)


@pytest.mark.parametrize("text", ["[]", "{", '{"mean": 3, "std": 4}', '{"mean": [1]}'])
def test_a_damaged_card_beside_the_weights_is_told(file: Path, text: str) -> None:
    (file.parent / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.json beside it is damaged; take it away"):
        parse_pretrained(str(file))


@pytest.mark.parametrize(
    ("name", "weights", "told"),
    [
        (
            "resnet18",
            "imagenet",
            r"pretrained: 'imagenet': is no file, and resnet18 has no weights",
        ),
        ("timm:resnet18", "IMAGENET1K_V1", r"timm names weights with the model, as in timm:resne"),
    ],
)
def test_names_are_for_those_who_have_them(name: str, weights: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ModelConfig(name=name, pretrained=Pretrained(name=weights))


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    config = ModelConfig(name="torchvision:resnet50", pretrained=Pretrained(name="V3"))
    for asked in (statistics, published_weights):
        with pytest.raises(ConfigError, match=r"'V3': .* has IMAGENET1K_V1, IMAGENET1K_V2; give"):
            asked(config)


def test_a_network_takes_a_file_s_weights_but_a_head_of_other_classes(file: Path) -> None:
    stored, fresh = (
        load_file(file),
        weights_of(ModelConfig(name="resnet20", width=4, num_classes=3)),
    )
    config = using(ModelConfig(name="resnet20", width=4, num_classes=3), file)
    torch.manual_seed(1)
    module = build_model(config)
    start_from_pretrained(module, config)
    for name, tensor in module.state_dict().items():
        expected = fresh if name.startswith("fc.") else stored
        assert torch.equal(tensor, expected[name]), name
    same = using(TINY, file)
    module = build_model(same)
    start_from_pretrained(module, same)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
def test_files_of_every_kind_are_read(suffix: str, holder: str | None, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    stored = weights_of(TINY)
    if suffix == ".safetensors":
        save_file(stored, path)
    else:
        torch.save(stored if holder is None else {holder: stored, "epoch": 3}, path)
    config = using(TINY, path)
    module = build_model(config)
    start_from_pretrained(module, config)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def stored_as(what: str, path: Path) -> Path:
    weights = weights_of(TINY)
    if what == "garbage":
        path.write_bytes(b"no weights at all")
    elif what == "harmful":
        path.write_bytes(pickle.dumps(Harmful()))
    elif what == "a list":
        torch.save([1, 2], path)
    elif what == "empty":
        torch.save({}, path)
    elif what == "another":
        torch.save(weights_of(ModelConfig(name="resnet20", width=8)), path)
    elif what == "a part":
        torch.save({name: each for name, each in weights.items() if name != "bn1.bias"}, path)
    elif what == "more":
        torch.save(weights | {"more": torch.zeros(2)}, path)
    elif what == "half a head":
        torch.save({name: each for name, each in weights.items() if name != "fc.bias"}, path)
    return path


@pytest.mark.parametrize(
    ("what", "suffix", "told"),
    [
        (
            "garbage",
            ".pth",
            r"holds no tensors by name \(.*\); give a \.safetensors file, or the st",
        ),
        ("garbage", ".safetensors", r"holds no tensors by name \(.*\); give a \.safetensors file"),
        ("harmful", ".pt", r"holds no tensors by name \(.*\); give a \.safetensors file"),
        ("a list", ".pt", r"holds no tensors by name; give a \.safetensors file"),
        ("empty", ".pt", r"holds no tensors by name; give a \.safetensors file"),
        ("another", ".pt", r"of another network: bn1\.bias is \[8\], must be \[4\]; give its own"),
        ("a part", ".pt", r"of another network: bn1\.bias is absent, must be \[4\]; give its own"),
        ("more", ".pt", r"of another network: more is \[2\], must be absent; give its own ones"),
        ("half a head", ".pt", r"of another network: fc\.bias is absent, must be \[10\]"),
    ],
)
def test_a_file_that_does_not_do_is_one_line(
    what: str, suffix: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = using(TINY, stored_as(what, tmp_path / f"weights{suffix}"))
    with pytest.raises(ConfigError, match=told) as raised:
        start_from_pretrained(build_model(config), config)
    assert str(raised.value).startswith("pretrained: ") and "\n" not in str(raised.value)
    assert not Path("harm").exists()


def test_a_file_that_has_changed_or_gone_since_is_one_line(file: Path) -> None:
    config = using(TINY, file)
    module = build_model(config)
    save_file(weights_of(TINY, seed=2), file)
    with pytest.raises(ConfigError, match=r"the SHA-256 of .* is \w{64}, must begin with \w{64}"):
        start_from_pretrained(module, config)
    file.unlink()
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\); put it"):
        start_from_pretrained(module, config)
    nowhere = ModelConfig(name="resnet20", width=4, pretrained=Pretrained(sha256="0" * 64))
    with pytest.raises(ConfigError, match=r"pretrained: '0+': has no path; name it anew"):
        start_from_pretrained(module, nowhere)


def test_a_run_is_fine_tuned_on_other_classes_and_normalised_as_it_was(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path / "first", "--epochs", 1) == 0
    first = load_file(tmp_path / "first" / "final" / "model.safetensors")
    mean = tuple(make_dataset().train.images.mean((0, 2, 3)) / 255)
    three = make_dataset(classes=3)
    other = save_npz(tmp_path / "three.npz", three)
    options = ("--pretrained", tmp_path / "first", "--frozen-epochs", 1, "--epochs", 1)
    assert train(other, tmp_path / "second", *options) == 0
    assert "resnet20-w4-pretrained on " in capsys.readouterr().out
    second = load_file(tmp_path / "second" / "final" / "model.safetensors")
    assert second["fc.weight"].shape == (3, 16)
    body = [name for name in first if not name.startswith("fc.")]
    assert all(torch.equal(first[name], second[name]) for name in body)
    assert load_weights(tmp_path / "second")[0].mean == pytest.approx(mean)
    own = tuple(three.train.images.mean((0, 2, 3)) / 255)
    assert own != pytest.approx(mean)


@pytest.mark.parametrize(("names", "is_new"), [(None, False), ("other", True)])
def test_a_classifier_of_as_many_other_classes_is_new(
    npz: Path, tmp_path: Path, names: str | None, is_new: bool
) -> None:
    assert train(npz, tmp_path / "first", "--epochs", 1) == 0
    config = ModelConfig(
        name="resnet20", width=4, pretrained=parse_pretrained(str(tmp_path / "first"))
    )
    module = build_model(config)
    own = module.fc.weight.clone()
    classes = load_weights(tmp_path / "first")[0].classes
    start_from_pretrained(
        module, config, [f"{names} {each}" for each in classes] if names else classes
    )
    assert torch.equal(module.fc.weight, own) == is_new
    stored = load_file(tmp_path / "first" / "final" / "model.safetensors")
    assert torch.equal(module.conv1.weight, stored["conv1.weight"])


def test_a_resumed_run_and_an_evaluation_do_not_read_the_file(
    npz: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path / "run", "--pretrained", file, "--epochs", 1) == 0
    file.unlink()
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert cifar("train", "--resume", tmp_path / "run") == 0
    again = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert cifar("evaluate", tmp_path / "run", "--cpu") == 0
    capsys.readouterr()
    save_file(weights_of(TINY, seed=2), file)
    assert cifar("train", "--resume", tmp_path / "run", "--pretrained", file) == 2
    assert f"pretrained: '{sha256(file)}': the run to resume has '" in capsys.readouterr().err


def test_weights_of_images_of_other_channels_are_refused(file: Path) -> None:
    found = parse_pretrained(str(file))
    chosen = Pretrained(sha256=found.sha256, path=found.path, mean=(0.5,), std=(0.2,))
    with pytest.raises(ConfigError, match="are of images of 1 channels, these have 3; give others"):
        make_trainer(model=ModelConfig(name="resnet20", width=4, pretrained=chosen))


def served(folder: Path, monkeypatch: pytest.MonkeyPatch, checksum: str | None = None) -> Path:
    """SqueezeNet's weights for 1000 classes where torchvision's are said to lie; its cache."""
    source = folder / "source.pth"
    torch.save(weights_of(ModelConfig(name=SQUEEZENET.name, num_classes=1000)), source)
    name = f"squeezenet1_1-{checksum or sha256(source)[:8]}.pth"
    source = source.rename(folder / name)
    member = SimpleNamespace(url=source.as_uri())
    monkeypatch.setattr(libraries, "_torchvision_weights", lambda _config, _name: member)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "cache"))
    return folder / "cache" / "checkpoints" / name


NAMED = ModelConfig(
    name=SQUEEZENET.name, resize=32, num_classes=3, pretrained=Pretrained(name="IMAGENET1K_V1")
)


def test_published_weights_are_fetched_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = served(tmp_path, monkeypatch)
    stored = torch.load(tmp_path / cached.name, weights_only=True)
    module = build_model(NAMED)
    start_from_pretrained(module, NAMED)
    assert cached.exists()
    state = module.state_dict()
    assert torch.equal(state["features.0.weight"], stored["features.0.weight"])
    assert state["classifier.1.weight"].shape == (3, 512, 1, 1)
    told = capsys.readouterr()
    assert told.err.startswith("note: fetching file://") and told.out == ""
    (tmp_path / cached.name).unlink()
    start_from_pretrained(module, NAMED)
    assert capsys.readouterr().err == ""
    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    with pytest.raises(
        ConfigError, match=rf"the SHA-256 of {cached} is \w+, must begin with \w{{8}}:"
    ):
        start_from_pretrained(module, NAMED)


def test_of_several_that_start_at_once_one_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(tmp_path, monkeypatch)
    original, fetched = torch.hub.download_url_to_file, []

    def download(url: str, path: str, *words: Any, **options: Any) -> None:
        fetched.append(path)
        time.sleep(0.3)  # in which the other one would find nothing there
        original(url, path, *words, **options)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(published_weights, [NAMED, NAMED]))
    assert len(fetched) == 1
    assert torch.equal(*(each["classifier.1.weight"] for each in found))


def test_weights_of_a_wrong_checksum_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = served(tmp_path, monkeypatch, checksum="00000000")
    with pytest.raises(ConfigError, match=r"cannot be fetched \(invalid hash value .*or give a fi"):
        start_from_pretrained(build_model(NAMED), NAMED)
    assert not cached.exists()


def test_weights_that_cannot_be_fetched_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = served(tmp_path, monkeypatch)
    (tmp_path / cached.name).unlink()
    told = (
        rf"'IMAGENET1K_V1': file://.* cannot be fetched \(.*\); put the file at {cached}, or give"
    )
    with pytest.raises(ConfigError, match=told):
        start_from_pretrained(build_model(NAMED), NAMED)


def test_what_torchvision_s_files_name_otherwise_or_have_too_much_of() -> None:
    assert libraries._renamed("features.denseblock1.denselayer2.norm.1.weight") == (
        "features.denseblock1.denselayer2.norm1.weight"
    )
    assert libraries._renamed("features.norm5.weight") == "features.norm5.weight"
    extra = ("AuxLogits.fc.weight", "aux1.fc1.bias", "aux2.conv.bn.weight")
    assert all(map(libraries._is_extra, extra)) and not libraries._is_extra("fc.weight")


def test_every_network_of_torchvision_has_weights_whose_statistics_and_checksum_are_known() -> None:
    for name in torchvision_models.list_models(module=torchvision_models):
        config = ModelConfig(name=f"torchvision:{name}")
        half = name in ("googlenet", "inception_v3", "efficientnet_v2_l")
        expected = HALF if half else IMAGENET_STATISTICS
        assert statistics(config) == expected, name
        for each in torchvision_models.get_model_weights(name):
            assert re.search(r"-[0-9a-f]{8,}\.pth$", each.url), each
        assert libraries.usual_size(config) >= 224


def test_inception_gets_what_torchvision_would_turn_images_into() -> None:
    """Pixels of its usual statistics, which its `transform_input` makes ones of a half."""
    images = torch.rand(2, 3, 4, 4)
    usual = [torch.tensor(each).view(3, 1, 1) for each in IMAGENET_STATISTICS]
    with torch.device("meta"):
        theirs = torchvision_models.inception_v3(
            weights=None, transform_input=True, init_weights=False
        )
    expected = theirs._transform_input((images - usual[0]) / usual[1])
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in statistics(
        ModelConfig(name="torchvision:inception_v3")
    ))  # fmt: skip
    torch.testing.assert_close((images - mean) / std, expected)


def test_images_are_normalised_as_pretrained_weights_expect(file: Path) -> None:
    assert expected_statistics(SQUEEZENET) is None
    assert expected_statistics(using(TINY, file)) is None, "nobody knows"
    config = using(SQUEEZENET, file)
    assert expected_statistics(config) == IMAGENET_STATISTICS
    save_file(weights_of(SQUEEZENET), file)
    trainer = make_trainer(
        tiny_recipe(global_batch_size=8), model=using(SQUEEZENET, file), data=make_dataset(16, 8)
    )
    pixels = torch.from_numpy(trainer.dataset.test.images[:1]) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in expected_statistics(config) or ())
    (batch,) = [trainer.test_images.batch(torch.tensor([0]))]
    torch.testing.assert_close(batch.images, (pixels - mean) / std)


@needs_timm
def test_timm_s_weights_come_from_the_hub_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    stored = timm.create_model("resnet10t").state_dict()
    plain = tmp_path / "plain.safetensors"
    save_file(stored, plain)
    blob = tmp_path / "blobs" / sha256(plain)
    blob.parent.mkdir()
    plain.rename(blob)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    asked = []

    def download(repository: str, filename: str, revision: str | None = None) -> str:
        asked.append((repository, filename))
        return str(link)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config = ModelConfig(name="timm:resnet10t", pretrained=Pretrained(name="imagenet"))
    module = build_model(config)
    start_from_pretrained(module, config)
    assert asked == [("timm/resnet10t.c3_in1k", "model.safetensors")]
    state = module.state_dict()
    assert torch.equal(state["conv1.0.weight"], stored["conv1.0.weight"])
    assert state["fc.weight"].shape == (10, 512)
    assert statistics(config) == IMAGENET_STATISTICS
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigError, match=r"must begin with [0-9a-f]{64}: damaged or another"):
        start_from_pretrained(module, config)


@needs_timm
def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_words: object, **_options: object) -> str:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config = ModelConfig(name="timm:resnet10t", pretrained=Pretrained(name="imagenet"))
    with pytest.raises(
        ConfigError, match=r"cannot be fetched \(no route\); try again, or give a f"
    ):
        start_from_pretrained(build_model(config), config)
