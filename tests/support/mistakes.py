"""Mistakes of people who write mappings: edits of a copy of the family InternLM2, and what the engine says of them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from tests.support.invoking import invoke

ROOT = Path(__file__).parents[2]
FAMILY = (ROOT / "tests" / "walks" / "my-model.yaml").read_text()  # a copy, so that edits there move no line here
STEP = ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2"
FILE = "my-model.yaml"


@dataclass(frozen=True)
class Mistake:
    """An edit of the family InternLM2 that is wrong; a message must hold what `says` lists.

    Where nothing is replaced, `new` is the whole file.
    """

    title: str
    old: str
    new: str
    says: tuple[str, ...] = ()
    command: tuple[str, ...] = ("lint", FILE)

    @property
    def text(self) -> str:
        """The file with the mistake in it."""
        assert self.old in FAMILY, self.title
        return FAMILY.replace(self.old, self.new, 1) if self.old else self.new

    @property
    def edit(self) -> str:
        """The lines that differ, as a diff shows them, in a block of Markdown."""
        if not self.old:
            return "```diff\n" + "".join(f"+{line}\n" for line in self.new.splitlines()) + "```"
        every = unified_diff(self.old.split("\n"), self.new.split("\n"), n=0, lineterm="")
        lines = [line for line in every if not line.startswith(("---", "+++", "@@")) and len(line) > 1]
        return "```diff\n" + "\n".join(lines).replace("\t", "<tab>") + "\n```"


def told(mistake: Mistake, folder: Path) -> tuple[int, str]:
    """The exit code and what is printed for a mistake; `folder` is the current one."""
    (folder / FILE).write_text(mistake.text)
    if not (folder / "step").exists():
        (folder / "step").symlink_to(STEP)
    done = invoke(*mistake.command)
    return done.exit_code, (done.stdout + done.stderr).replace("\n\n1 error, 0 warnings", "").strip()
