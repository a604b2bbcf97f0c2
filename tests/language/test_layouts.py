from dataclasses import replace
from pathlib import Path

import pytest

from engine.checkpoint.grid import NoWeights, read_grid
from engine.errors import EngineError, Place
from engine.language.expressions import evaluate
from engine.language.layout_file import load_layout
from engine.language.model import RefusedFile
from engine.language.names import check_file_name
from engine.language.search import bundled

INTERNEVO = (bundled("mappings") / "layouts" / "internevo.yaml").read_text()


def test_the_internevo_layout_holds_what_its_file_says() -> None:
    layout = load_layout("internevo")
    assert (layout.config_file, layout.configs[0].format) == ("model_config.pt", "pickled_mapping")
    assert [p.prefix for p in layout.prefixes] == ["{chunk}.model.", "model.", ""]
    assert [m.name for m in layout.modes] == ["tensor", "isp", "isp_wp", "fsdp", "dcp", "universal"]
    isp = layout.modes[1].files[0]
    assert isp.ranks is not None and set(isp.ranks.dims) == {"tp", "wp"}
    assert dict(isp.cuts["layers"]) == {"wp": "rows", "tp": "runtime"} and layout.zip_root == "file_name"
    assert layout.modes[0].files[1].number is not None
    assert layout.lone_rank == {"tp": 0} and layout.uneven == "first" and layout.layers.uneven == "last"
    assert [m.name for m in layout.modes if m.only_read] == ["fsdp", "dcp", "universal"]
    assert dict(layout.modes[3].files[0].cuts["first"]) == {"tp": "split", "dp": "recorded"}
    assert "optimizer_*.pt" in layout.skip
    assert layout.refuse == ()


