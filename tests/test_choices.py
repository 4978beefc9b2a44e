"""What a user tells the converter: a chat template, a pre-tokenizer, what of heads."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ewq_gguf import api, store
from ewq_gguf.api import Options, make_gguf
from ewq_gguf.bench.runner import Request
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.converter import UnknownPreTokenizerError
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.process import run
from ewq_gguf.records import AdapterIdentity, ModelIdentity, UniformPolicy
from ewq_gguf.stages.companions import say_heads
from ewq_gguf.tensor_names import ARCHITECTURES
from tests.checkpoints import write_llama
from tests.families import FAMILIES, write_family

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
]

POLICY = UniformPolicy(ggml_type="Q8_0")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


class Notes(api.Silent):
    """Progress that keeps what it was told."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def made(model: Path, out: Path, notes: Notes | None = None, **options):
    """A file of a model, not loaded."""
    return make_gguf(
        str(model),
        out,
        POLICY,
        options=Options(load=False, **options),
        progress=notes or Notes(),
    )


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Plans are written where the command runs."""
    monkeypatch.chdir(tmp_path)


def converted(model: Path, out: Path, toolchain, **options) -> str:
    """What is said while a model is converted."""
    notes, chosen = Notes(), Options(load=False, **options)
    api.convert_model(api.Run(str(model), chosen, notes), out, "BF16")
    return notes.text


# Chat templates.


def test_a_missing_chat_template_is_said_and_a_gguf_source_takes_none(
    toolchain, tmp_path
):
    out, template = tmp_path / "o.gguf", tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)

    said = converted(write_llama(tmp_path / "model"), out, toolchain)

    assert "has no chat template, as the model has none" in said
    assert "--chat-template FILE" in said
    options = Options(chat_template=template, pre="qwen2")
    with pytest.raises(UsageError, match="--chat-template and --pre"):
        api.open_model(str(out), options=options)


def test_a_chosen_chat_template_stands_before_every_other(toolchain, tmp_path):
    model, out = write_llama(tmp_path / "model"), tmp_path / "o.gguf"
    config = model / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "chat_template": "of the config"}))
    (model / "chat_template.jinja").write_text("of the file")
    (model / "chat_template.json").write_text('{"chat_template": "of the json"}')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("of the folder")
    paths = [path for path in model.rglob("*") if path.is_file()]
    files = {path: path.read_bytes() for path in paths}
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)

    said = converted(model, out, toolchain, chat_template=template)

    assert f"chat template: {template}, in place of its own" in said
    assert "has no chat template" not in said
    keys = read_gguf(out).kv
    assert keys["tokenizer.chat_template"] == TEMPLATE
    assert not any(name.startswith("tokenizer.chat_template.") for name in keys)
    assert {path: path.read_bytes() for path in paths} == files


def test_a_plan_with_a_template_is_made_again_byte_by_byte_or_asks_for_it(
    tmp_path, capsys
):
    model = write_llama(tmp_path / "model")
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    one = made(model, tmp_path / "one.gguf", chat_template=template)
    options = Options(load=False, chat_template=template)

    two = make_gguf(str(model), tmp_path / "two.gguf", one.plan, options=options)

    assert one.plan.model.chosen == {"chat_template": store.sha256_file(template)}
    assert two.path.read_bytes() == one.path.read_bytes()
    with pytest.raises(InputError, match="give it with --chat-template"):
        make_gguf(str(model), tmp_path / "three.gguf", one.plan)
    with pytest.raises(InputError, match="--plan PLAN --chat-template FILE`"):
        export_sh(one.plan)
    dry = ["gguf", str(model), "--plan", str(one.plan_path), "--dry-run", "-q"]
    capsys.readouterr()
    assert main(dry) == 3
    assert "give it with --chat-template" in capsys.readouterr().err
    assert main([*dry, "--chat-template", str(template)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"ewq convert {model} --chat-template {template} -o base.gguf"
    assert not any(line.startswith("ewq plan /") for line in lines)


def test_a_plan_with_another_template_is_refused_by_its_option_though_forced(
    tmp_path, capsys
):
    model = write_llama(tmp_path / "model")
    files = [tmp_path / name for name in ("mine.jinja", "other.jinja")]
    for path in files:
        path.write_text(f"{TEMPLATE}{path.name}")
    options = Options(chat_template=files[0])
    plan = tmp_path / "plan.json"
    plan.write_text(api.plan(api.Run(str(model), options), POLICY).to_json())
    hashes = [store.sha256_file(path)[:12] for path in files]
    argv = ["gguf", str(model), "--plan", str(plan), "--force", "-o", "o.gguf"]

    assert main([*argv, "--chat-template", str(files[1])]) == 3

    said = " ".join(capsys.readouterr().err.split())
    assert f"the plan was made with --chat-template {hashes[0]}, here is" in said
    assert f"a checkpoint with --chat-template {hashes[1]}; give the same" in said
    assert "--force" not in said
    assert not Path("o.gguf").exists()


@pytest.mark.parametrize(
    ("planned", "found", "why"),
    [
        ({}, {"pre": "qwen2"}, "without --pre, .* with --pre qwen2; leave --pre away"),
        ({"pre": "a"}, {"pre": "b"}, "with --pre a, .* with --pre b; give the same"),
        ({"mtp": "drop"}, {}, "with --mtp drop, .* without --mtp; give the same"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_choices_that_differ_are_named_though_forced(
    planned, found, why, force, tmp_path
):
    plan = api.plan(api.open_model(str(write_llama(tmp_path / "m"))), POLICY)
    one, two = (
        plan.model.model_copy(update={"chosen": chosen}) for chosen in (planned, found)
    )

    with pytest.raises(InputError, match=why):
        api.check_plan(plan.model_copy(update={"model": one}), two, None, force=force)


@pytest.mark.parametrize(
    "choice", [("--chat-template", "mine.jinja"), ("--pre", "qwen2"), ("--mtp", "drop")]
)
def test_a_scan_takes_no_choice(choice, tmp_path, capsys):
    run = api.open_model(str(write_llama(tmp_path / "model")))
    scan = tmp_path / "scan.json"
    scan.write_text(api.scan(run).to_json())

    assert main(["plan", str(scan), *choice]) == 2
    assert f"give MODEL with {choice[0]}" in " ".join(capsys.readouterr().err.split())


def test_a_plan_with_choices_is_compared_and_measured_in_transformers(
    unknown, tmp_path, monkeypatch
):
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    options = Options(chat_template=template, pre="qwen2")
    plan = api.plan(api.Run(str(unknown), options), POLICY)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())

    applied = api.for_transformers(api.Run(str(unknown)), path).plan
    assert applied is not None
    assert applied.sha256 == plan.sha256

    opened = []

    def versions(run, *_):
        opened.append(run.identity)
        raise InputError("test", "versions", "are not made", "stop here")

    monkeypatch.setattr("ewq_gguf.experiments.compare.choose_versions", versions)
    wanted = api.ComparisonSpec((api.PlanSpec(plan),), (), Request(tasks=("speed",)))
    with pytest.raises(InputError, match="--chat-template"):
        api.compare(api.Run(str(unknown)), wanted)
    with pytest.raises(InputError, match="stop here"):
        api.compare(api.Run(str(unknown), Options(chat_template=template)), wanted)
    assert opened == [plan.model]


def test_a_plan_of_merged_weights_is_not_for_a_checkpoint_in_transformers(tmp_path):
    model = write_llama(tmp_path / "model")
    plan = api.plan(api.open_model(str(model)), POLICY)
    adapter = AdapterIdentity(
        name="tune", hub_id=None, revision=None, config_sha256="", weights_sha256=""
    )
    tuned = plan.model.model_copy(update={"adapters": (adapter,)})
    path = tmp_path / "plan.json"
    path.write_text(plan.model_copy(update={"model": tuned}).to_json())

    with pytest.raises(InputError, match=r"adapters merged \(tune\)") as caught:
        api.for_transformers(api.Run(str(model)), path)
    assert "--adapter" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{% for x in %}", "is no jinja template: line 1"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"x" * (1 << 20) + b"x", "1,048,577 bytes are more than"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_chat_template_is_refused_before_any_work(content, why, tmp_path):
    model = write_llama(tmp_path / "model")
    template = tmp_path / "mine.jinja"
    if content is not None:
        template.write_bytes(content)

    with pytest.raises(InputError, match=why):
        made(model, tmp_path / "o.gguf", chat_template=template)


# Pre-tokenizers.


@pytest.fixture(scope="module")
def unknown(tmp_path_factory) -> Path:
    """A tokenizer that cuts as deepseek-coder's and has fewer merges."""
    model = write_family(tmp_path_factory.mktemp("pre") / "model", "Qwen2")
    path = model / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = values["model"]["merges"][:-40]
    path.write_text(json.dumps(values))
    return model


