"""Every attack of the corpus gives its error, runs nothing, and leaves nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import EngineError
from tests.attacks import Attack, canary, corpus
from tests.support.depth import SOAK, sampled
from tests.support.disk import Disk, contents, tree
from tests.support.shards import Model, save

V1 = Model()
LETTERS = {"mlp_letters": "w2_is_down"}
SECONDS = 20  # far more than any takes, and far less than what is not bounded
MEMORY = 512 << 10  # KiB that the whole process may grow by
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint, a Hugging Face one, and a mapping with its layout."""
    folder = tmp_path_factory.mktemp("good")
    save(V1, folder / "training", tp=2, pp=2)
    torch.save(V1.config(1), folder / "training" / "plain_config.pt")
    engine.convert(V1.mapping, folder / "training", folder / "hf", settings=LETTERS, max_shard_size=9000)
    (folder / "mapping").mkdir()
    text = (ROOT / "mappings" / V1.mapping).read_text(encoding="utf-8")
    (folder / "mapping" / "mapping.yaml").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "mappings" / "layouts" / "internevo.yaml", folder / "mapping" / "layout.yaml")
    return folder


def run(attack: Attack, folder: Path, out: Path, source: Path) -> None:
    """What a user would do with such a folder."""
    if attack.start == "training":
        engine.convert(V1.mapping, folder, out, settings=LETTERS)
    elif attack.start == "hf":
        engine.reverse(V1.mapping, folder, out, tp=2)
    else:
        mapping = folder / "mapping.yaml"
        engine.convert(mapping, source, out, settings=LETTERS)
        shutil.rmtree(out)
        engine.reshard(mapping, source, out, settings=LETTERS, tp=1)


def check(attack: Attack, good: Path, tmp_path: Path) -> None:
    folder, out, source = tmp_path / "in", tmp_path / "out" / "made", tmp_path / "step"
    shutil.copytree(good / attack.start, folder, symlinks=True)
    if attack.start == "mapping":
        shutil.copytree(good / "training", source)
        text = (folder / "mapping.yaml").read_text(encoding="utf-8")
        text = text.replace("layout: internevo", f"layout: {folder / 'layout.yaml'}")
        (folder / "mapping.yaml").write_text(text, encoding="utf-8")
    attack.make(folder)
    out.parent.mkdir()
    before = tree(tmp_path)
    used, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    error: EngineError | None = None
    try:
        run(attack, folder, out, source)
    except EngineError as refused:
        error = refused
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < MEMORY
    assert not canary(folder).exists()
    harmless = not attack.codes or "ok" in attack.codes
    if out.exists():
        assert harmless, "it was converted"
        assert not engine.api.verify(out).problems
        shutil.rmtree(out)
    assert tree(tmp_path) == before
    if error is None:
        assert harmless
        return
    assert error.code in attack.codes, str(error)[:2000]
    shown = str(error)
    assert attack.word in shown
    assert len(shown) < 20_000
    shown.encode()
    assert error.fix or attack.start == "mapping"


CARRIERS = ("rank file", "old rank file", "config", "training config")
CARRIED = re.compile(r"(.*) in an? (rank file|old rank file|config|training config)")


def chosen(attack: Attack) -> bool:
    """Of a value that comes in every carrier one in turn, by its name; all of them in the soak."""
    found = CARRIED.fullmatch(attack.name)
    if found is None or SOAK:
        return True
    return CARRIERS[zlib.crc32(found[1].encode()) % len(CARRIERS)] == found[2]


def names(start: Any) -> list[Any]:
    return [
        pytest.param(attack, id="".join(c if c.isascii() and c.isprintable() else "?" for c in attack.name))
        for attack in corpus(start)
        if chosen(attack)
    ]


@sampled(8, "attack.codes", "attack.make.__module__")
@pytest.mark.parametrize("attack", names("training"))
def test_a_hostile_checkpoint_is_refused_with_the_right_error(attack: Attack, good: Path, tmp_path: Path) -> None:
    check(attack, good, tmp_path)


@sampled(3, "attack.codes", "attack.make.__module__")
@pytest.mark.parametrize("attack", names("hf"))
def test_a_hostile_hugging_face_checkpoint_is_refused(attack: Attack, good: Path, tmp_path: Path) -> None:
    check(attack, good, tmp_path)


@sampled(10, "attack.codes")
@pytest.mark.parametrize("attack", names("mapping"))
def test_a_hostile_mapping_is_refused(attack: Attack, good: Path, tmp_path: Path) -> None:
    check(attack, good, tmp_path)


@sampled(3, "attack.start", "attack.codes")
@pytest.mark.parametrize("attack", [*names("interrupted"), *names("interrupted hf")])
def test_a_resumed_run_writes_what_a_new_one_would_or_is_refused(
    attack: Attack, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out" / "made"
    shutil.copytree(good / ("training" if attack.start == "interrupted" else "hf"), folder)
    out.parent.mkdir()

    def go(out: Path, **how: Any) -> None:
        if attack.start == "interrupted":
            engine.convert(V1.mapping, folder, out, settings=LETTERS, max_shard_size=9000, **how)
        else:
            engine.reverse(V1.mapping, folder, out, tp=2, **how)

    with monkeypatch.context() as patch:
        Disk(patch, 25 if attack.start == "interrupted" else 60)
        with pytest.raises(EngineError) as caught:
            go(out, workers=1)
    assert caught.value.code == "E403"
    attack.make(folder)
    before = tree(tmp_path)
    try:
        go(out, resume=True)
    except EngineError as error:
        assert error.code in attack.codes, str(error)
        assert attack.word in str(error)
        assert tree(tmp_path) == before
        return
    assert not attack.codes or "ok" in attack.codes
    go(tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    assert os.listdir(out.parent) == ["made"]