def test_a_layout_that_does_not_say_it_has_extra_layers_last_and_extra_units_first(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("".join(line for line in INTERNEVO.splitlines(keepends=True) if "uneven: " not in line))
    layout = load_layout(str(path))
    assert (layout.layers.uneven, layout.uneven) == ("last", "first")


@pytest.mark.parametrize(("layout", "file"), [("torch-dcp", "config.json"), ("internevo", "model_config.pt")])
def test_a_configuration_without_weights_is_a_save_that_has_not_ended_unless_any_model_has_it(
    layout: str, file: str
) -> None:
    with pytest.raises(EngineError) as caught:
        read_grid([file], load_layout(layout), "step")
    assert isinstance(caught.value, NoWeights) is (file == "config.json")
    assert ("saving has not ended" in caught.value.message) is (file == "model_config.pt")


def test_common_file_names_without_a_configuration_are_not_the_layout_s() -> None:
    with pytest.raises(NoWeights, match=r"__\{rank\}_\{number\}.distcp beside model_config.pt"):
        read_grid(["__0_0.distcp"], load_layout("internevo"), "step")
    assert read_grid(["__0_0.distcp", "model_config.pt"], load_layout("internevo"), "step").mode.name == "dcp"


def test_of_two_patterns_that_a_file_matches_the_first_counts() -> None:
    layout = load_layout("internevo")
    (file, *others) = layout.modes[0].files
    mode = replace(layout.modes[0], files=(file, replace(file, name="model_tp{tp}_pp{other}.pt"), *others))
    grid = read_grid(["model_tp0_pp0.pt"], replace(layout, modes=(mode,)), "step")
    assert grid.files[0].pattern is file


def test_files_that_a_layout_refuses_are_told_with_reason_and_fix() -> None:
    layout = load_layout("internevo")
    refused = RefusedFile(("other.pt", "model_{part}.bin"), "it is of another kind", "save it anew", layout.place)
    with pytest.raises(EngineError) as caught:
        read_grid(["model_tp0_pp0.pt", "model_3.bin"], replace(layout, refuse=(refused,)), "step")
    assert (caught.value.code, caught.value.message, caught.value.fix) == ("E303", refused.why, refused.fix)


def test_zbv_deals_every_second_chunk_in_reverse() -> None:
    stage = load_layout("internevo").layers.stage

    def order(schedule: str) -> list[int]:
        names = {"pps": 3, "schedule": schedule}
        return [evaluate(stage, {**names, "chunk": c, "pp": p}) for c in range(2) for p in range(3)]

    assert order("interleaved") == [0, 1, 2, 3, 4, 5]
    assert order("zbv") == [0, 1, 2, 5, 4, 3]


def test_the_schedule_is_read_from_the_training_config_where_there_is_one() -> None:
    schedule = load_layout("internevo").layers.variants["schedule"]
    zbv = schedule.choices["zbv"]
    assert zbv is not None
    assert evaluate(zbv, {"training": {"parallel": {"pipeline": {"mode": "ZBV"}}}}) is True
    assert evaluate(zbv, {"training": {}}) is False


def test_an_integer_stage_is_an_expression() -> None:
    assert load_layout("meta-llama").layers.stage.text == "0"


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("layout: 1", "layout: 3", "E102", "version 3"),
        ("lone_rank:", "lone_ranks:", "E102", "Did you mean `lone_rank`"),
        ("cuts: {layers: {wp: rows}}", "cuts: {layers: {tp: rows}}", "E108", "no rank dimension `tp`"),
        ("{tp: 0}", "{xp: 0}", "E108", "xp"),
        ("when: options.wrapped", "when: options.wraped", "E108", "Did you mean `wrapped`"),
        ("number: pp * (layers // pps) + nth", "number: pp * layers //", "E105", "read"),
        ("ranks: {count: wps, wp: rank}", "ranks: {wp: rank}", "E102", "count"),
        ("cuts: {layers: {wp: rows}}", "boxes: recorded", "E102", "cannot be written"),
        ("        cuts: {layers: {wp: rows}}\n", "", "E102", "neither `cuts` nor `boxes`"),
        ("cuts: {layers: {wp: rows}}", "cuts: {layers: {wp: rows}}\n        boxes: recorded", "E102", "in one way"),
        ("name: model_tp{tp}_pp{pp}.pt", 'name: "model_tp{tp}{pp}.pt"', "E104", "touch"),
        ('prefix: "{chunk}.model."', 'prefix: "{chun}.model."', "E108", "Did you mean `chunk`"),
        ("topo_wp{wp}_pp{pp}.json", "topo_wp{tp}_pp{pp}.json", "E108", "has no `tp` to fill in"),
        ("name: model_wp{wp}_pp{pp}.pt", "name: model_wp{wp}_pp{dp}.pt", "E108", "has no `pp` to fill in"),
        ("lone_rank: {tp: 0}", "lone_rank: {tp: 1}", "E102", "lone_rank.tp"),
        ("ranks: {count: wps, wp: rank}", "ranks: {count: wps}", "E102", "`modes.isp_wp.files.0.ranks`"),
        ("_layer{number}_", "_layer{numbe}_", "E108", "has no `number`"),
        ("        number: pp * (layers // pps) + nth", "", "E108", "says no `number`"),
        (
            "      - name: model_wp{wp}_pp{pp}.pt\n        ranks: {count: wps, wp: rank}\n"
            "        cuts: {layers: {wp: rows}, first: {wp: split}, last: {wp: split}}\n",
            "",
            "E102",
            "the first file",
        ),
    ],
)
def test_a_mistake_in_a_layout_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, code: str, says: str
) -> None:
    assert old in INTERNEVO
    path = tmp_path / "own.yaml"
    path.write_text(INTERNEVO.replace(old, new))
    with pytest.raises(EngineError) as caught:
        load_layout(str(path))
    assert caught.value.code == code and says in str(caught.value), str(caught.value)
    assert caught.value.place is not None and caught.value.place.line is not None


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineError) as caught:
        load_layout("interevo")
    assert caught.value.code == "E002" and "internevo" in str(caught.value)


@pytest.mark.parametrize(
    "where", ["name: model_tp", "file: model_config", "file: config_file", 'file: "topo_tp{tp}_pp']
)
def test_a_layout_cannot_name_a_file_outside_its_folder(where: str, tmp_path: Path) -> None:
    key, _, start = where.partition(": ")
    quote = '"' if start.startswith('"') else ""
    assert where in INTERNEVO
    evil = tmp_path / "evil.yaml"
    evil.write_text(INTERNEVO.replace(where, f"{key}: {quote}../{start.strip(quote)}", 1))
    with pytest.raises(EngineError) as caught:
        load_layout(str(evil))
    assert caught.value.code == "E104"
    assert "leaves its folder" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "folders"),
    [("", False), (".engine-lock", False), ("a\nb.pt", False), ("a\\b.pt", False), ("x" * 201, False),
     ("a/b.pt", False), (".metadata", False), ("a/b/c.pt", True), ("../b.pt", True), ("a/.metadata", True)],
)  # fmt: skip
def test_a_name_of_a_file_that_is_not_plain_is_refused(name: str, folders: bool) -> None:
    with pytest.raises(EngineError, match="leaves its folder, or is not valid"):
        check_file_name(name, Place("own.yaml"), folders=folders)


@pytest.mark.parametrize("name", ["x" * 200, "mp_rank_00/model_optim_rng.pt", ".metadata"])
def test_a_file_may_lie_in_a_folder_inside_where_the_layout_says_so(name: str) -> None:
    check_file_name(name, Place("own.yaml"), folders=True)
