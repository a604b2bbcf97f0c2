"""Virtual files hold, at any byte, what a run writes."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.checkpoint.hf_folder import read_hf_folder
from engine.planning.model import Plan
from engine.run.execute import Small
from engine.serve import readers as serving_readers
from engine.serve.readers import Readers
from engine.serve.virtual import VirtualFolder
from tests.support.depth import sampled

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
WHOLE = [
    ("v1_tp2_pp2", "families/internlm.yaml", {}),
    ("v2_tp2_pp2", "families/internlm2.yaml", {"dtype": "float32", "max_shard_size": 100_000}),
    ("v2_tp2_pp1_normhead", "families/internlm2.yaml", {"dtype": "bfloat16"}),
    ("moe_tp2_pp2_dp1", "families/internlm-moe.yaml", {"max_shard_size": 300_000}),
    ("v1_isp_tp1_wp2", "families/internlm.yaml", {}),
]


def change(file: Path, tensor: str) -> None:
    """Save a rank file again, with one element of a tensor changed."""
    state = torch.load(file, weights_only=True)
    (key,) = (key for key in state if key.endswith(tensor))
    state[key].view(-1)[0] += 1
    torch.save(state, file)


def same(folder: VirtualFolder, written: Path) -> None:
    """Every file whole, then many ranges in random order, each from several threads."""
    names = {path.name for path in written.iterdir()}
    assert set(folder) == names and list(folder) == sorted(names)
    for name in names:
        data, file = (written / name).read_bytes(), folder[name]
        draw = random.Random(name)

        def check(span: tuple[int, int], data: bytes = data, file: Any = file) -> None:
            start, stop = span
            assert file.read(start, stop - start) == data[start:stop], (file.name, start, stop)

        assert file.size == len(data)
        assert file.read() == data
        spans = [sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1))) for _ in range(60)]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(check, [(a, b) for a, b in spans]))


@sampled(2)
@pytest.mark.parametrize(("folder", "mapping", "options"), WHOLE)
def test_every_file_is_byte_for_byte_that_of_a_run(
    folder: str, mapping: str, options: dict[str, Any], tmp_path: Path
) -> None:
    engine.convert(mapping, FIXTURES / folder, tmp_path / "out", **options)
    with engine.virtual(engine.plan(mapping, FIXTURES / folder, **options)) as virtual:
        same(virtual, tmp_path / "out")


def test_the_manifest_is_right_when_it_is_read_first_and_from_its_middle(tmp_path: Path) -> None:
    folder, mapping, options = WHOLE[1]
    engine.convert(mapping, FIXTURES / folder, tmp_path / "out", **options)
    data = (tmp_path / "out" / "conversion.json").read_bytes()
    for start in (len(data) - 30, len(data) // 2, 0):
        with engine.virtual(engine.plan(mapping, FIXTURES / folder, **options)) as virtual:
            assert virtual["conversion.json"].read(start) == data[start:]


def test_headers_of_a_virtual_file_are_read_without_its_sources(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "v2_tp2_pp2", tmp_path / "copy")
    plan = engine.plan("families/internlm2.yaml", tmp_path / "copy", max_shard_size=200_000)
    shutil.rmtree(tmp_path / "copy")
    with engine.virtual(plan) as virtual:
        found = [tensor.name for file in read_hf_folder(virtual.store) for tensor in file.tensors]
    assert sorted(found) == sorted(output.name for output in plan.outputs)


def rank_files(make: Callable[[], Plan], write: Callable[[Path], object], out: Path) -> None:
    write(out)
    with engine.virtual(make()) as virtual:
        same(virtual, out)


def test_rank_files_of_a_reverse_plan_are_those_of_reverse(tmp_path: Path) -> None:
    mapping, hf = "families/internlm2.yaml", tmp_path / "hf"
    engine.convert(mapping, FIXTURES / "v2_tp2_pp2", hf)
    how: dict[str, Any] = {"tp": 2, "pp": 2}
    rank_files(
        lambda: engine.plan_reverse(mapping, hf, **how),
        lambda out: engine.reverse(mapping, hf, out, **how),
        tmp_path / "back",
    )


def test_rank_files_of_a_reshard_plan_are_those_of_reshard(tmp_path: Path) -> None:
    mapping, src = "families/internlm.yaml", FIXTURES / "v1_tp2_pp2"
    how: dict[str, Any] = {"tp": 4, "pp": 1}
    rank_files(
        lambda: engine.plan_reshard(mapping, src, **how),
        lambda out: engine.reshard(mapping, src, out, **how),
        tmp_path / "other",
    )


def test_etags_and_the_commit_are_the_same_for_the_same_bytes_and_others_for_others(tmp_path: Path) -> None:
    folder, mapping, _ = WHOLE[0]
    shutil.copytree(FIXTURES / folder, tmp_path / "copy")

    def told(src: Path, **options: Any) -> tuple[str, dict[str, str]]:
        with engine.virtual(engine.plan(mapping, src, **options)) as virtual:
            assert len(virtual.commit) == 40 and len({file.etag for file in virtual.values()}) == len(virtual)
            return virtual.commit, {name: file.etag for name, file in virtual.items()}

    first = told(FIXTURES / folder)
    assert told(tmp_path / "copy") == first
    told(FIXTURES / folder, max_shard_size=100_000)  # clients keep files by their etags
    commit, etags = told(FIXTURES / folder, dtype="float32")
    other = {name for name, etag in etags.items() if etag != first[1][name]}
    assert commit != first[0] and other == {"model.safetensors", "config.json", "conversion.json", "README.md"}
    change(tmp_path / "copy" / "model_tp0_pp0.pt", "blocks.0.mixer.Wqkv.weight")
    commit, etags = told(tmp_path / "copy")
    assert commit != first[0] and etags["model.safetensors"] != first[1]["model.safetensors"]
    assert etags["config.json"] == first[1]["config.json"]


def test_the_manifest_has_another_etag_when_a_small_file_that_it_names_has_other_bytes() -> None:
    folder, mapping, _ = WHOLE[0]
    plan = engine.plan(mapping, FIXTURES / folder)
    etags = set()
    for data in (b"one", b"one", b"two"):
        with VirtualFolder(plan, lambda data=data: Small({"tokenizer.json": data})) as virtual:  # type: ignore[misc]
            etags.add((virtual["model.safetensors"].etag, virtual["conversion.json"].etag))
    assert len(etags) == 2 and len({weights for weights, _ in etags}) == 1


def test_two_files_of_one_name_are_refused_before_any_is_handed_out() -> None:
    folder, mapping, _ = WHOLE[0]
    with pytest.raises(engine.EngineError, match="E502"):
        VirtualFolder(engine.plan(mapping, FIXTURES / folder), lambda: Small({"model.safetensors": b""}))


def test_etags_are_others_when_a_file_without_checksums_has_other_bytes(tmp_path: Path) -> None:
    folder, mapping, _ = WHOLE[0]
    engine.convert(mapping, FIXTURES / folder, tmp_path / "hf")

    def told() -> dict[str, str]:
        with engine.virtual(engine.plan_reverse(mapping, tmp_path / "hf")) as virtual:
            return {"": virtual.commit} | {name: file.etag for name, file in virtual.items()}

    first = told()
    with (tmp_path / "hf" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x33")
    other = {name for name, etag in told().items() if etag != first[name]}
    assert other == {"", "model_tp0_pp0.pt", "conversion.json"}


def test_nothing_of_a_tensor_is_handed_out_whose_replicas_differ(tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(FIXTURES / "v1_tp2_pp2", src)
    change(src / "model_tp1_pp1.pt", "norm.weight")
    plan = engine.plan("families/internlm.yaml", src)
    with engine.virtual(plan) as virtual:
        file = virtual["model.safetensors"]
        for index, at in zip(plan.shards[0].outputs, range(10**6), strict=False):
            output = plan.outputs[index]
            start = next(one.start for one in file.stretches if getattr(one.fill, "args", None) == (index,))
            if output.name == "model.norm.weight":
                with pytest.raises(engine.EngineError, match="E402") as raised:
                    file.read(start, 1)
                assert "model_tp1_pp1.pt" in str(raised.value)
            else:
                assert len(file.read(start, 1)) == 1, at
        with pytest.raises(engine.EngineError, match="E402"):
            virtual["conversion.json"].read()


def test_every_replica_is_one_of_a_tensor_that_is_written() -> None:
    for folder, mapping, options in WHOLE:
        plan = engine.plan(mapping, FIXTURES / folder, **options)
        read = {copy.source for index in range(len(plan.outputs)) for copy in plan.copies(index)}
        assert plan.replicas and all(read.intersection(one.sources) for one in plan.replicas)
        assert read.union(*(one.sources for one in plan.replicas)) == {*range(len(plan.sources))}


@sampled(2)
@pytest.mark.parametrize("how", ["touched", "replaced", "removed", "truncated"])
def test_a_source_that_changes_is_refused(how: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(FIXTURES / "v1_tp2_pp2", src)
    with engine.virtual(engine.plan("families/internlm.yaml", src)) as virtual:
        file = virtual["model.safetensors"]
        assert file.read()
        one = src / "model_tp0_pp0.pt"
        if how == "touched":
            one.touch()
        elif how == "replaced":
            shutil.copy(one, tmp_path / "other")
            (tmp_path / "other").replace(one)
        elif how == "removed":
            one.unlink()
        else:
            with one.open("r+b") as opened:
                opened.truncate(1000)
        with pytest.raises(engine.EngineError, match=r"E405|E305|E301"):
            file.read()
        assert virtual["config.json"].read()


def test_what_is_closed_is_not_read_and_closing_waits_for_readers() -> None:
    plan = engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2")
    virtual = engine.virtual(plan)
    file = virtual["model.safetensors"]
    whole = file.read()
    found: list[bytes | str] = []

    def read() -> None:
        try:
            while True:
                found.append(file.read())
        except (engine.EngineError, RuntimeError) as error:
            found.append(str(error))

    users = [threading.Thread(target=read) for _ in range(4)]
    for user in users:
        user.start()
    virtual.close()
    for user in users:
        user.join(20)
    assert all(one == whole for one in found if isinstance(one, bytes))
    told = [one for one in found if isinstance(one, str)]
    assert len(told) == 4 and all("closed" in one for one in told)


def test_files_are_closed_once_who_reads_has_ended() -> None:
    readers, order = Readers(engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2")), []
    close, readers._closing = readers._closing, lambda: order.append("closed")  # type: ignore[assignment]
    closing = threading.Thread(target=readers.close)
    with readers._using():
        closing.start()
        while readers._open:
            closing.join(0.001)
        closing.join(0.02)
        order.append("read")
    closing.join(20)
    close()
    assert order == ["read", "closed"]


def test_what_was_interrupted_as_a_read_began_can_be_closed() -> None:
    """It once waited without end for a reader that had never begun."""

    class Interrupted(threading.Condition):
        times = 1

        def __exit__(self, *raised: Any) -> None:
            super().__exit__(*raised)
            if self.times:
                self.times = 0
                raise KeyboardInterrupt

    readers = Readers(engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2"))
    readers._changed = Interrupted()
    with pytest.raises(KeyboardInterrupt), readers._using():
        pass
    closing = threading.Thread(target=readers.close, daemon=True)
    closing.start()
    closing.join(3)
    assert not closing.is_alive()


def test_what_one_of_several_threads_cannot_read_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_readers, "PART_BYTES", 64)
    readers = Readers(engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2"))
    fill = readers._fill

    def failing(output: int, start: int, target: memoryview) -> None:
        if start == 128:
            raise OSError("gone")
        fill(output, start, target)

    monkeypatch.setattr(readers, "_fill", failing)
    with pytest.raises(OSError, match="gone"):
        readers.read_into(0, 0, memoryview(bytearray(256)))
    readers.close()


def test_bytes_beyond_a_file_are_no_bytes() -> None:
    with engine.virtual(engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2")) as virtual:
        file = virtual["model.safetensors"]
        assert file.read(file.size) == file.read(file.size + 5) == file.read(3, 0) == b""
        for start, size in ((file.size, 1), (-1, 1), (file.size + 1, 0)):
            with pytest.raises(ValueError, match="bytes"):
                file.read_into(start, memoryview(bytearray(size)))
