"""A config is read as it is meant, or refused with everything that is wrong with it in one UserError."""

import json
import random
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from small_config import fields, key_names, refusal, tree, write

from model import GPTConfig, GPTMini
from optim import build_optimizer
from support.config.read import load_config, read_config_file, validate_config
from support.config.reference import reference_markdown
from support.config.schema import Config
from support.config.values import typed
from support.files.safe_yaml import parse_yaml
from support.foreign.config_keys import FOREIGN_NAMES, leaf_of
from support.messages import UserError

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted([*ROOT.glob("config*.yaml"), *(ROOT / "configs").glob("*.yaml")])
JSON_FILES = sorted((ROOT / "configs").glob("*.json"))  # without comments on their keys: JSON has none


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("5e-5", 5e-5),
        ("+1E+2", 100.0),
        ("-2.5e-3", -2.5e-3),
        ("1.e2", 100.0),
        ("6E7", 6e7),
        ("0.1", 0.1),
    ],
)
def test_scientific_notation_is_a_number(text, value):
    """Plain PyYAML reads 3e-4 as a string."""
    read = typed(parse_yaml(f"lr: {text}", "file"))["lr"]
    assert isinstance(read, float)
    assert read == value
    assert validate_config(tree(model={"rope_theta": abs(read)})).model.rope_theta == abs(value)


@pytest.mark.parametrize("text", ["e3", "1e", "3e-4x", "'3e-4'", "1e5e5", "20231101.en"])
def test_what_only_looks_like_a_number_stays_text(text):
    assert isinstance(typed(parse_yaml(f"a: {text}", "file"))["a"], str)


@pytest.mark.parametrize("nested", [False, True])
def test_a_key_given_twice_is_refused_with_its_line(tmp_path, nested):
    lines = (
        ["training:", "  lr: 1", "  max_steps: 2", "  lr: 2"]
        if nested
        else ["seed: 1", "data: {path: x}", "training: {max_steps: 1}", "seed: 2"]
    )
    path = write(tmp_path, "\n".join(lines))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 4: key '(lr|seed)' is given twice"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\ndata: {path: x\nmodel: 2\n", 3),
        ("a: 1\n  b: 2\n", 2),
        ("a: [1, 2\n", 2),
        ("a: 1\nb: 'x\n", 3),
        ("a: 1\n\tb: 2\n", 2),
        ("a: *b", 1),
    ],
    ids=["unclosed brace", "indentation", "unclosed bracket", "unclosed quote", "tab", "unknown anchor"],
)
def test_a_syntax_error_names_file_and_line(tmp_path, text, line):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line {line}: "):
        read_config_file(path)