def test_an_unknown_pre_tokenizer_is_told_with_its_hash_and_the_nearest(
    unknown, tmp_path
):
    with pytest.raises(UnknownPreTokenizerError) as caught:
        made(unknown, tmp_path / "o.gguf")

    assert caught.value.exit_code == 3
    assert len(caught.value.hash) == 64
    assert caught.value.hash in str(caught.value)
    assert "the nearest known one is deepseek-coder: all 263 tokens" in str(
        caught.value
    )
    assert "--pre deepseek-coder" in str(caught.value)


@pytest.mark.parametrize("command", [["study", "sensitivity"], ["frontier"]])
def test_a_study_names_the_nearest_pre_tokenizer_and_takes_it(
    command, unknown, tmp_path, capsys, monkeypatch
):
    (tmp_path / "text.txt").write_text("a text")
    argv = [*command, str(unknown), "--text", "t=text.txt", "-q", "-o", "s.json"]

    assert main(argv) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "if it is right, give --pre deepseek-coder" in said

    found = []

    def measured(run, *_):
        found.append(run.identity.chosen)
        raise InputError("test", "study", "is not measured", "stop here")

    monkeypatch.setattr(api, "run_study", measured)
    more = ["--budgets", "30%"] if command == ["frontier"] else []
    assert main([*argv, "--pre", "deepseek-coder", *more]) == 3
    assert found == [{"pre": "deepseek-coder"}]


