"""What InternEvo's configuration says of how a model is computed, where a key may be absent or mean two things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, Place
from engine.oracle.internevo_shards import setting


@dataclass(frozen=True)
class Said:
    """The configuration, with the little of the tensors' names that decides what a key means.

    Attributes:
        kind: `model_type` of the training configuration, in upper case; empty where there is none.
        v1: whether it is InternLM's first model.
        late: whether it is Qwen2 or Baichuan2, of whose code all releases agree on what a key means.
        fused: whether queries, keys and values are one tensor.
    """

    config: Mapping[str, Any]
    kind: str = ""
    v1: bool = False
    late: bool = False
    fused: bool = False

    def in_pairs(self, told: str | None) -> bool:
        """Whether rotary pairs are neighbours: `qk_interleaved`, or before it the opposite of `adapt_hf`.

        Absent both, v1 and InternLM2 have halves; so has InternLM3, which came later, but not Llama. Training passes
        each key on as it is, so null means false, not the default.

        Args:
            told: the choice of the variant `rotary`, if a setting made it.
        """
        if self.v1 or "qk_interleaved" in self.config:
            return bool(self.config.get("qk_interleaved"))
        if "adapt_hf" in self.config:
            return not self.config["adapt_hf"]
        later = self.late or self.kind.startswith(("INTERNLM2", "INTERNLM3"))
        return told == "pairs" if told is not None else not (self.fused or later)

    def in_pieces(self, told: str | None) -> bool:
        """Whether wq, wk and wv are pieces of one linear: since 2024-09 by default for InternLM2, but not for Llama.

        Args:
            told: the choice of the variant `fusion`, if a setting made it.
        """
        known = self.kind.startswith("INTERNLM2") if self.kind else told == "fused"
        return bool(setting(self.config, "enable_qkv_fusion", known))

    def normalises(self, told: str | None, folder: str) -> bool:
        """Whether training divides the rows of its head by their length.

        `norm_head` does not work in 0.5.0 to 0.5.2, which write `qk_interleaved` as later releases do.

        Args:
            told: the choice of the variant `head`, if a setting made it.
            folder: the checkpoint's, for the error.

        Raises:
            EngineError: E202 where nothing tells which release trained it.
        """
        if not self.config.get("norm_head"):
            return False
        if self.late or "qk_interleaved" not in self.config:
            return True
        if told not in ("plain", "normalised"):
            raise EngineError(
                "E202",
                "nothing tells whether training normalised its head",
                place=Place(folder),
                got="norm_head and qk_interleaved in model_config.pt",
                fix="Trained with InternEvo 0.5.0 to 0.5.2: --set head=plain; with later code: --set head=normalised.",
            )
        return told == "normalised"