def test_the_file_is_data_and_never_runs_code(tmp_path):
    with pytest.raises(UserError):
        read_config_file(write(tmp_path, "a: !!python/object/apply:os.mkdir [made]"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text",
    [
        "lr: {{ lr }}",
        "[1, 2]: 3",
        "? {a: 1}\n: 2",
        "a: !!timestamp x",
        "a: !!bool x",
        "a: !!int x",
        "a: !!float x",
        "a: !!omap x",
        "<<: 3",
        "a: !!int " + "9" * 5000,
        "[" * 3000,
        "a: \x07",
    ],
)
def test_odd_yaml_is_a_user_error(tmp_path, text):
    """A template that was never filled in, keys that are lists, tags whose value does not fit, nesting
    without end."""
    with pytest.raises(UserError):
        read_config_file(write(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "not a mapping"),
        (b"hello", "not a mapping"),
        (b"\x80\x81", "not text"),
        (b"a: \xff", r"byte 3"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, content, says):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_config(path)


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path)


def test_json_is_a_config_too(tmp_path):
    """With null, a list, and a number in scientific notation."""
    content = json.dumps(
        tree(seed=7, training={"lr": 1e-5, "betas": [0.8, 0.9], "grad_clip": None}), indent=2
    )
    assert "1e-05" in content
    config = load_config(write(tmp_path, content, "config.json"))
    assert (config.seed, config.training.lr, config.training.betas, config.training.grad_clip) == (
        7,
        1e-5,
        [0.8, 0.9],
        None,
    )


# ---- values --------------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once():
    wrong = tree(
        seed="x",
        nonsense=1,
        model={"d_modle": 64, "n_layers": 0},
        training={"lr": -1, "micro_batch_size": "many"},
        hardware={"devices": 0},
        tokenizer={"kind": "word"},
    )
    said = refusal(wrong)
    for key in (
        "seed=",
        "nonsense",
        "model.d_modle",
        "model.n_layers=0",
        "training.lr=-1",
        "training.micro_batch_size=",
        "hardware.devices=0",
    ):
        assert key in said
    assert "'bpe'" in said, "the choices are named"
    assert len(said.splitlines()) == 8, "one line a mistake"


def with_value(key: str, value: object) -> dict:
    """The smallest config, with this value for `section.key`."""
    changed = tree()
    section, _, leaf = key.rpartition(".")
    (changed.setdefault(section, {}) if section else changed)[leaf] = value
    return changed


WRONG_TYPES = [
    *product(
        ("model.n_layers", "training.micro_batch_size", "training.max_steps", "seed"),
        (True, "7", 50.0, 7.5, [7]),
    ),
    *product(("model.n_layers", "training.micro_batch_size", "seed"), (None,)),
    *product(("model.dropout", "training.lr", "data.val_fraction"), (True, "0.1", [0.1], None)),
    *product(
        ("model.tie_embeddings", "training.compile", "data.shuffle", "logging.wandb"),
        (1, 0, "yes", "true", None),
    ),
    *product(("data.path", "checkpoint.dir", "data.text_field"), (1, True, ["x"])),
    *product(("model", "training", "data", "hardware"), (1, "x", [1], None)),
    ("training.betas", 0.9),
    ("training.betas", [0.9]),
    ("training.betas", [0.9, 0.95, 0.99]),
    ("training.betas", ["0.9", 0.95]),
    ("training.sample_prompts", "one prompt"),
    ("training.sample_prompts", [1]),
    ("model.norm", "RMSNorm"),
    ("training.schedule", True),
    ("hardware.accelerator", "tpu"),
    ("training.optimizer", ["adamw"]),
]


@pytest.mark.parametrize(
    ("key", "value"), WRONG_TYPES, ids=lambda v: json.dumps(v) if not isinstance(v, str) else v
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    """Strictly: true is not 1, "7" is not 7, and 50.0 is not a number of layers."""
    assert key in refusal(with_value(key, value))


def test_a_whole_number_will_do_for_a_fraction():
    config = validate_config(tree(training={"lr": 1, "betas": [0, 0.5]}, model={"rope_theta": 500000}))
    assert (config.training.lr, config.training.betas, config.model.rope_theta) == (1, [0, 0.5], 500000)


NAN, INFINITY = float("nan"), float("inf")
OUT_OF_RANGE = {
    "seed": (-1, 2**70),
    "tokenizer.vocab_size": (256,),
    "model.d_model": (0,),
    "model.n_layers": (-1,),
    "model.n_heads": (0,),
    "model.n_kv_heads": (0,),
    "model.max_seq_len": (1,),
    "model.dropout": (1.0, -0.1),
    "model.norm_eps": (0,),
    "model.rope_theta": (INFINITY,),
    "data.val_fraction": (0, 1),
    "data.stride": (0,),
    "training.max_steps": (-1,),
    "training.micro_batch_size": (0,),
    "training.grad_accum_steps": (0,),
    "training.seq_len": (1,),
    "training.lr": (0, NAN, INFINITY, 1e39),
    "training.min_lr": (1e39,),
    "training.muon_lr": (1e39,),
    "training.weight_decay": (-0.1, 1e39, INFINITY),
    "training.eps": (1e39, 1e-46),
    "training.betas": ([1.0, 0.9], [0.9, -0.1], [0.9, NAN]),
    "training.grad_clip": (0,),
    "training.val_every": (0,),
    "training.log_every": (0,),
    "training.sample_temperature": (-1,),
    "hardware.num_workers": (-1,),
    "checkpoint.save_every": (0,),
    "checkpoint.keep_last": (0,),
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(key):
    for value in OUT_OF_RANGE[key]:
        said = refusal(with_value(key, value))
        assert leaf_of(key) in said, value
        assert len(said.splitlines()) == 1, value


@pytest.mark.parametrize(
    "training",
    [
        {"lr": 10, "min_lr": 10},
        {"muon_lr": 10, "optimizer": "muon"},
        {"weight_decay": 100},
        {"eps": 1},
        {"eps": 1e-30},
    ],
)
def test_the_ends_of_the_ranges_are_numbers_that_an_optimizer_can_use(training):
    """1e39, say, is no float32: PyTorch would answer with a traceback, at the first step."""
    torch.manual_seed(0)
    model = GPTMini(GPTConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_seq_len=8))
    optimizer = build_optimizer(model, validate_config(tree(training=training)).training)
    model(torch.arange(8)[None], torch.arange(8)[None])[0].backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


STREAM = {"source": "hf", "dataset": "a/b", "streaming": True}
ONE_STEP = {"max_steps": 1}
CONTRADICTIONS = {  # what is said: the config
    r"d_model=100 is not a multiple of n_heads=8; try d_model=104": tree(
        model={"d_model": 100, "n_heads": 8}
    ),
    r"n_heads=6 is not a multiple of n_kv_heads=4; try n_kv_heads=3": tree(
        model={"d_model": 96, "n_heads": 6, "n_kv_heads": 4}
    ),
    r"n_heads=4 is not a multiple of n_kv_heads=8; try n_kv_heads=4": tree(
        model={"d_model": 96, "n_heads": 4, "n_kv_heads": 8}
    ),
    r"head_dim=9 is odd": tree(model={"d_model": 36, "n_heads": 4}),
    r"model\.vocab_size .*tokenizer\.vocab_size": tree(model={"vocab_size": 1000}),
    r"training\.seq_len=65 is longer than model\.max_seq_len=64": tree(
        model={"max_seq_len": 64}, training={"seq_len": 65}
    ),
    r"data\.stride=65 is longer than training\.seq_len=64": tree(
        model={"max_seq_len": 64}, data={"stride": 65}
    ),
    r"data\.stride=33 is longer than training\.seq_len=32": tree(
        training={"seq_len": 32}, data={"stride": 33}
    ),
    r"give either max_steps or epochs$": tree(training={"epochs": 1}),
    r"give either max_steps or epochs": {"data": {"path": "x"}, "training": {}},
    r"warmup_steps=6 is longer than the schedule of 5 steps": tree(training={"warmup_steps": 6}),
    r"warmup_steps=4 is longer than the schedule of 3 steps": tree(
        training={"warmup_steps": 4, "schedule_steps": 3}
    ),
    r"min_lr=0\.001 is larger than lr=0\.0001": tree(training={"lr": 1e-4, "min_lr": 1e-3}),
    r"sample_every=5 needs sample_prompts": tree(training={"sample_every": 5}),
    r"path goes with kind=file": tree(tokenizer={"kind": "file"}),
    r"path goes with kind=file: give both": tree(tokenizer={"kind": "bpe", "path": "t.json"}),
    r"source=hf needs dataset": tree(data={"source": "hf"}),
    r"source=text needs path": {"data": {}, "training": ONE_STEP},
    r"source=tokens needs path": {"data": {"source": "tokens"}, "training": ONE_STEP},
    r"source=instructions needs path: .*, or dataset": {
        "data": {"source": "instructions"},
        "training": ONE_STEP,
    },
    r"val_split=0\.1 would be the name of a split; a share of the text is val_fraction: 0\.1": tree(
        data={"val_split": "0.1"}
    ),
    r"training\.epochs .*stream": {"data": STREAM, "training": {"epochs": 1}},
    r"kind=char .*stream": {"data": STREAM, "tokenizer": {"kind": "char"}, "training": ONE_STEP},
    r"data is required": {"training": ONE_STEP},
    r"data is required\n.*training is required": {},
}


@pytest.mark.parametrize("says", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused(says):
    assert re.search(says, refusal(CONTRADICTIONS[says]), re.DOTALL)


@pytest.mark.parametrize("advice_of", ["d_model", "n_kv_heads"])
def test_the_advice_on_head_counts_is_itself_valid(advice_of):
    """Whatever value an error proposes, following it must work."""
    for n_heads in range(1, 17):
        for value in range(1, 40):
            model = (
                {"d_model": value, "n_heads": n_heads}
                if advice_of == "d_model"
                else {"d_model": 32 * n_heads, "n_heads": n_heads, "n_kv_heads": value}
            )
            try:
                validate_config(tree(model={**model, "position": "learned"}))
            except UserError as error:
                advised = int(re.search(rf"try {advice_of}=(\d+)", str(error))[1])
                validate_config(tree(model={**model, "position": "learned", advice_of: advised}))


@pytest.mark.parametrize("precision", ["fp16", "16-mixed", "16-true", "float16", "16", 16])
def test_fp16_is_refused_with_advice(precision):
    said = refusal(tree(hardware={"precision": precision}))
    assert "bf16-mixed or 32-true" in said


def test_keys_that_fill_themselves_in():
    config = validate_config(tree(model={"d_model": 96, "n_heads": 6, "max_seq_len": 40}))
    assert (config.model.n_kv_heads, config.model.head_dim, config.seq_len, config.stride) == (6, 16, 40, 40)
    config = validate_config(tree(model={"max_seq_len": 40}, training={"seq_len": 30}, data={"stride": 20}))
    assert (config.seq_len, config.stride) == (30, 20)


TEXT_ONLY = {"val_path": "v.txt", "errors": "replace"}
HF_ONLY = {
    "dataset": "a/b",
    "config": "en",
    "revision": "abc",
    "split": "test",
    "val_split": "test",
    "streaming": True,
    "train_docs": 5,
    "val_docs": 5,
}


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [("hf", *kv) for kv in TEXT_ONLY.items()] + [("text", *kv) for kv in HF_ONLY.items()],
)
def test_keys_of_another_data_source_are_refused(source, key, value):
    own = {"source": "hf", "dataset": "a/b"} if source == "hf" else {"source": "text", "path": "x.txt"}
    validate_config({"data": own, "training": {"max_steps": 1}})
    assert f"{key} does not belong to source={source}" in refusal(
        {"data": {**own, key: value}, "training": {"max_steps": 1}}
    )


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        tree(),
        tree(
            seed=3,
            model={"d_model": 96, "n_heads": 6, "n_kv_heads": 2, "position": "learned"},
            training={"lr": 1e-5, "eps": 1e-12},
        ),
        {
            "data": {"source": "hf", "dataset": "a/b", "config": "20231101.en", "streaming": True},
            "training": {"max_steps": 10**9, "betas": [0, 0.5]},
        },
        tree(
            training={"sample_prompts": ["é 👩‍👩‍👧", "null", "7", "a: b # c", ""]}, data={"text_field": "yes"}
        ),
    ],
)
def test_a_config_survives_yaml_and_json(sections):
    config = validate_config(sections)
    plain = config.to_dict()
    assert "vocab_size" not in plain["model"]
    assert validate_config(plain) == config
    assert validate_config(json.loads(json.dumps(plain))) == config
    assert validate_config(typed(parse_yaml(yaml.safe_dump(plain), "text"), Config)) == config
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain, "plain types that any YAML reader understands"


