"""Sequences of commands, faults and deeds of users, at random; what each step leaves is judged without the engine.

A model of the truth says which weights each folder holds. A command that succeeds must have written those of its source
as it is now. Whatever it says, nothing else has changed, and an output is the old one or the new one, whole.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import time
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load, load_file

import engine
from engine.serve import revisions
from engine.serve.virtual import VirtualFolder
from engine.storage import objects, output, upload, uploads
from engine.storage.places import store_at
from tests.support.cases import rank_files, same_files
from tests.support.depth import SOAK
from tests.support.disk import tree
from tests.support.forked import run_engine
from tests.support.invoking import invoke
from tests.support.shards import Model, State, build, same, save

MODEL = Model("v2", layers=2, hidden=8, heads=2, groups=2, ffn=12, vocab=16, bias=False)
RULES = ("-m", MODEL.mapping, "--set", "mlp_letters=w2_is_down")
LEFT = re.compile(r"\.out\d?\.(partial|parts|old)-[0-9a-f]{8}|\.out\d?\.lock")  # documented: beside an output
KILLED = 137


class World:
    """Folders, and the seed of the weights that each holds; None for one that must be refused."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw, self.folder, self.log = random.Random(seed), folder, list[str]()
        self.holds: dict[Path, int | None] = {}
        self.written: set[Path] = set()  # outputs as the engine wrote them
        self.plans: dict[Path, list[str]] = {}
        self.save(folder / "step", 0)
        self.first = 0  # the seed of its first rank
        (folder / "thesis.txt").write_text("mine")

    def save(self, to: Path, seed: int) -> None:
        shutil.rmtree(to, ignore_errors=True)
        save(replace(MODEL, seed=seed), to, tp=2, legacy=seed % 2 == 1)
        self.holds[to] = seed

    # --- what is done
    def convert(self) -> None:
        kind = self.draw.choice(["run", "run", "run", "reshard", "reverse"])
        sources = [path for path in self.holds if ((path / "config.json").exists()) == (kind == "reverse")]
        if not sources:
            return
        how = [("--max-shard-size", "700"), ()] if kind == "run" else [("--tp", "1"), ("--tp", "2")]
        also = self.draw.choice([(), ("--overwrite",), ("--resume",), ("--overwrite", "--resume")])
        self.command(kind, self.draw.choice(sources), *RULES, *self.draw.choice(how), *also)

    def plan(self) -> None:
        """A saved plan, its parts, and a commit; between them, deeds."""
        source, path = self.folder / "step", self.folder / "plan.json"
        out = self.out()
        invoke("plan", *RULES, "-s", source, "-o", path, "--overwrite", "--max-shard-size", "700")
        for _ in range(self.draw.randint(1, 3)):
            self.command("part", source, f"{self.draw.randint(1, 2)}/2", "--plan", path, out=out)
            if self.draw.random() < 0.3:
                self.deed()
        last = ("run", source, "--plan", path) if self.draw.random() < 0.2 else ("commit", source, "--plan", path)
        self.command(*last, out=out)

    def out(self) -> Path:
        return self.folder / self.draw.choice(["out", "out", "out2"])

    def command(self, kind: str, source: Path, *options: object, out: Path | None = None) -> None:
        out, before = out or self.out(), tree(self.folder)
        arguments = [kind, *(() if "--plan" in options else ("-s", source)), *options, "-o", out]
        fault = self.fault() if self.draw.random() < 0.4 else None
        self.log.append(" ".join(map(str, arguments)) + (f"  # {fault[0]}" if fault else ""))
        if fault is None:
            done = invoke(*arguments)
            code, said = done.exit_code, done.output + repr(done.exception or "")
        else:
            ended = run_engine(*map(str, arguments), cwd=self.folder, before=fault[1])
            code, said = ended.returncode, ended.stderr.decode()
        self.log[-1] += f" -> {code} {said[:60]!r}"
        self.judge(kind, source, out, before, code, said, overwrite="--overwrite" in options)

    def fault(self) -> tuple[str, Callable[[], None]]:
        """What makes a process end, or the system refuse, at the nth time that it changes a folder or file."""
        what, left = self.draw.choice(["kill", "kill", "interrupt", "full", "refuse"]), [self.draw.randint(1, 90)]

        def before() -> None:
            for name in ("pwritev", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate"):
                setattr(os, name, spoiled(getattr(os, name)))
            for module, name in ((output, "exchange"), (output, "sync_folder")):
                setattr(module, name, spoiled(getattr(module, name)))

        def spoiled(call: Callable[..., Any]) -> Callable[..., Any]:
            def calling(*given: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] == 0 and what == "kill":
                    os._exit(KILLED)
                if left[0] == 0 and what == "interrupt":
                    signal.raise_signal(signal.SIGINT)
                if left[0] == 0 and what == "refuse":
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if left[0] <= 0 and what == "full" and "write" in call.__name__:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return call(*given, **more)

            calling.__name__ = call.__name__
            return calling

        return f"{what} at {left[0]}", before

    def deed(self) -> None:
        """What users do, among them in folders that only the engine should touch."""
        step, out = self.folder / "step", self.out()
        seed, what = self.draw.randint(0, 3), self.draw.randint(0, 8)
        self.log.append(f"deed {what} of seed {seed} and {out.name}")
        if what <= 2:  # another checkpoint in its place; in the third case, of one rank only
            names = sorted(path.name for path in step.iterdir())
            self.save(self.folder / "new", seed)
            for name in ["model_tp1_pp0.pt"] if what == 2 else names:
                self.put(step / name, (self.folder / "new" / name).read_bytes())
            self.first = self.first if what == 2 else seed
            shutil.rmtree(self.folder / "new")
            del self.holds[self.folder / "new"]
            self.holds[step] = seed if seed == self.first else None
        elif what == 3 and out in self.holds and not (self.folder / "moved").exists():
            out.rename(self.folder / "moved")
            self.holds[self.folder / "moved"] = self.holds.pop(out)
            self.written -= {out}
        elif what == 4 and out in self.holds:
            (out / "thesis.txt").write_text("mine")
            self.written -= {out}
        elif what == 5:
            for left in self.folder.glob(".out*.part*"):
                (left / "thesis.txt").write_text("somebody's")
        elif what == 6:
            for left in self.folder.glob(".out*.part*/model-*"):
                left.write_bytes(left.read_bytes()[:-1] + b"?")
        elif what == 7:
            os.utime(step / "model_tp0_pp0.pt", ns=(0, self.draw.choice([0, 4 * 10**18])))
        else:
            assert invoke("clean", out).exit_code == 0
            assert not [left for left in self.folder.glob(f".{out.name}.*-*")]

    def put(self, path: Path, data: bytes) -> None:
        """In place or not, with the old times or new ones."""
        was = path.stat() if path.exists() else None
        if self.draw.random() < 0.5:
            path.unlink(missing_ok=True)
        path.write_bytes(data)
        if was is not None and self.draw.random() < 0.5:
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

    # --- what must hold
    def judge(
        self, kind: str, source: Path, out: Path, before: dict[bytes, object], code: int, said: str, *, overwrite: bool
    ) -> None:
        assert "E901" not in said and "Traceback" not in said, said
        assert code in (0, 130, KILLED) or (code == 1 and re.search(r"\bE[0-9]{3}\b", said)), (code, said)
        after, inside = tree(self.folder), os.fsencode(out)
        for path in before.keys() | after.keys():
            top = os.fsdecode(os.path.relpath(path, os.fsencode(self.folder))).partition("/")[0]
            own = top == out.name or (LEFT.fullmatch(top) and top.startswith(f".{out.name}."))
            assert own or before.get(path) == after.get(path), f"{path!r} was changed"
        old, new = ({p: t[p] for p in t if p == inside or p.startswith(inside + b"/")} for t in (before, after))
        if old == new:
            assert code or kind == "part" or overwrite, "nothing was written"
            return
        assert kind != "part" and (code != 1 or "E403" in said), f"a refusal changed the output: {said}"
        assert len(old) <= 1 or (overwrite and out in self.written), "what is not to be replaced was replaced"
        self.holds[out] = self.holds[source]
        self.written |= {out}
        self.look(out)
        if code == 0:
            left = [path.name for path in self.folder.glob(f".{out.name}.*-*") if ".parts-" not in path.name]
            assert not left, "something was left"

    def look(self, out: Path) -> None:
        """Whether an output holds the weights that it should."""
        seed = self.holds[out]
        assert seed is not None, "a checkpoint that does not fit together was converted"
        model = replace(MODEL, seed=seed)
        if (out / "config.json").exists():
            found: State = {}
            for path in out.glob("*.safetensors"):
                found |= load_file(path)
            same(found, build(model)[3])
        else:
            ranks = len(list(out.glob("model_tp*")))
            save(model, self.folder.parent / "wanted", tp=ranks)
            same_files(rank_files(out), rank_files(self.folder.parent / "wanted"))
            shutil.rmtree(self.folder.parent / "wanted")


@pytest.mark.parametrize("first", range(0, 1200 if SOAK else 12, 12))
def test_a_sequence_of_commands_and_faults_gives_right_outputs_or_refusals(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 12):
        world = World(tmp_path / str(seed) / "here", seed)
        try:
            for _ in range(world.draw.randint(2, 10 if SOAK else 4)):
                world.draw.choice([world.convert, world.convert, world.plan, world.deed])()
        except AssertionError as error:
            error.add_note("\n".join(world.log))
            raise
        shutil.rmtree(tmp_path / str(seed))


class Run:
    """A run's folder that is served while its steps are saved, damaged, removed, and while the disk fails for once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw, self.folder, self.log = random.Random(seed), folder, list[str]()
        self.holds: dict[str, int | None] = {}
        self.bytes: dict[str, bytes] = {}  # by commit
        self.save("100")

        def make(store: Any) -> VirtualFolder:
            return engine.virtual(engine.plan(MODEL.mapping, store, settings={"mlp_letters": "w2_is_down"}))

        self.revisions = revisions.Revisions(store_at(folder, "the run"), make, lambda: "")

    def save(self, name: str) -> None:
        time.sleep(0.005)  # a file system's clock ticks that often
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self.holds[name] = self.draw.randint(0, 3)
        save(replace(MODEL, seed=self.holds[name]), self.folder / name, tp=self.draw.choice([1, 2]))

    def deed(self) -> None:
        name, what = self.draw.choice(sorted(self.holds) or ["100"]), self.draw.randint(0, 4)
        self.log.append(f"deed {what} in {name}")
        if what <= 2 or not (self.folder / name).exists():
            self.save(name if what == 0 else str(100 * self.draw.randint(1, 12)))
        elif what == 3:
            shutil.rmtree(self.folder / name)
            del self.holds[name]
        else:
            time.sleep(0.005)
            (self.folder / name / "model_tp0_pp0.pt").unlink(missing_ok=True)
            self.holds[name] = None

    def fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ask for something new, while one call of the system fails."""
        self.deed()
        left, called = [self.draw.randint(1, 60)], self.draw.choice(["preadv", "scandir", "stat", "open"])
        call = getattr(os, called)

        def failing(*given: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*given, **more)

        self.log.append(f"{called} fails at {left[0]}")
        with monkeypatch.context() as patched:
            patched.setattr(os, called, failing)
            with suppress(AssertionError, OSError, engine.EngineError, revisions.NoRevision):
                self.look()

    def look(self) -> None:
        whole = [name for name, seed in self.holds.items() if seed is not None]
        if not whole:
            with pytest.raises(revisions.NoRevision):
                self.revisions.find("main")
            return
        revision, folder = self.revisions.find("main")
        data = folder["model.safetensors"].read()
        assert revision.name == max(whole, key=int) and self.bytes.setdefault(revision.commit, data) == data
        same(load(data), build(replace(MODEL, seed=self.holds[revision.name] or 0))[3])


@pytest.mark.parametrize("first", range(0, 200 if SOAK else 4, 4))
def test_what_is_served_is_what_the_newest_whole_step_holds_now(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr(revisions, "monotonic", lambda: next(clock))
    for seed in range(first, first + 4):
        run = Run(tmp_path / str(seed), seed)
        try:
            for _ in range(run.draw.randint(2, 10 if SOAK else 5)):
                run.draw.choice([run.deed, run.deed, lambda run=run: run.fail(monkeypatch)])()
                run.look()
        except (AssertionError, engine.EngineError, revisions.NoRevision) as error:
            error.add_note("\n".join(run.log))
            raise


class Lossy:
    """obstore over a store in memory: requests fail, or their responses are lost, and some of these are sent again."""

    def __init__(self, draw: random.Random) -> None:
        self.library, self.draw, self.rate = pytest.importorskip("obstore"), draw, 0.0
        self.memory, self.exceptions = self.library.store.MemoryStore(), self.library.exceptions

    def ask(self, call: Callable[[], Any]) -> Any:
        one = self.draw.random() / (self.rate or 1e-9)
        got = call() if one > 0.3 else None
        if one < 0.6:
            raise self.exceptions.GenericError("no response")
        return call() if one < 1 else got

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.library, name)
        return lambda at, path, *given, **how: self.ask(lambda: call(self.memory, f"{at}/{path}", *given, **how))

    def list_with_delimiter(self, at: str, inside: str | None) -> Any:
        found = self.ask(lambda: self.library.list_with_delimiter(self.memory, f"{at}/{inside or ''}"))
        objects = [{**one, "path": one["path"].removeprefix(f"{at}/")} for one in found["objects"]]
        return {**found, "objects": objects}

    def open_writer(self, at: str, path: str, **how: Any) -> Any:
        made = self.library.open_writer(self.memory, f"{at}/{path}", **how)
        return SimpleNamespace(write=made.write, close=lambda: self.ask(made.close), __exit__=made.__exit__)

    def held(self) -> dict[str, bytes]:
        paths = [one["path"] for one in self.library.list(self.memory).collect()]
        return {path: self.library.get(self.memory, path).bytes().to_bytes() for path in paths}


@pytest.mark.parametrize("seed", range(400 if SOAK else 3))
def test_a_store_is_right_though_responses_are_lost(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, out, holds = random.Random(seed), "s3://b/out", -1
    lossy, plans = Lossy(draw), [tmp_path / "0.json", tmp_path / "1.json"]
    for module in (objects, upload):
        monkeypatch.setattr(module, "library", lambda: lossy)
    monkeypatch.setattr(objects, "client_of", lambda url, options: url.partition("//")[2])
    monkeypatch.setattr(uploads, "_end_uploads", lambda store, ours: [])
    lossy.library.put(lossy.memory, "b/thesis.txt", b"mine")
    for now, plan in enumerate(plans):
        save(replace(MODEL, seed=now), tmp_path / str(now), tp=2)
        invoke("plan", *RULES, "-s", tmp_path / str(now), "-o", plan, "--max-shard-size", "700")
    for _ in range(draw.randint(2, 6 if SOAK else 3)):
        now = draw.randint(0, 1)
        also = draw.choice([(), ("--overwrite",), ("--resume",), ("--overwrite", "--resume")])
        run, parts = ["run", *also], [["part", "1/2"], ["part", "2/2"], ["commit"]]
        for command in draw.choice([[run], [run, run], parts, [["clean", out]]]):
            lossy.rate, before = draw.choice([0, 0.05, 0.3]), lossy.held()
            done = invoke(*command, *(() if "clean" in command else ("--plan", plans[now], "-o", out)))
            lossy.rate, after = 0, lossy.held()
            assert done.exit_code == 0 or re.search(r"E[0-8][0-9]{2}", done.output), (command, done.output)
            assert after["b/thesis.txt"] == b"mine"
            if (mark := "b/out/conversion.json") in after:
                holds = holds if after[mark] == before.get(mark) else now
                found = [load(data) for name, data in after.items() if name.endswith(".safetensors")]
                same(dict(ChainMap(*found)), build(replace(MODEL, seed=holds))[3])
            assert mark in after or command[0] not in ("run", "commit") or done.exit_code
            assert after.get(mark) == before.get(mark) or "E401" not in done.output
    assert invoke("clean", out).exit_code == 0 and "b/out/.engine-lock" not in lossy.held()
    assert invoke("run", "--plan", plans[0], "-o", out, "--overwrite").exit_code == 0