def test_a_chosen_pre_tokenizer_goes_into_the_file_and_the_plan(
    unknown, tmp_path, capsys
):
    notes = Notes()
    one = made(unknown, tmp_path / "o.gguf", notes, pre="qwen2")

    assert read_gguf(one.path).kv["tokenizer.ggml.pre"] == "qwen2"
    assert one.plan.model.chosen == {"pre": "qwen2"}
    assert "pre-tokenizer: qwen2, as chosen" in notes.text
    assert "pre-tokenizer qwen2: all 263 tokens" in notes.text
    # A plan tells it by itself.
    options = Options(load=False)
    two = make_gguf(str(unknown), tmp_path / "p.gguf", one.plan, options=options)
    assert two.path.read_bytes() == one.path.read_bytes()
    capsys.readouterr()
    dry = ["gguf", str(unknown), "--plan", str(one.plan_path), "--dry-run", "-q"]
    assert main(dry) == 0
    assert f"ewq convert {unknown} --pre qwen2 -o base" in capsys.readouterr().out
    with pytest.raises(InputError, match="with --pre qwen2, .* another file; make"):
        export_sh(one.plan)


def test_a_name_that_llama_cpp_does_not_know_is_refused(unknown, tmp_path):
    with pytest.raises(UsageError, match="the nearest name is qwen2"):
        made(unknown, tmp_path / "o.gguf", pre="qwenn2")


# Heads for further tokens.


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Path:
    """GLM-4.5: two layers, and one that drafts."""
    return write_family(tmp_path_factory.mktemp("mtp") / "glm", "GLM-4.5")


def laid_out(model: Path, toolchain, mtp: str) -> tuple[set[str], str]:
    """The names in the text model's file, and what is said of heads."""
    notes, options = Notes(), Options(mtp=mtp)
    run = api.Run(str(model), options, notes)
    layout = run.layout
    say_heads(run, layout)
    return {tensor.name for tensor in layout.tensors}, notes.text


def test_heads_are_kept_dropped_or_a_file_of_their_own(glm, toolchain, tmp_path):
    said = "34 tensors of heads for further tokens (MTP; 4.25 MB in the checkpoint) "
    notes = Notes()
    kept, said_of_kept = laid_out(glm, toolchain, "keep")
    dropped, said_of_dropped = laid_out(glm, toolchain, "drop")
    apart = make_gguf(
        str(glm),
        tmp_path / "o.gguf",
        POLICY,
        options=Options(mtp="separate"),
        progress=notes,
    )
    (beside,) = apart.companions
    drafting = {name for name in kept if name.startswith("blk.2.")}

    assert f"{said}are kept" in said_of_kept
    assert f"{said}are left out (--mtp drop)" in said_of_dropped
    assert f"{said}become a file of their own" in notes.text
    assert drafting
    assert dropped == kept - drafting
    assert {tensor.name for tensor in read_gguf(apart.path).tensors} == dropped
    assert apart.verification.answer is not None
    assert beside.path.name == "mtp-glm-BF16.gguf"
    assert drafting <= {tensor.name for tensor in read_gguf(beside.path).tensors}
    assert beside.companion.n_equal == beside.companion.n_tensors
    assert beside.companion.is_loaded


def test_the_script_of_a_plan_without_heads_gives_the_same_bytes(
    glm, toolchain, tmp_path
):
    ours, script = made(glm, tmp_path / "ours.gguf", mtp="drop"), tmp_path / "make.sh"
    script.write_text(export_sh(ours.plan))

    run(
        ["sh", script, glm, "theirs.gguf"],
        stage="test",
        log_path=tmp_path / "sh.log",
        cwd=tmp_path,
        env={
            "LLAMA_CPP": str(toolchain.source_dir),
            "LLAMA_BIN": str(toolchain.bin_dir),
            "PYTHON": sys.executable,
        },
    )

    theirs = tmp_path / "theirs.gguf"
    assert theirs.stat().st_size == ours.plan.totals.file_size_bytes
    assert theirs.read_bytes() == ours.path.read_bytes()