@pytest.mark.parametrize(
    "command",
    ["train.py --config c.yaml", "train.py --override training.sample_prompts=['two\nlines: [']"],
    ids=["one line", "two lines"],
)
@pytest.mark.parametrize("text", ["plain", "8e42519", "1e3", "null", "two\nlines", "", " # ", "é: 'x'"])
def test_the_config_written_beside_a_run_is_read_back_the_same(tmp_path, text, command):
    """Also where a text looks like a number to our reader (a commit such as 8e42519), and whatever the
    command line held."""
    from support.run.folder import write_run_config

    data = {"source": "hf", "dataset": "a/b", "revision": text, "text_field": text}
    config = validate_config(
        {"data": data, "training": {"max_steps": 2, "sample_every": 1, "sample_prompts": [text]}}
    )
    record = {"versions": {"python": "3.11"}, "git_commit": None, "command": command}
    write_run_config(tmp_path, config, record)
    assert load_config(tmp_path / "run_config.yaml") == config


@pytest.mark.parametrize("path", [*CONFIG_FILES, *JSON_FILES], ids=lambda p: p.name)
def test_every_config_file_of_the_repository_is_valid(path):
    assert load_config(path).to_dict()


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_every_key_in_a_config_file_says_what_it_does(path):
    lines = [line for line in path.read_text().splitlines() if re.match(r"\s*\w+: *[^#\s]", line)]
    assert len(lines) > 15
    assert [line for line in lines if not re.search(r" # (\.\.\. )?\w.{5,}", line)] == []


def test_the_config_files_are_found():
    assert {
        "config.yaml",
        "config_smoke.yaml",
        "shakespeare_char.yaml",
        "sanity.yaml",
        "tinystories.yaml",
    } <= {p.name for p in CONFIG_FILES}
    assert [path.name for path in JSON_FILES] == ["sample_custom.json", "sample_custom_baseline.json"]


@pytest.mark.parametrize("path", JSON_FILES, ids=lambda p: p.name)
def test_a_json_example_trains(tmp_path, capsys, path):
    import train

    short = (
        "training.max_steps=2",
        "training.warmup_steps=0",
        "training.sample_every=2",
        f"checkpoint.dir={tmp_path / 'run'}",
    )
    train.main(
        [
            "--config",
            str(path),
            "--device",
            "cpu",
            *(word for override in short for word in ("--override", override)),
        ]
    )
    assert "step      2 sample: 'Attention is" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "run_config.yaml").model == load_config(path).model


@pytest.mark.parametrize(
    ("training", "warned"), [({}, True), ({"sample_every": None}, False), ({"sample_every": 5}, False)]
)
def test_prompts_that_nothing_samples_are_warned_of(capsys, training, warned):
    from support.run.plan import warn_of_unused_prompts

    sections = tree(training={"sample_prompts": ["a"], **training})
    warn_of_unused_prompts(sections, validate_config(sections))
    assert ("--override training.sample_every=100" in capsys.readouterr().err) == warned