def test_a_dry_run_says_what_the_converter_is_not_told(glm, tmp_path, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    said = {}
    for mtp in ("keep", "drop", "separate"):
        args = ["convert", str(glm), "--mtp", mtp, "--chat-template", str(template)]
        assert main([*args, "--dry-run", "-q"]) == 0
        said[mtp] = capsys.readouterr().out
        told = f"# the converter has no option for --chat-template {template}\n"
        assert said[mtp].startswith(told)

    beside = "# and again with --mtp for what goes beside it"
    assert said["separate"].endswith(f" --no-nextn\n{beside}\n")
    assert said["drop"].endswith(" --no-nextn\n")
    assert "again" not in said["keep"]


def test_heads_that_config_promises_and_nobody_has_are_left_out(
    toolchain, tmp_path, monkeypatch
):
    family = FAMILIES["GLM-4.5"]
    lines = family.tensors.replace("{0..2}", "{0..1}").replace("{1..2}", "1")
    kept = [line for line in lines.split("\n") if ".layers.2." not in line]
    monkeypatch.setitem(FAMILIES, "headless", replace(family, tensors="\n".join(kept)))
    model = write_family(tmp_path / "model", "headless")

    said = converted(model, tmp_path / "o.gguf", toolchain)

    assert "config.json promises 1 heads for further tokens" in said
    kv = read_gguf(tmp_path / "o.gguf").kv
    assert kv["glm4moe.block_count"] == 2
    assert "glm4moe.nextn_predict_layers" not in kv
    # A plan tells it again as --mtp drop.
    found, dropped, apart = (
        api.open_model(str(model), options=Options(mtp=mtp)).identity
        for mtp in ("keep", "drop", "separate")
    )
    assert found.chosen == {"mtp": "drop"}
    assert found == dropped == apart


def test_heads_that_nobody_has_need_no_llama_cpp_where_names_say_all(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "empty"))
    model = write_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (model / "config.json").write_text(json.dumps(config))

    assert api.scan(api.Run(str(model))).model.chosen == {}


def test_no_family_that_is_mapped_by_name_has_a_converter_of_heads(toolchain, tmp_path):
    code = (
        "import sys\nfrom conversion import get_model_class\n"
        "print([n for n in sys.argv[1:] if get_model_class(n).supports_mtp_export])"
    )
    text = run(
        [sys.executable, "-c", code, *ARCHITECTURES],
        stage="test",
        log_path=tmp_path / "log",
        env=toolchain.converter_env(),
    )

    assert text.splitlines()[-1] == "[]"


def test_heads_that_the_converter_cannot_set_apart_are_said(toolchain, tmp_path):
    model = write_family(tmp_path / "model", "DeepSeek V3")

    with pytest.raises(UsageError, match="cannot write the 4 tensors"):
        api.open_model(str(model), options=Options(mtp="separate"))
    assert "are left out (--mtp drop)" in laid_out(model, toolchain, "drop")[1]


def test_a_model_without_heads_has_none_to_drop(tmp_path):
    notes, options = Notes(), Options(mtp="drop")
    model = write_llama(tmp_path / "model")
    api.open_model(str(model), options=options, progress=notes)

    assert notes.text == "--mtp drop: the model has no heads to leave out"


# What is kept of a choice.


def test_what_changes_no_tensor_scans_nothing_again(tmp_path, own_cache, toolchain):
    model, template = write_llama(tmp_path / "model"), tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    first = api.scan(api.Run(str(model)))
    scans = sorted((own_cache / "scans").iterdir())

    options = Options(chat_template=template, pre="qwen2")
    second = api.scan(api.Run(str(model), options))

    assert sorted((own_cache / "scans").iterdir()) == scans
    assert second.model.chosen.keys() == {"chat_template", "pre"}
    assert second == first.model_copy(update={"model": second.model})


def test_a_model_without_a_choice_is_recorded_as_before():
    plain = ModelIdentity(
        name="m",
        hub_id=None,
        revision=None,
        hf_architecture="LlamaForCausalLM",
        n_layers=1,
        files_sha256={"config.json": "0" * 64},
        shards=(),
    )
    chosen = plain.model_copy(update={"chosen": {"pre": "qwen2"}})

    assert "chosen" not in plain.model_dump()
    assert chosen.model_dump()["chosen"] == {"pre": "qwen2"}
    assert chosen.fingerprint != plain.fingerprint == chosen.as_found.fingerprint
    assert ModelIdentity.model_validate(plain.model_dump()) == plain