# ---- the reference -------------------------------------------------------------------------------


def test_every_key_is_described():
    assert [name for name, field in fields(Config) if len(field.description or "") < 8] == []


def test_the_reference_lists_every_key_with_its_default():
    lines = reference_markdown().splitlines()
    for name, field in fields(Config):
        rows = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert len(rows) == (name != "model.vocab_size")
        if rows:
            _, _, default, effect, _ = re.split(r"(?<!\\) ?\| ?", rows[0])
            assert effect == field.description
            assert typed(parse_yaml(default.strip("`"), name)) == field.default


def test_the_reference_in_the_docs_is_the_schema():
    path = ROOT / "docs" / "CONFIG_REFERENCE.md"
    assert path.read_text(encoding="utf-8") == reference_markdown(), (
        "run: python3 -m support.config.reference > docs/CONFIG_REFERENCE.md"
    )


# ---- anything at all -----------------------------------------------------------------------------

SCALARS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**40,
    10**30,
    0.5,
    -0.0,
    1e-300,
    float("inf"),
    float("nan"),
    "",
    "x",
    "3e-4",
    "auto",
    "\x00",
    "é" * 80,
    b"b",
]


def random_value(draw: random.Random, depth: int) -> object:
    kind = draw.random()
    if depth and kind < 0.15:
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if depth and kind < 0.3:
        keys = [
            *FOREIGN_NAMES,
            *(name.rsplit(".", 1)[-1] for name in key_names()),
            "",
            "a.b",
            1,
            None,
            2.5,
            (1, 2),
        ]
        return {draw.choice(keys): random_value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.choice(SCALARS)


def test_random_trees_are_accepted_or_refused_with_a_user_error():
    """Valid configs with a few keys turned into anything, and trees of nothing but noise."""
    draw, names, accepted = random.Random(11), sorted(key_names()), 0
    for _ in range(3000):
        changed = validate_config(tree()).to_dict() if draw.random() < 0.8 else random_value(draw, 3)
        for _ in range(draw.randrange(4) if isinstance(changed, dict) else 0):
            place, (*sections, leaf) = changed, draw.choice(names).split(".")
            for section in sections:
                place = place[section] if isinstance(place.get(section), dict) else {}
            place[leaf] = random_value(draw, 2)
        try:
            config = validate_config(changed)
        except UserError as error:
            assert str(error).startswith("config: ")
        else:
            accepted += 1
            assert validate_config(config.to_dict()) == config
    assert 100 < accepted < 2900


def test_random_text_is_read_or_refused_with_a_user_error():
    """Fragments of YAML in any order."""
    draw = random.Random(12)
    fragments = [
        "a",
        ": ",
        ":",
        "\n",
        "  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        '"',
        "#",
        "&a ",
        "*a",
        "!!int ",
        "!x",
        "3e-4",
        "|\n",
        ">",
        "? ",
        "---\n",
        "<<",
    ]
    fragments += [
        "%",
        "@",
        "`",
        "\t",
        "\x00",
        "é",
        "~",
        "=",
        "!!binary ",
        "2024-13-40",
        "0x",
        "1:30",
        "training",
        "...",
    ]
    for _ in range(5000):
        text = "".join(draw.choice(fragments) for _ in range(draw.randrange(12)))
        try:
            parse_yaml(text, "text")
        except UserError as error:
            assert str(error).startswith("text")
